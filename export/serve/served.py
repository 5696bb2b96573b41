"""What is served, read from the model's manifest and configs: its name, settings and hyperparameters; no weights."""

from dataclasses import dataclass
from pathlib import Path

from surgery.anatomy import denoiser_of
from surgery.artifact import read_manifest, verify_artifact
from surgery.artifact.manifest import MANIFEST
from surgery.base import HubBase
from surgery.base.local import LocalBase
from surgery.base.opening import local_folder
from surgery.base.resolution import native_resolution
from surgery.errors import InputError
from surgery.fetching import model_folder
from surgery.recipe.schema import OPERATORS


@dataclass(frozen=True)
class ServedModel:
    """A model as its clients see it.

    sampling: what its manifest records. width, height: of an image whose request names no size, None where the configs
    do not tell. operations: as the UNet's config has them; empty for a plain pipeline.
    """

    name: str
    artifact_hash: str | None
    sampling: dict
    width: int | None = None
    height: int | None = None
    operations: tuple[dict, ...] = ()

    def hyperparameters(self):
        """{name: the value of each operation} of those that every operation has; a request may set these."""
        names = [name for name in self._fields(self.operations[0]) if name != "unit"] if self.operations else []
        shared = [name for name in names if all(name in self._fields(operation) for operation in self.operations)]
        return {name: [operation[name] for operation in self.operations] for name in shared}

    def scheduled(self):
        """The hyperparameters that a schedule of the recipe sets at every step, so that a request cannot."""
        return {name for operation in self.operations for name in operation.get("schedule") or () if name in operation}

    @staticmethod
    def _fields(operation):
        return [name for name in OPERATORS[operation["operator"]].model_fields if name != "operator"]


def served_model(model, revision=None, here=True, as_repository=False):
    """(ServedModel, the model to open, its revision) of a folder or a Hub repository.

    here: the replicas run on this machine, so what comes from the Hub is fetched once, now, and opened as a folder.
    Otherwise, and with `as_repository` (for engines, which are fetched by key), they open the repository themselves, at
    the commit that it has now. Raises InputError for what is no pipeline, BaseError for what cannot be read,
    ArtifactError for an artifact that is not whole.
    """
    if local_folder(model) is not None:
        folder = Path(model_folder(model, revision)).absolute()
        return _described(LocalBase(folder), folder.name, folder), str(folder), None
    base = HubBase(str(model), revision)
    commit = base.commit or revision
    if not here:
        folder = base.path(MANIFEST).parent if MANIFEST in base.files else None
        return _described(base, str(model), folder), str(model), commit
    folder = Path(model_folder(model, revision)).absolute()
    served = _described(LocalBase(folder), str(model), folder)
    return (served, str(model), commit) if as_repository else (served, str(folder), None)


def _described(base, name, folder):
    """The ServedModel of a base; name: of a plain pipeline; folder: of an artifact's manifest."""
    if "model_index.json" not in base.files:
        raise InputError(f"{folder or name} holds no pipeline: it has no model_index.json")
    component, _ = denoiser_of(base.read_json("model_index.json"))
    config = _config(base, component)
    own = native_resolution(config, _config(base, "vae"))
    sampling, artifact_hash, operations = {}, None, tuple(config.get("pladis") or ())
    if MANIFEST in base.files:
        manifest = verify_artifact(folder) if isinstance(base, LocalBase) else read_manifest(folder)
        name, sampling, artifact_hash = manifest.name, manifest.sampling, manifest.hash
        operations = tuple(operation.model_dump() for operation in manifest.operations)
    for operation in operations:
        if operation.get("operator") not in OPERATORS:
            operator = operation.get("operator")
            raise InputError(f"{name} runs {operator!r}, an operator unknown here; pip install -U pladis-surgery")
    return ServedModel(
        name=name,
        artifact_hash=artifact_hash,
        sampling=sampling,
        width=sampling.get("width") or own,
        height=sampling.get("height") or own,
        operations=operations,
    )


def _config(base, component):
    name = f"{component}/config.json"
    return base.read_json(name) if name in base.files else {}
