"""Is a model what it says it is: weights the base's, code a release's, buffers the config's, scores its own."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from surgery.errors import ArtifactError, BaseError, InputError, SurgeryError
from surgery.hub import HubBase, select_files, sha256_of, sha256_of_all
from surgery.hub.base import is_local, local_folder, read_json_file
from surgery.hub.bounded import read_text
from surgery.hub.foreign import damage_of

from . import read_manifest
from .endpoint import HANDLER, REQUIREMENTS, handler_release, requirements_problem
from .fetch import LocalFiles
from .manifest import MANIFEST, Manifest, foreign_code, index_problem, is_elsewhere, unlisted_files
from .scores import SCORES, read_scores

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. status: "ok", "failed", "unknown" (it could not be looked at), or "note"."""

    what: str  # weights, files, code, endpoint, buffers, scores, engines, card
    subject: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks of a model."""

    model: str
    commit: str | None
    hash: str
    checks: tuple[Check, ...]

    @property
    def verified(self) -> bool:
        """Whether nothing failed and nothing was left unknown."""
        return all(check.status in ("ok", "note") for check in self.checks)

    def to_json(self) -> dict:
        """The report as plain data."""
        return {"schema_version": 1, "verified": self.verified, **asdict(self)}


def verify(model: str | Path, revision: str | None = None) -> Report:
    """The Report on an artifact: a folder, or a Hub repository, of which no weights are downloaded.

    Raises InputError for what is no artifact, BaseError for a repository that cannot be listed, ArtifactError for a
    manifest that cannot be read.
    """
    place = _open(model, revision)
    if MANIFEST not in place.files:
        raise InputError(f"{model} is no artifact: it has no {MANIFEST}, so there is nothing to verify it against")
    manifest = read_manifest(place.path(MANIFEST).parent)
    checks = [
        *_weights(manifest, place),
        *_small_files(manifest, place),
        *_completeness(manifest, place),
        *(_code(files.code, place) for files in manifest.patched.values()),
        *_other_code(manifest, place),
        *_endpoint(manifest, place),
        *(_buffers(manifest, component, place) for component in manifest.patched),
        _scores(manifest, place),
        *_engines(manifest, place),
        *_card(manifest, place),
    ]
    return Report(str(model), place.commit, manifest.hash, tuple(checks))


class _Folder(LocalFiles):
    """A folder's files, and the sha256 that they have."""

    def sha256s(self, names: Sequence[str]) -> dict[str, str]:
        return sha256_of_all(self.folder, names, "hashing the weights")


class _Repository(HubBase):
    """A repository's files, and the sha256 that the Hub lists for what is in large file storage."""

    def sha256s(self, names: Sequence[str]) -> dict[str, str | None]:
        return {name: self.files[name].sha256 for name in names}


def _open(model, revision):
    folder = local_folder(model)
    if folder is not None:
        if revision:
            raise InputError(f"{model} is a local folder and has no revision")
        return _Folder(folder)
    place = _Repository(str(model), revision)
    if not place.listed:
        raise BaseError(f"{model} cannot be listed without a connection, and the listing is what is verified")
    return place


def _weights(manifest: Manifest, place):
    """Each weight file against the manifest, and against what the Hub lists for its base at the pinned commit."""
    weights = {path: file for path, file in manifest.files.items() if file.weights}
    here = place.sha256s([path for path in weights if path in place.files])
    listings = {}
    for path, file in weights.items():
        origin = file.origin
        problem = damage_of(place.path(path)) if path in here and isinstance(place, _Folder) else None
        if problem:
            yield Check("weights", path, "failed", f"it is damaged: {problem}")
        elif path not in here and manifest.weights != "thin":
            yield Check("weights", path, "failed", "it is missing")
        elif path in here and here[path] != file.sha256:
            yield Check(
                "weights", path, "failed", f"its sha256 is {str(here[path])[:12]}, the manifest's {file.sha256[:12]}"
            )
        elif origin.kind in ("converted", "fused") or origin.revision is None or is_local(origin.source):  # pyright: ignore[reportArgumentType]
            # On one's own disk that is how it is; from somebody else it is a claim that nothing stands behind.
            status = "note" if isinstance(place, _Folder) else "unknown"
            yield Check("weights", path, status, _not_comparable(origin))
        else:
            key = (origin.source, origin.revision)
            listings[key] = listings.get(key) or _listing(*key)
            yield _against_base(path, file, listings[key], path in here)


def _not_comparable(origin):
    if origin.kind in ("converted", "fused"):
        made = "converted from" if origin.kind == "converted" else "fused with a LoRA from"
        return f"as the manifest has it; {made} {origin.source}, so there are no bytes of a base to compare it with"
    return f"as the manifest has it; its base is a folder ({origin.source}), which nobody else can look at"


def _listing(source, revision):
    try:
        base = HubBase(source, revision)
    except BaseError as error:
        return str(error)
    return base if base.listed else f"{source} cannot be listed without a connection"


def _against_base(path, file, base, is_here):
    where = f"{file.origin.source}@{file.origin.revision[:12]}/{file.origin.path}"
    if isinstance(base, str):
        return Check("weights", path, "unknown", f"{where} could not be looked at: {base}")
    entry = base.files.get(file.origin.path)
    if entry is None:
        return Check("weights", path, "failed", f"there is no {where}")
    if entry.sha256 is None:
        return Check("weights", path, "unknown", f"the Hub lists no sha256 of {where}")
    if entry.sha256 != file.sha256:
        return Check("weights", path, "failed", f"{where} has another sha256, {entry.sha256[:12]}")
    thin = "" if is_here else "not here, "
    return Check("weights", path, "ok", f"{thin}byte for byte {where}")


def _small_files(manifest, place):
    """The configs, the index and the tokenizers against the manifest: one Check if all is well."""
    small = {path: file for path, file in manifest.needed.items() if not file.weights}
    if manifest.weights == "thin":  # the base's own may lie there alone
        small = {path: file for path, file in small.items() if path in place.files or not is_elsewhere(file)}
    wrong = 0
    for path, file in small.items():
        if path not in place.files:
            yield Check("files", path, "failed", "it is missing")
        elif sha256_of(place.path(path)) != file.sha256:
            yield Check("files", path, "failed", "its sha256 is not the manifest's")
        else:
            continue
        wrong += 1
    if not wrong:
        yield Check("files", f"{len(small)} files besides the weights", "ok", "as the manifest has them")


def _code(path, place):
    if path not in place.files:
        return Check("code", path, "failed", "it is missing")
    actual = sha256_of(place.path(path))
    release = release_of(actual)
    if release is None:
        return Check("code", path, "failed", f"sha256 {actual[:12]} is of no release that this version knows")
    return Check("code", path, "ok", f"that of pladis-surgery {release}")


def _buffers(manifest, component, place):
    """The buffers' values of a component against the operations in its config and in the manifest."""
    from safetensors import SafetensorError

    config, shard = f"{component}/config.json", manifest.patched[component].buffers
    absent = [name for name in (shard, config) if name not in place.files]
    if absent:
        return Check("buffers", absent[0], "failed", "it is missing")
    try:
        found = place.path(shard), read_json_file(place.path(config))
        wrong = _buffer_problem(manifest.operations_of(component), component, *found)
    except (BaseError, ArtifactError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        wrong = str(error)
    if wrong:
        return Check("buffers", shard, "failed", wrong)
    return Check("buffers", shard, "ok", "equal to the config, and to the manifest")


def _buffer_problem(operations, component, shard, config):
    import numpy
    from safetensors import safe_open

    from surgery.nn.operators import OPERATIONS

    if json.loads(json.dumps(config.get("pladis"))) != json.loads(json.dumps(operations)):
        return f"{component}/config.json has other operations than the manifest"
    wanted = {
        f"{layer}.pladis_{name}": numpy.float32(operation[name])
        for operation in operations
        for layer in operation["layers"]
        for name in OPERATIONS[operation["operator"]].defaults
        if name in operation  # older ones have not all of them
    }
    with safe_open(shard, framework="numpy") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if unlike := sorted(set(wanted) ^ set(found)):
        return f"{unlike[0]} is in {'the config' if unlike[0] in wanted else 'the shard'} alone"
    for name, value in wanted.items():
        if found[name].dtype != numpy.float32 or found[name].shape != () or found[name] != value:
            return f"{name} holds {found[name]}, the config says {value}"
    return None


def _scores(manifest, place):
    if SCORES not in place.files:
        return Check("scores", SCORES, "note", "not scored")
    try:
        scores = read_scores(place.path(SCORES).parent, manifest.hash)
    except ArtifactError as error:
        return Check("scores", SCORES, "failed", str(error))
    assert scores is not None
    return Check("scores", SCORES, "ok", f"{len(scores.metrics)} metrics, measured on this hash")


def _completeness(manifest, place):
    """What a load needs and the manifest does not have, or has under a false name."""
    taken = [path for path in unlisted_files(manifest, place.files) if not path.endswith(".py")]  # see _other_code
    for path in taken:
        yield Check("files", path, "failed", f"{MANIFEST} does not list it, and diffusers would read it; take it away")
    names = [path for path in (*manifest.files, *place.files) if not path.startswith("engines/")]
    names = set(names) - set(taken)
    for path in sorted(path for path in names - manifest.written if path.endswith(_WEIGHT_SUFFIXES)):
        if path not in manifest.files:
            yield Check("files", path, "note", "not in the manifest, so not loaded by this package and not looked at")
        elif not manifest.files[path].weights:
            yield Check("files", path, "failed", "a weight file that the manifest does not call one")
    try:
        index = read_json_file(place.path(manifest.index_name))
        selected = select_files(manifest.needed, index, manifest.weight_variant())
    except SurgeryError as error:
        yield Check("files", manifest.index_name, "failed", str(error))
        return
    if problem := index_problem(manifest, index, None if isinstance(place, _Folder) else place.name):
        yield Check("files", manifest.index_name, "failed", problem)
    for name, files in selected.items():
        if f"{name}/config.json" in files.config and not files.weights:
            yield Check("files", name, "failed", "the manifest names no weights of this component")


def _endpoint(manifest, place):
    """handler.py and requirements.txt, which Hugging Face Inference Endpoints run and install."""
    for path in (HANDLER, REQUIREMENTS):
        listed = manifest.files.get(path)
        if path not in place.files:
            if listed:
                yield Check("endpoint", path, "note", "it is not here; nothing that this package does needs it")
            continue
        actual = sha256_of(place.path(path))
        if listed is None or actual != listed.sha256:
            why = f"its sha256 is not that of {MANIFEST}" if listed else f"{MANIFEST} does not list it"
            yield Check("endpoint", path, "failed", f"{why}; read it before an endpoint runs it")
        elif path == HANDLER:
            release = handler_release(actual)
            known = f"that of pladis-surgery {release}" if release else "of no release that this version knows"
            yield Check("endpoint", path, "ok" if release else "failed", known)
        else:
            wrong = requirements_problem(read_text(place.path(path)))
            detail = f"it has more than a handler needs: {wrong}" if wrong else f"as {MANIFEST} lists it"
            yield Check("endpoint", path, "failed" if wrong else "ok", detail)


def _other_code(manifest, place):
    """Code in the repository that is not the denoiser's own."""
    code = {path for path in (*manifest.files, *place.files) if path.endswith(".py")}
    for path in sorted(code - manifest.written - {HANDLER}):
        yield Check("code", path, "failed", "no artifact has other code than its own")
    problem = foreign_code(read_json_file(place.path(manifest.index_name)), manifest.patched)
    if problem:
        yield Check("code", manifest.index_name, "failed", problem)


def _engines(manifest, place):
    """The engines' files against surgery.json, which lists them beside what the artifact's hash covers."""
    listed = {path: file for path, file in manifest.files.items() if path.startswith("engines/")}
    here = place.sha256s([path for path in listed if path in place.files])
    wrong = False
    for path, file in listed.items():
        if path not in here:
            yield Check("engines", path, "note", "it is not here, so its engine is not run")
        elif (here[path] or sha256_of(place.path(path))) != file.sha256:
            wrong = True
            yield Check("engines", path, "failed", f"its sha256 is not that of {MANIFEST}; it is not run")
    for path in sorted(path for path in place.files if path.startswith("engines/") and path not in listed):
        yield Check("engines", path, "note", f"{MANIFEST} does not list it, so it is not run")
    if listed and not wrong:
        detail = f"as {MANIFEST} lists them ({manifest.engines_digest()[:12]}); the artifact's hash does not cover them"
        yield Check("engines", f"{len(here)} files", "ok", detail)


def _card(manifest, place):
    listed = manifest.files.get("README.md")
    if listed and "README.md" in place.files and sha256_of(place.path("README.md")) != listed.sha256:
        yield Check("card", "README.md", "note", "edited by hand since it was written from manifest, recipe and scores")


# version -> sha256 of the file that its artifacts carry (surgery/nn joined by surgery/nn/shipped.py). A line is added
# when a version is released, by `python tests/frozen/make.py VERSION`, which also freezes an artifact of it; none is
# ever changed.
RELEASES = {
    "0.1.0": "91d407325169a5d3129eec6cd03ea3456fc69047d33aa5e0e9278ec2f8807551",
    "0.2.0": "e70929fb5524b7be7e1a06fe291a179d1b83e047fe2b65f21febae46510f430e",
    "0.3.0.dev0": "d034511ffa616f8801c3c3f3bf76e9c71b42f0264e1bc99b26d01300a6958924",
}


def release_of(sha256: str) -> str | None:
    """The version whose shipped code has this sha256, this installation's included, or None."""
    from surgery.machine import versions
    from surgery.nn import PATCHED
    from surgery.nn.shipped import shipped_source

    for version, known in RELEASES.items():
        if sha256 == known:
            return version
    if any(sha256 == hashlib.sha256(shipped_source(name).encode("utf-8")).hexdigest() for name in PATCHED):
        return f"{versions()['pladis-surgery']}, as installed here"
    return None
