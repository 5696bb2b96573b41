"""Load a patched pipeline from a folder or the Hub: verified against its manifest, without running its code."""

import logging
import math
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.artifact import read_manifest, verify_artifact
from surgery.artifact.fetch import engine_folder, model_folder, saved_components
from surgery.artifact.manifest import MANIFEST, Manifest, foreign_code
from surgery.console import operation_text, schedule_usage
from surgery.engines.compiling import compile_model
from surgery.engines.fitting import candidates, choose, refuse_other_sizes
from surgery.engines.record import ENGINE_FILE, ENGINES_FOLDER, Engine, check_files
from surgery.errors import ArtifactError, InputError
from surgery.hub.base import local_folder, read_index, read_json_file
from surgery.hub.foreign import check_lengths, check_sizes, reading
from surgery.hub.listing import components_of, specs_of
from surgery.machine import best_device, device_type, on_device
from surgery.models.denoisers import denoisers_of
from surgery.models.negative import listen
from surgery.models.patching import denoiser, denoisers, operations_of, patched_modules

from .modular import open_modular

if TYPE_CHECKING:
    import torch

_ALIASING = threading.RLock()  # another thread must not lose the name that it is using


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: "torch.dtype | None" = None,
    verify: bool = False,
    quiet: bool = False,
    engine: str | None = None,
    trust_engines: bool = False,
    fallback: bool = False,
    device: "str | torch.device | None" = None,
    compile: str | None = None,
    **kwargs: Any,
) -> Any:
    """The patched diffusers pipeline of an artifact: a folder, or a Hub repository (OWNER/NAME).

    The code in the artifact is checked but not run: the classes are this package's own. Sizes, and the sha256 of
    code, buffers and configs, are checked always; of the weights when they arrive, and with `verify=True` again.
    From the Hub only what is lacking is fetched: weights that the base's own cache entry has are taken from there, and
    so are those of a thin artifact, which has none.
    device: where the pipeline goes; without it and without `engine` it stays on the CPU, for its user to move.
    dtype: a torch dtype; by default float32 for a pipeline on the CPU and the dtype of the weights for one on an
    accelerator. Without a `device` it is that of the weights where there is an accelerator, to which it will be moved;
    for one that stays on the CPU of such a machine, say device="cpu".
    quiet: do not print, on standard error, what was loaded.
    engine: "auto", the compiled engine of each component that fits this machine, or engines' keys with commas between.
    The pipeline then goes to the best device there is unless one is given. Where none fits, InputError says for each
    why; with `fallback` that is a warning, and the pipeline runs eagerly. An engine is native code: of a Hub repository
    it is run only with `trust_engines`, and always only if its sha256 is the manifest's.
    compile: "regional", "full" or "max-autotune", by torch.compile at the first call (surgery/engines/compiling.py).
    Further arguments go to DiffusionPipeline.from_pretrained; `quantization_config`, of the denoiser, or a
    PipelineQuantizationConfig with a quant_mapping, to its loading too.
    Raises ArtifactError for a folder that is not whole or was altered, InputError for one that holds no patched
    pipeline, BaseError for a repository that cannot be read.
    """
    for name in ("trust_remote_code", "custom_pipeline"):
        if kwargs.pop(name, None):
            raise InputError(f"surgery.load runs no code of a repository, so it takes no {name}; diffusers does")
    if "torch_dtype" in kwargs:
        dtype = dtype or kwargs.pop("torch_dtype")
    folder = model_folder(model, revision, patched_only=True, recheck=verify)
    given_variant = kwargs.pop("variant", None)
    if os.path.lexists(folder / MANIFEST):  # what is no file is refused
        manifest = verify_artifact(folder, weights=verify)
        components, variant = list(manifest.patched), manifest.weight_variant()
        if given_variant not in (None, variant):
            raise InputError(f"{folder} holds variant {variant}, not {given_variant}; leave variant out")
    elif verify:
        raise ArtifactError(f"{folder} has no {MANIFEST}, so there is nothing to verify it against")
    else:
        manifest, components, variant = None, saved_components(folder), given_variant
    if given := [name for name in components if name in kwargs]:
        raise InputError(f"{given[0]} is what was patched, so another one cannot be given; use diffusers for that")
    check_sizes(folder)
    device = best_device() if engine and not device else device
    dtype = dtype or default_dtype(folder / components[0], device)
    quantized = _quantization(kwargs, components)
    models = {name: load_denoiser(folder, name, variant, dtype, quantized.get(name)) for name in components}
    pipeline = assemble(folder, models, variant, dtype, kwargs)
    if not quiet:
        print(describe(pipeline, manifest, folder, verify), file=sys.stderr)
    if device:
        on_device(pipeline, device)
    if engine:
        if manifest is None:
            raise InputError(f"{folder} has no {MANIFEST}, which lists an artifact's engines; leave engine out")
        used = use_engines(pipeline, model, revision, folder, manifest, engine, trust_engines, fallback)
        for made in used if not quiet else ():
            print(f"surgery: {made.component} runs the engine {made.key}, images {made.profile}", file=sys.stderr)
        if compile and {made.component for made in used}.intersection(components):
            raise InputError("an engine is compiled already; leave compile out")
    if compile:
        _compile(pipeline, compile)
    return pipeline


def _compile(pipeline, mode):
    for model in denoisers(pipeline).values():
        compile_model(model, mode)


def default_dtype(component_folder: str | Path, device: "str | torch.device | None" = None) -> "torch.dtype":
    """float32 for a pipeline on the CPU, else the dtype of the component's weights.

    device: where the pipeline will be, the best there is unless given: what the machine has besides does not count, as
    half precision on a CPU takes minutes for what takes seconds.
    """
    import torch

    from surgery.hub.tensors import DTYPES, read_header

    if device_type(device or best_device()) == "cpu":
        return torch.float32
    files = sorted(Path(component_folder).glob("*.safetensors"), key=lambda path: -path.stat().st_size)
    held: dict[torch.dtype, int] = {}  # dtype -> bytes: the hyperparameters' few are float32 whatever the weights are
    for entry in read_header(files[0]).values() if files else ():
        dtype = DTYPES.get(entry.dtype)
        if dtype is not None and dtype.is_floating_point:
            held[dtype] = held.get(dtype, 0) + dtype.itemsize * math.prod(entry.shape)
    return max(held, key=lambda dtype: held[dtype], default=torch.float32)


def describe(pipeline: Any, manifest: Manifest | None, folder: str | Path, verified: bool) -> str:
    """One line on what was loaded; where it has a schedule or a guidance, another on how to use that."""
    operations = operations_of(pipeline)
    settings = ", ".join(
        f"{len(operation['layers'])} modules with {operation_text(operation)}" for operation in operations
    )
    total = len(patched_modules(pipeline))
    linked = manifest and any((Path(folder) / path).is_symlink() for path in manifest.needed)
    checked = "code and buffers verified, weights " + ("when they arrived" if linked else "by size")
    checked = "all sha256 verified" if verified else checked
    name = f"{manifest.name} {manifest.hash[:12]} ({checked})" if manifest else f"{folder} (no manifest to verify)"
    line = f"surgery: loaded {name}: {settings}; {total} in all; {str(denoiser(pipeline).dtype).removeprefix('torch.')}"
    if any("schedule" in operation for operation in operations):
        component = next(name for name, model in denoisers(pipeline).items() if patched_modules(model))
        line += f"\nsurgery: {schedule_usage(component)}"
    if manifest and "guidance" in manifest.sampling:
        line += f"\nsurgery: its recipe samples after surgery.guide(pipe, {manifest.sampling['guidance']})"
    return line


def _quantization(kwargs, components):
    """{denoiser: its own of what was given as quantization_config}; what else there is of it stays in `kwargs`."""
    given = kwargs.get("quantization_config")
    if not hasattr(given, "quant_mapping"):
        return dict.fromkeys(components, kwargs.pop("quantization_config", None))
    if given.quant_mapping is None:
        raise InputError(
            "a PipelineQuantizationConfig is told by component here: quant_mapping={" + f"{components[0]!r}: ...}}"
        )
    if set(given.quant_mapping) <= set(components):
        del kwargs["quantization_config"]
    return {name: given.quant_mapping.get(name) for name in components}


def load_denoiser(
    folder: Path, component: str, variant: str | None, dtype: "torch.dtype", quantization: Any = None
) -> Any:
    """The patched denoiser of an artifact's folder; ArtifactError where it cannot be loaded.

    quantization: diffusers' config by which its Linears are quantised while it is loaded.
    """
    from surgery.nn import PATCHED, backbone_of

    config = read_json_file(folder / component / "config.json")
    if config.get("_class_name") not in PATCHED:
        raise ArtifactError(f"{folder / component}/config.json names {config.get('_class_name')}, unknown here; update")
    with reading(f"{folder / component} cannot be loaded", folder / component):
        patched: Any = backbone_of(config["_class_name"]).patched
        given = {} if quantization is None else {"quantization_config": quantization}
        return patched.from_pretrained(folder, subfolder=component, variant=variant, dtype=dtype, **given)


def assemble(
    folder: Path, models: Mapping[str, Any], variant: str | None, dtype: "torch.dtype", kwargs: Mapping[str, Any]
) -> Any:
    """The pipeline of an artifact's folder around its patched denoisers; ArtifactError where diffusers cannot load it.

    models: {component: model}.
    """
    import diffusers

    model_index = read_index(folder)
    if problem := foreign_code(model_index, list(models)):
        raise ArtifactError(f"{folder}: its index {problem}; it is not loaded")
    # Its own class knows which components are optional; DiffusionPipeline would load such a one although it is given.
    pipeline_class = getattr(diffusers, str(model_index.get("_class_name")), diffusers.DiffusionPipeline)
    if lacking := [name for name in models if name not in components_of(model_index)]:
        raise ArtifactError(f"{folder}: its index names no {lacking[0]}; build or fetch the artifact again")
    if specs_of(model_index):
        with reading(f"diffusers cannot load the pipeline in {folder}", folder):
            pipeline = open_modular(folder, {**models, **kwargs}, dtype)
        check_lengths(pipeline, folder)
        return pipeline
    with (
        reading(f"diffusers cannot load the pipeline in {folder}", folder),
        _unwarned("auto_map"),
        ExitStack() as aliases,
    ):
        for name, model in models.items():
            library = components_of(model_index)[name][0]
            aliases.enter_context(_module_alias(library, sys.modules[type(model).__module__]))
        pipeline = pipeline_class.from_pretrained(folder, variant=variant, dtype=dtype, **models, **kwargs)
    check_lengths(pipeline, folder)
    listen(pipeline)
    return pipeline


@contextmanager
def _module_alias(name, module) -> Iterator[None]:
    """Let diffusers resolve the artifact's module name to this package's `module` while it checks what it was given."""
    with _ALIASING:
        known = name in sys.modules
        sys.modules.setdefault(name, module)
        try:
            yield
        finally:
            if not known:
                del sys.modules[name]


@contextmanager
def _unwarned(key) -> Iterator[None]:
    """Without diffusers' warnings that a pipeline does not know a key of its index, which is there for AutoModel."""
    loggers = [logging.getLogger(f"diffusers.{name}") for name in ("configuration_utils", "pipelines.pipeline_utils")]

    def unlike(record: logging.LogRecord) -> bool:
        return repr(key) not in record.getMessage()

    for logger in loggers:
        logger.addFilter(unlike)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(unlike)


def use_engines(
    pipeline: Any,
    model: str | Path,
    revision: str | None,
    folder: Path,
    manifest: Manifest,
    wanted: str,
    trust: bool,
    fallback: bool,
) -> list[Engine]:
    """[Engine]: those that run components of `pipeline` now. Arguments as of `surgery.load`.

    folder: where the artifact's files are. Raises InputError where nothing fits (with fallback a warning) or where the
    engines are not trusted, ArtifactError where a file is not what surgery.json lists.
    """
    import torch

    from surgery.engines.running import attach

    refuse_untrusted(model, trust)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    try:
        place, chosen = chosen_engines(modules, model, revision, folder, manifest, wanted)
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
    for model in denoisers(pipeline).values():
        refuse_other_sizes(model, pipeline, chosen)
    return list(chosen.values())


def refuse_untrusted(model: str | Path, trust: bool) -> None:
    """Raise InputError for engines of a Hub repository that nobody said to trust."""
    if local_folder(model) is None and not trust:
        raise InputError(
            f"the engines of {model} are native code that somebody compiled; trust_engines=True (--trust-engines) runs "
            "them, if you trust who published it"
        )


def chosen_engines(
    modules: Mapping[str, Any],
    model: str | Path,
    revision: str | None,
    folder: Path,
    manifest: Manifest,
    wanted: str,
) -> tuple[Path, dict[str, Engine]]:
    """(the folder with engines/, {component: Engine} of those that are to run), before any is opened.

    modules: {component: what has its `device` and `dtype`}; the rest as of `use_engines`. Raises InputError where none
    fits.
    """
    place = engine_folder(model, folder, revision)
    height, width = manifest.sampling.get("height"), manifest.sampling.get("width")
    size = (None, height, width) if height and width else None  # how many at once is for the call to say
    found = candidates(place, manifest.hash, modules, size)
    if wanted == "auto":  # what was put there by hand is refused by name, and passed over else
        found = [one for one in found if f"{ENGINES_FOLDER}/{one.key}/{ENGINE_FILE}" in manifest.files]
    return place, choose(found, wanted)


def open_model(
    model: str | Path,
    revision: str | None = None,
    device: "str | torch.device | None" = None,
    verify: bool = False,
    dtype: "torch.dtype | None" = None,
    **running: Any,
) -> tuple[Any, dict[str, Any], str | None]:
    """(pipeline on its device, the sampling settings that its manifest records, its hash); {} and None without one.

    model: an artifact or a plain pipeline, a folder or a Hub repository. device: the best there is unless given; it
    decides the dtype too, unless that is given (`surgery.runtime.load.default_dtype`). verify: hash the weights too.
    running: `engine`, `trust_engines`, `fallback` and `compile` of `surgery.load`; a plain pipeline has no engines.
    Raises InputError for what is no pipeline or a device that is not here, and what `surgery.load` raises.
    """
    running = {key: value for key, value in running.items() if value}
    device = device or best_device()
    folder = model_folder(model, revision)
    if os.path.lexists(folder / MANIFEST):  # what is no file is refused
        manifest = read_manifest(folder)
        # engines lie where the model was found, which may be a repository
        where = {"model": model, "revision": revision} if "engine" in running else {"model": folder}
        return load(**where, verify=verify, dtype=dtype, device=device, **running), manifest.sampling, manifest.hash
    if "engine" in running:
        raise InputError(f"{model} is no artifact, so it has no engines; leave --engine out")
    pipeline = _open_without_manifest(folder, verify, dtype, device)
    if "compile" in running:
        _compile(pipeline, running["compile"])
    return pipeline, {}, None


def _open_without_manifest(folder, verify, dtype, device):
    from diffusers import DiffusionPipeline

    index = read_index(folder)
    found = denoisers_of(index)
    if any(name.startswith("Pladis") for name in found.values()):
        return load(folder, verify=verify, dtype=dtype, device=device)
    dtype = dtype or default_dtype(folder / next(iter(found)), device)
    check_sizes(folder)
    with reading(f"diffusers cannot load the pipeline in {folder}", folder):
        if specs_of(index):
            pipeline = open_modular(folder, {}, dtype)
        else:
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    check_lengths(pipeline, folder)
    return on_device(pipeline, device)
