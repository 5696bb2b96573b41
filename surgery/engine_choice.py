"""The engines of an artifact that fit, fetched, checked and attached to a pipeline."""

import tempfile
import warnings
from pathlib import Path

from surgery.base.opening import local_folder
from surgery.engines.fitting import candidates, choose
from surgery.engines.record import ENGINE_FILE, ENGINES_FOLDER, check_files
from surgery.engines.sizes import refuse_other_sizes
from surgery.errors import InputError
from surgery.fetching import engine_folder


def use_engines(pipeline, model, revision, folder, manifest, wanted, trust, fallback):
    """[Engine]: those that run components of `pipeline` now. Arguments as of `surgery.load`.

    folder: where the artifact's files are. Raises InputError where nothing fits (with fallback a warning) or where the
    engines are not trusted, ArtifactError where a file is not what surgery.json lists.
    """
    import torch

    from surgery.engines.running import attach

    if local_folder(model) is None and not trust:
        raise InputError(
            f"the engines of {model} are native code that somebody compiled; trust_engines=True (--trust-engines) runs "
            "them, if you trust who published it"
        )
    place = engine_folder(model, folder, revision)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    height, width = manifest.sampling.get("height"), manifest.sampling.get("width")
    size = (None, height, width) if height and width else None  # how many at once is for the call to say
    found = candidates(place, manifest.hash, modules, size)
    if wanted == "auto":  # what was put there by hand is refused by name, and passed over else
        found = [one for one in found if f"{ENGINES_FOLDER}/{one.key}/{ENGINE_FILE}" in manifest.files]
    try:
        chosen = choose(found, wanted)
    except InputError as error:
        if not fallback:
            raise
        warnings.warn(f"{error}\nso the pipeline runs eagerly", stacklevel=3)
        return []
    engine_folder(model, folder, revision, [engine.key for engine in chosen.values()])
    with tempfile.TemporaryDirectory(prefix="surgery-engines-") as private:
        for engine in chosen.values():  # all are looked at before the first is run
            Path(private, engine.key).mkdir()
            check_files(place / ENGINES_FOLDER / engine.key, engine, manifest, Path(private, engine.key))
        for name, engine in chosen.items():
            attach(modules[name], engine, Path(private, engine.key))
    refuse_other_sizes(modules[manifest.component], pipeline, chosen)
    return list(chosen.values())
