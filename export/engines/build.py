"""An engine of an artifact from first to last: captured, compiled, held against eager, listed in surgery.json.

What is compiled lies in `engines/.building-<key>` until the engine was found right; a run that was cut short goes on
from the functions that are there.
"""

import contextlib
import importlib
import inspect
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from surgery.artifact import Manifest, verify_artifact
from surgery.artifact.fetch import model_folder
from surgery.artifact.manifest import list_files, replace_file, write_json
from surgery.engines.record import (
    ENGINE_FILE,
    ENGINES_FOLDER,
    SCHEMA_VERSION,
    USUAL_BATCH,
    Backend,
    Difference,
    Engine,
    EngineFile,
    Profile,
    Span,
    check_files,
    read_engine,
    target_key,
)
from surgery.errors import ArtifactError, InputError, SurgeryError
from surgery.hub import sha256_of
from surgery.hub.base import local_folder, native_resolution, read_index, read_json_file
from surgery.hub.listing import specs_of
from surgery.machine import this_machine, usable_device, versions
from surgery.models.videos import draws_videos
from surgery.nn.backbones import backbone_of
from surgery.nn.operators import OPERATIONS
from surgery.runtime.load import default_dtype, load_denoiser

from .capture import capture
from .comparing import compare
from .program import (
    ChangingConstants,
    groups_of,
    hyperparameter_buffers,
    inputs_of,
    refuse_changing_constants,
    refuse_changing_tensors,
    region_of,
    values_of,
)
from .recording import capture_calls

# Of the largest difference, over the root mean square of what eager gives. Rounding grows with depth and with how few
# bits there are; a wrong engine is off by about one.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 3e-1}


@dataclass(frozen=True)
class Wanted:
    """What is to be built. profile: the sampling's own size, and as many images as `serve` draws, unless given."""

    target: Backend
    component: str | None = None  # the denoiser unless given
    profile: Profile | None = None
    dtype: torch.dtype | None = None  # as `surgery.load` chooses for the device unless given
    device: str | None = None
    regional: bool = False
    weights: str = "artifact"
    operator: str = "fused"
    tolerance: float | None = None
    max_autotune: bool = False


def build_engine(
    folder: str | Path,
    wanted: Wanted,
    say: Callable[[str], object] = lambda text: None,
    calls: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Engine, Path, bool]:
    """(Engine, its folder, whether it was built now) of an artifact's folder.

    say: called with a line at the beginning of each stage. calls: the arguments of some calls of the denoiser, all of
    one size, where its inputs are not to be taken by drawing from a prompt, which not every pipeline can. Raises
    InputError for what cannot be built, ArtifactError for a folder that is no whole artifact, SurgeryError where the
    engine is not what eager is: it is not kept then. Where no sizes are wanted and the model is told by a number how
    many images there are, it is one for one image.
    """
    try:
        return _built(folder, wanted, say, calls)
    except ChangingConstants:
        if wanted.profile is not None:
            raise
        say("this model's calls hold the number of images fixed, so it is an engine for one: serve it by --max-batch 1")
        return _built(folder, wanted, say, calls, images=1)


@dataclass(frozen=True)
class Prepared:
    """What an engine is built of, found fit for it. source: where the weights are, of a thin artifact elsewhere."""

    folder: Path
    manifest: Manifest
    source: Path
    component: str
    device: torch.device
    dtype: torch.dtype
    profile: Profile

    @property
    def dtype_name(self) -> str:
        """float32 and so on."""
        return str(self.dtype).removeprefix("torch.")


def prepare(folder: str | Path, wanted: Wanted, images: int | None = None, given: Any = None) -> Prepared:
    """The Prepared of an artifact's folder; InputError for what cannot be built, ArtifactError for no whole artifact.

    images: of a profile that is not wanted otherwise. given: the denoiser's calls, where no pipeline draws them.
    """
    place = local_folder(folder) or _no_folder(folder)
    manifest = verify_artifact(place)
    source = model_folder(place)
    component = wanted.component or manifest.component
    device = usable_device(wanted.device)
    dtype = wanted.dtype or default_dtype(source / manifest.component, device)
    profile = wanted.profile or _own_profile(source, manifest, images)
    prepared = Prepared(place, manifest, source, component, device, dtype, profile)
    _check(wanted, component, manifest, profile)
    _check_device(wanted, device, prepared.dtype_name)
    if given is None:
        check_pipeline(source)
    if component in manifest.patched:
        check_class(source / component, wanted.target, wanted.regional)
        _check_operators([operation["operator"] for operation in manifest.operations_of(component)])
    return prepared


def _check_operators(names):
    if keeping := [name for name in names if OPERATIONS[name].keeps]:
        raise InputError(
            f"{keeping[0]} keeps the step before in its modules, which no engine does; run it eager, or by "
            "torch.compile"
        )


def _built(folder, wanted, say, given, images=None):
    backend = importlib.import_module(f"surgery.export.engines.{wanted.target}")
    needed = {"pladis-surgery": versions()["pladis-surgery"], **backend.needs()}
    prepared = prepare(folder, wanted, images, given)
    folder, manifest, source = prepared.folder, prepared.manifest, prepared.source
    component, device, dtype, profile = prepared.component, prepared.device, prepared.dtype, prepared.profile
    name = prepared.dtype_name
    machine = this_machine(device)
    options = {"weights": wanted.weights, "operator": wanted.operator, "max_autotune": wanted.max_autotune}
    if backend.HOLDS_WEIGHTS:
        options |= {"weights": "engine", "operator": "decomposed"}
    key = target_key(
        component,
        wanted.target,
        machine,
        name,
        profile,
        manifest.hash,
        **options,
        regional=wanted.regional,
        needs=needed,
    )
    place, building = folder / ENGINES_FOLDER / key, folder / ENGINES_FOLDER / f".building-{key}"
    if place.exists():
        if engine := _whole(place, manifest):
            return engine, place, False
        _refuse_strangers(place, manifest)
    building.mkdir(parents=True, exist_ok=True)
    seconds = {}
    with _stage("inputs", seconds, say, f"{component}, {profile}, {name} on {device}"):
        if given is None:
            captured = capture(source, manifest, component, profile.sizes(), device, dtype, wanted.regional)
        else:
            model = load_denoiser(source, component, manifest.weight_variant(), dtype).to(device).eval()
            captured = capture_calls(model, given, wanted.regional)
    refuse_changing_tensors(captured.module, captured.recorded.first_calls)
    regions = _compile(backend, captured, wanted, options, building, seconds, say)
    engine = Engine(
        schema_version=SCHEMA_VERSION,
        key=key,
        backend=wanted.target,
        versions=needed,
        component=component,
        artifact_hash=manifest.hash,
        built_on=machine,
        dtype=name,
        **profile.to_json(),
        weights=options["weights"],
        hyperparameters="adjustable" if component in manifest.patched else "fixed",
        operator=options["operator"],
        options={"regional": wanted.regional, "max_autotune": wanted.max_autotune},
        inputs=inputs_of(captured.recorded.first_calls),
        regions=regions,
        files=_files(building),
        seconds=seconds,
        difference=Difference(largest=0, mean=0, relative=0, tolerance=0, after_change=None, calls=0),
    )
    with _stage("check", seconds, say, f"against eager, {sum(map(len, captured.recorded.calls.values()))} calls"):
        try:
            difference = compare(engine, building, captured, wanted.tolerance or TOLERANCES[name])
        except SurgeryError:
            shutil.rmtree(building, ignore_errors=True)
            raise
    engine = engine.model_copy(update={"difference": difference, "seconds": seconds})
    _put_in_place(engine, building, place, folder)
    return engine, place, True


def _no_folder(folder: str | Path) -> NoReturn:
    raise InputError(f"there is no folder {folder}; `surgery apply` writes an artifact")


def _check(wanted, component, manifest, profile):
    if wanted.regional and wanted.weights == "engine":
        raise InputError("--regional runs one function for many blocks, so it cannot hold weights; leave --weights out")
    if wanted.regional and (component not in manifest.patched or wanted.target != "inductor"):
        raise InputError("--regional is for the denoiser and --target inductor: its repeated blocks are compiled once")
    if component in manifest.patched and not profile.is_fixed:
        for axis in ("height", "width"):
            span = getattr(profile, axis)
            if not span.is_fixed and span.low % 64 + span.high % 64 + span.usual % 64:
                raise InputError(f"a range of {axis} has multiples of 64 as its ends, not {span}")


def _check_device(wanted, device, dtype):
    if wanted.target == "tensorrt" and device.type != "cuda":
        raise InputError("--target tensorrt builds on the NVIDIA GPU that the engine is for; there is none here")
    if device.type != "cpu":
        return
    if wanted.max_autotune and wanted.target == "inductor" and wanted.weights == "artifact":
        raise InputError(
            "on a CPU --max-autotune packs the weights anew for its kernels, so that the engine must hold them; "
            "add --weights engine"
        )
    if wanted.target == "onnx" and dtype == "bfloat16":
        raise InputError("ONNX Runtime has no bfloat16 on a CPU; give --dtype fp32 or fp16")


def check_pipeline(folder: Path) -> None:
    """Raise InputError for a pipeline that needs more than a prompt, with which its inputs are captured."""
    import diffusers

    index = read_index(folder)
    name = str(index["_class_name"])
    if specs_of(index):  # its blocks say what they lack
        return
    kind = getattr(diffusers, name, diffusers.StableDiffusionPipeline)
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    named = [one for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    required = [one.name for one in named if one.default is one.empty and one.name != "prompt"]
    if required:
        raise InputError(
            f"{name} draws from {', '.join(required)} beside the prompt, and an engine's inputs are taken by drawing "
            "from a prompt alone; surgery.load(..., compile='regional') compiles it in its own process"
        )


def check_class(folder: Path, target: str, regional: bool = False) -> None:
    """Raise InputError for a denoiser that a target has no operations for, or that is no graph as a whole."""
    name = read_json_file(folder / "config.json")["_class_name"]
    if backbone_of(name).reads_lengths and not regional:
        raise InputError(
            f"{name} reads the lengths of its texts out of tensors, so that no graph has the whole of it; "
            "--target inductor --regional builds its blocks"
        )
    if backbone_of(name).turns_complex and target != "inductor":
        raise InputError(
            f"{name} turns its queries and keys as complex numbers, for which --target {target} has no operations; "
            "--target inductor builds it"
        )


def _own_profile(source, manifest, images):
    """The size that the model draws unless told, and from one image to a server's batch of them, or `images`."""
    height, width = manifest.sampling.get("height"), manifest.sampling.get("width")
    if not (height and width):
        denoiser, vae = (read_json_file(source / name / "config.json") for name in (manifest.component, "vae"))
        own = native_resolution(denoiser, vae)
        if own is None:
            raise InputError("the model names no size of its own; give --shapes")
        height, width = height or own, width or own
    index = read_index(source)
    singly = bool(specs_of(index)) or draws_videos(index["_class_name"])
    images = images or (1 if singly else USUAL_BATCH)
    one = Profile.of(images, height, width)
    return replace(one, images=Span(1, images, images))


def _compile(backend, captured, wanted, options, building, seconds, say):
    """[Region], each with its file in `building`."""
    model, method = captured.module, captured.recorded.method
    if wanted.regional:
        functions = [(paths, captured.blocks[paths[0]]) for paths in groups_of(model, captured.blocks)]
    else:
        functions = [([""], captured.recorded.first_calls)]
    for paths, calls in functions:
        refuse_changing_constants(model.get_submodule(paths[0]), calls)
    hyperparameters = hyperparameter_buffers(model) if options["weights"] == "engine" else {}
    regions = []
    for index, (paths, calls) in enumerate(functions):
        module = model.get_submodule(paths[0])
        file = f"{'block' if wanted.regional else 'whole'}-{index}{backend.SUFFIX}"
        what = f"{type(module).__name__} for {len(paths)} modules, {index + 1} of {len(functions)}"
        region = region_of(file, paths, method, calls, hyperparameters, values_of(model, hyperparameters))
        done, made_of = building / f".{file}.done", json.dumps(region.model_dump(), sort_keys=True)
        before = json.loads(done.read_text()) if done.is_file() and (building / file).is_file() else {}
        if before.get("made_of") == made_of:
            names = before["names"]
            say(f"compile: {what}: there from before")
        else:
            with _stage("compile", seconds, say, what), warnings.catch_warnings():
                # torch's, of its own calls
                warnings.simplefilter("ignore", FutureWarning)
                warnings.filterwarnings("ignore", "TypedStorage is deprecated")
                names = backend.build(module, method, calls, building / file, options) or {}
            replace_file(done, json.dumps({"made_of": made_of, "names": names}).encode())
        regions.append(region.model_copy(update=names))  # where the backend has names of its own
    return regions


class _stage:  # noqa: N801  used as a statement's word
    """Say what begins, and keep how long it took."""

    def __init__(self, name: str, seconds: dict[str, float], say: Callable[[str], object], text: str) -> None:
        self.name, self.seconds = name, seconds
        say(f"{name}: {text}")

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        took = time.monotonic() - self.started
        self.seconds[self.name] = round(self.seconds.get(self.name, 0) + took, 1)


def _files(building):
    paths = [path for path in sorted(building.iterdir()) if not path.name.startswith(".")]
    return {path.name: EngineFile(size=path.stat().st_size, sha256=sha256_of(path)) for path in paths}


def _whole(place, manifest):
    try:
        engine = read_engine(place)
        check_files(place, engine, manifest)
    except ArtifactError:
        return None
    return engine


def _refuse_strangers(place, manifest):
    """Raise InputError if an engine's folder, which is to be replaced, holds what neither list of its files names."""
    own = {path.rpartition("/")[2] for path in manifest.files if path.startswith(f"{ENGINES_FOLDER}/{place.name}/")}
    with contextlib.suppress(ArtifactError):
        own |= {ENGINE_FILE, *read_engine(place).files}  # of a run that was cut short before surgery.json listed it
    if strangers := sorted(path.name for path in place.iterdir() if path.name not in own):
        raise InputError(f"{place} holds {strangers[0]}, which is no file of the engine's; move it away")


def _put_in_place(engine, building, place, folder):
    for leftover in building.glob(".*.done"):
        leftover.unlink()
    write_json(building / ENGINE_FILE, engine.model_dump(mode="json"))
    if place.exists():
        shutil.rmtree(place)
    os.replace(building, place)
    # Read anew: another engine may have been listed meanwhile.
    added = [f"{ENGINES_FOLDER}/{place.name}/{name}" for name in (ENGINE_FILE, *engine.files)]
    list_files(verify_artifact(folder), folder, added)
