"""Which engines fit: this machine, this artifact, these image sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import ArtifactError, InputError
from surgery.machine import backend_version, misfits, this_machine

from .record import ENGINE_FILE, ENGINES_FOLDER, Engine, read_engine

# backend: (package, what installs it)
PACKAGES = {
    "inductor": None,
    "onnx": ("onnxruntime", "pip install 'pladis-surgery[onnx]'"),
    "tensorrt": (
        "torch-tensorrt",
        "pip install 'pladis-surgery[tensorrt]' --extra-index-url https://download.pytorch.org/whl/cu130",
    ),
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # building and checking a graph takes more than running it
# What TensorRT is called depends on how it was installed.
_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")


def missing_backend(backend: str) -> str | None:
    """Why a backend cannot be used here, with what installs it; None if it can."""
    package = PACKAGES[backend]
    if package and backend_version(package[0]) is None:
        return f"{package[0]} is not installed: {package[1]}"
    if backend == "tensorrt" and len(tensorrt_versions()) < 2:
        return f"TensorRT is not installed: {package[1]}"
    return None


def tensorrt_versions() -> dict[str, str]:
    """{package: version} of torch-tensorrt and of TensorRT, as far as they are installed."""
    found = {name: backend_version(name) for name in _TENSORRT}
    tensorrt = next(((name, version) for name, version in found.items() if version), None)
    own = backend_version("torch-tensorrt")
    return {**({"torch-tensorrt": own} if own else {}), **dict([tensorrt] if tensorrt else ())}


def import_torch_tensorrt() -> Any:
    """The module torch_tensorrt; InputError where it or a library of TensorRT cannot be loaded."""
    try:
        import torch_tensorrt  # pyright: ignore[reportMissingImports]
    except Exception as error:  # where TensorRT's libraries are lacking it raises Exception itself
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"torch_tensorrt cannot be imported ({lines[0]}): {PACKAGES['tensorrt'][1]}") from error
    return torch_tensorrt


@dataclass(frozen=True)
class Candidate:
    """An engine of an artifact and what speaks against it; none of `reasons` where it fits."""

    key: str
    engine: Engine | None
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons

    def __str__(self) -> str:
        return f"{self.key}: {'fits' if self.fits else '; '.join(self.reasons)}"


def candidates(
    folder: str | Path,
    artifact_hash: str,
    components: Mapping[str, Any],
    size: tuple[int | None, int, int] | None = None,
) -> list[Candidate]:
    """A Candidate for each engine in an artifact's folder, in the order in which they are preferred.

    components: {name: model}, the pipeline's, on their devices. size: (images or None, height, width) to be drawn.
    Engines that fit come first; among them TensorRT before inductor before ONNX, then fixed sizes before ranges.
    """
    found = [_candidate(path.parent, artifact_hash, components, size) for path in engine_files(folder)]
    preferred = ("tensorrt", "inductor", "onnx")

    def order(candidate):
        engine = candidate.engine
        if engine is None:
            return (True, 0, False, False, candidate.key)
        whole = any("" in region.modules for region in engine.regions)
        return (
            not candidate.fits,
            preferred.index(engine.backend),
            not engine.profile.is_fixed,
            not whole,
            candidate.key,
        )

    return sorted(found, key=order)


def engine_files(folder: str | Path) -> list[Path]:
    """Paths of the engine.json files in an artifact's folder."""
    return sorted(Path(folder, ENGINES_FOLDER).glob(f"[!.]*/{ENGINE_FILE}"))


def choose(found: Sequence[Candidate], wanted: str = "auto") -> dict[str, Engine]:
    """{component: Engine} of the Candidates that are to run.

    wanted: "auto", the best that fits for each component; or keys with commas between, each of which must fit.
    Raises InputError, with every candidate and its reasons, where nothing fits or a key is not there.
    """
    trace = "".join(f"\n  {candidate}" for candidate in found) or "\n  it has none; `surgery export` builds one"
    if wanted == "auto":
        chosen = {}
        for candidate in found:
            if candidate.fits:
                assert candidate.engine is not None
                chosen.setdefault(candidate.engine.component, candidate.engine)
        if not chosen:
            raise InputError(f"none of the artifact's engines fits here:{trace}")
        return chosen
    by_key = {candidate.key: candidate for candidate in found}
    chosen = {}
    for key in wanted.split(","):
        candidate = by_key.get(key)
        if candidate is None:
            raise InputError(f"the artifact has no engine {key!r}. Its engines:{trace}")
        if not candidate.fits:
            raise InputError(f"the engine {key} does not fit here: {'; '.join(candidate.reasons)}")
        assert candidate.engine is not None
        if candidate.engine.component in chosen:
            raise InputError(f"{key} is a second engine for {candidate.engine.component}; name one of them")
        chosen[candidate.engine.component] = candidate.engine
    return chosen


def _candidate(folder, artifact_hash, components, size):
    try:
        engine = read_engine(folder)
    except ArtifactError as error:
        return Candidate(folder.name, None, (str(error),))
    model = components.get(engine.component)
    if model is None:
        return Candidate(folder.name, engine, (f"the pipeline has no {engine.component}",))
    reasons = []
    if engine.key != folder.name:
        reasons.append(f"its engine.json is that of {engine.key}: the folder was copied or renamed")
    if engine.artifact_hash != artifact_hash:
        reasons.append(f"built for artifact {engine.artifact_hash[:12]}, this one is {artifact_hash[:12]}")
    if engine.backend != "onnx":  # a graph, compiled by its runtime where it runs
        reasons += misfits(engine.built_on, this_machine(model.device))
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != engine.dtype:
        reasons.append(f"the pipeline is {dtype}, the engine {engine.dtype}")
    if reason := missing_backend(engine.backend):
        reasons.append(reason)
    elif engine.backend == "tensorrt":  # its engines are for the very version
        for package, version in engine.versions.items():
            if package != "pladis-surgery" and backend_version(package) != version:
                reasons.append(f"{package} {backend_version(package)}, engine {version}")
    if size and (problem := engine.profile.problem(*size)):
        reasons.append(problem)
    return Candidate(folder.name, engine, tuple(reasons))


def refuse_other_sizes(denoiser: Any, pipeline: object, engines: Mapping[str, Engine]) -> None:
    """Have the denoiser's first call raise InputError where the size is outside another component's engine's profile.

    engines: {component: Engine}.
    """
    later = [engine for component, engine in engines.items() if component == "vae"]
    scale = getattr(pipeline, "vae_scale_factor", None)
    if not later or not scale:
        return

    def check(module, args, kwargs):
        latents = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if latents is None or latents.ndim != 4:
            return
        height, width = (side * scale for side in latents.shape[-2:])
        for engine in later:
            # guidance doubles the denoiser's batch, so that the number of images is not known here
            if problem := engine.profile.problem(engine.profile.images.low, height, width):
                raise InputError(
                    f"the engine {engine.key} of the {engine.component} was not built for this size: {problem}. Build "
                    "one that is (`surgery export --shapes ...`) or load without it"
                )

    denoiser.register_forward_pre_hook(check, with_kwargs=True)
