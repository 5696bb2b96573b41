"""Which engine of an artifact fits a pipeline here, and why the others do not: a decision as data."""

from dataclasses import dataclass
from pathlib import Path

from surgery.errors import ArtifactError, InputError

from .backends import missing_backend
from .machine import backend_version, misfits, this_machine
from .record import ENGINE_FILE, ENGINES_FOLDER, Engine, read_engine


@dataclass(frozen=True)
class Candidate:
    """An engine of an artifact and what speaks against it; none of `reasons` where it fits."""

    key: str
    engine: Engine | None
    reasons: tuple[str, ...]

    @property
    def fits(self):
        """Whether nothing speaks against it."""
        return not self.reasons

    def __str__(self):
        return f"{self.key}: {'fits' if self.fits else '; '.join(self.reasons)}"


def candidates(folder, artifact_hash, components, size=None):
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


def engine_files(folder):
    """Paths of the engine.json files in an artifact's folder."""
    return sorted(Path(folder, ENGINES_FOLDER).glob(f"[!.]*/{ENGINE_FILE}"))


def choose(found, wanted="auto"):
    """{component: Engine} of the Candidates that are to run.

    wanted: "auto", the best that fits for each component; or keys with commas between, each of which must fit.
    Raises InputError, with every candidate and its reasons, where nothing fits or a key is not there.
    """
    trace = "".join(f"\n  {candidate}" for candidate in found) or "\n  it has none; `surgery export` builds one"
    if wanted == "auto":
        chosen = {}
        for candidate in found:
            if candidate.fits:
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
