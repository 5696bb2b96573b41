"""`surgery.json`: what an artifact is made of, the hash that names it, and whether a folder still is that artifact."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_serializer, model_validator

from surgery.errors import ArtifactError
from surgery.guidance.methods import guidance_of
from surgery.hub.base import read_json_file, sha256_of, sha256_of_all
from surgery.hub.bounded import parse_json, read_text
from surgery.hub.foreign import damage_of
from surgery.hub.listing import INDEX, MODULAR_INDEX, SOURCE, Origin, components_of, specs_of
from surgery.models.denoisers import further_of, own_operations
from surgery.models.parts import Name
from surgery.nn.operators import HYPERPARAMETERS, OPERATIONS
from surgery.recipe.schema import Sampling

from .endpoint import HANDLER, REQUIREMENTS

MANIFEST = "surgery.json"
SCHEMA_VERSION = 1
# Text about the artifact, and what later stages add to it: none of it changes an image.
NOT_HASHED = ("README.md", "recipe.yaml", "scores.json", ".eval_results/", "images/", "engines/")
NOT_HASHED += ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", HANDLER, REQUIREMENTS)
_TEXTS = (".md", ".png", ".jpg", ".jpeg", ".webp", ".pdf", ".html")  # which nothing loads


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ManifestFile(_Part):
    """One file of the artifact."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    weights: bool
    origin: Origin


def surgery_file(size: int, sha256: str) -> ManifestFile:
    """The ManifestFile of a file that this package made, such as text, scores or an engine: no weights of a base."""
    return ManifestFile(size=size, sha256=sha256, weights=False, origin=Origin("surgery"))


# Those that came later stand last, as in each operator's own order.
_HYPERPARAMETERS = sorted(
    dict.fromkeys(name for operator in OPERATIONS.values() for name in operator.defaults),
    key=lambda name: HYPERPARAMETERS[name].later,
)
_setting_fields: dict[str, Any] = {
    "operator": (Literal[tuple(OPERATIONS)], ...),
    **{
        name: (float, ...)
        if all(name in operator.defaults for operator in OPERATIONS.values())
        else (float | None, None)
        for name in _HYPERPARAMETERS
    },
}
_Setting = create_model(
    "Setting",
    __base__=_Part,
    **_setting_fields,
)


class Operation(_Setting):
    """One operator with its own hyperparameters, what else it has of these, and the modules that carry it."""

    if TYPE_CHECKING:
        operator: str
    unit: str | None = None
    replace: Literal["self-attention"] | None = None
    schedule: dict[str, list[int | float | None]] | None = None
    layers: list[str]

    @model_serializer(mode="wrap")
    def _only_what_it_has(self, handler):
        # What an operator does not have is not written, so that nothing older than it changes its hash.
        return {key: value for key, value in handler(self).items() if value is not None}


class PatchedFiles(_Part):
    """Where in an artifact the code of a patched denoiser and its buffers lie."""

    code: str
    buffers: str


Component = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


class Manifest(_Part):
    """The content of surgery.json. `files` holds every file but surgery.json itself.

    component, code, buffers: of the patched denoiser; further: {component: its PatchedFiles} of another, of a pipeline
    that has two. operations, skipped: of all, with paths as surgery/models/denoisers.py has them.

    weights: "thin" where the base's own files, weights and others, are named but need not lie here: loading fetches
    them from their origin.
    index: of a modular pipeline what its index says, null standing for the repository that it is published in; that
    file itself names the repository, which is not known before.
    """

    schema_version: int
    hash: str
    name: Name
    summary: str
    plan_hash: str
    recipe_hash: str
    base: dict
    component: Component
    code: str
    buffers: str
    further: dict[Component, PatchedFiles] = {}
    operations: list[Operation]
    skipped: dict[str, str]
    sampling: dict
    files: dict[str, ManifestFile]
    versions: dict[str, str]
    weights: Literal["copy", "thin"] = "copy"
    index: dict | None = None

    @model_validator(mode="after")
    def _is_whole(self):
        for name in (*self.written, self.index_name):
            if name not in self.files or self.files[name].weights:
                raise ValueError(f"its files lack {name}")
        if any(name.endswith(".py") and name not in self.written for name in self.needed):
            raise ValueError("its files name other code than its own")
        if known := {further_of(path) for one in self.operations for path in one.layers} - {None, *self.patched}:
            raise ValueError(f"its operations name a {sorted(known)[0]}, which it has not")  # pyright: ignore[reportArgumentType] no None
        if not any(file.weights for file in self.files.values()):
            raise ValueError("its files name no weights")
        if not isinstance(self.base.get("pipeline"), str):
            raise ValueError("its base names no pipeline")
        if not all(isinstance(value, str | None) for value in self.base.values()):
            raise ValueError("its base holds what is no text")
        Sampling.model_validate({key: value for key, value in self.sampling.items() if key != "guidance"})
        if "guidance" in self.sampling:
            guidance_of(self.sampling["guidance"])
        return self

    @model_serializer(mode="wrap")
    def _without_the_usual(self, handler):
        # An artifact that holds its weights is written as before there were thin ones, and modular pipelines.
        usual = (("weights", "copy"), ("index", None), ("further", {}))
        return {key: value for key, value in handler(self).items() if (key, value) not in usual}

    @property
    def patched(self) -> dict[str, PatchedFiles]:
        """{component: its PatchedFiles} of every patched denoiser."""
        return {self.component: PatchedFiles(code=self.code, buffers=self.buffers), **self.further}

    @property
    def written(self) -> set[str]:
        """The files of the patched denoisers that the base does not have, and their configs."""
        configs = {f"{component}/config.json" for component in self.patched}
        return configs.union(*((files.code, files.buffers) for files in self.patched.values()))

    def operations_of(self, component: str) -> list[dict[str, Any]]:
        """The operations that the config of a denoiser has."""
        return own_operations([operation.model_dump() for operation in self.operations], component)

    @property
    def index_name(self) -> str:
        """The file that says what pipeline it is."""
        return INDEX if self.index is None else MODULAR_INDEX

    @property
    def needed(self) -> dict[str, ManifestFile]:
        """{path: ManifestFile} of what loading needs: all but the text, pictures, scores and engines."""
        return {path: file for path, file in self.files.items() if not path.startswith(NOT_HASHED)}

    def computed_hash(self) -> str:
        """The artifact's hash: over the path and sha256 of every file that an image depends on, and how to use them."""
        hashed: dict[str, Any] = {path: file.sha256 for path, file in self.needed.items() if path != MODULAR_INDEX}
        hashed["use"] = {
            "component": self.component,
            "variant": self.weight_variant(),
            "code": self.code,
            "buffers": self.buffers,
            "operations": [operation.model_dump() for operation in self.operations],
            "sampling": self.sampling,
            **({} if self.index is None else {"index": self.index}),
            **({"further": {name: files.model_dump() for name, files in self.further.items()}} if self.further else {}),
        }
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def engines_digest(self) -> str | None:
        """A sha256 over the engines' files, which the hash does not cover: they may be built later; None without."""
        listed = {path: file.sha256 for path, file in self.files.items() if path.startswith("engines/")}
        return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest() if listed else None

    def weight_variant(self) -> str | None:
        """The `variant` that the pipeline's weights are loaded with, or None."""
        return self.base.get("variant")


def read_manifest(folder: str | Path) -> Manifest:
    """The Manifest of an artifact folder; ArtifactError where it is missing, damaged, or of a newer schema."""
    path = Path(folder) / MANIFEST
    try:
        text = read_text(path)
    except FileNotFoundError:
        problem = f"{folder} is no surgery artifact: it has no {MANIFEST}"
        raise ArtifactError(f"{problem}; `surgery apply` writes one") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; build or fetch the artifact again") from error
    return parse_manifest(text, path)


def parse_manifest(text: str, path: str | Path = MANIFEST) -> Manifest:
    """The Manifest in the text of a surgery.json; ArtifactError naming `path` as in read_manifest."""
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ArtifactError(f"{path} cannot be read: {error}; build or fetch the artifact again") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {version!r}; this version of pladis-surgery reads {SCHEMA_VERSION}. "
            "If it is newer, update: pip install -U pladis-surgery"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"{path} is damaged at {key}: {first['msg'].lower()}; build or fetch the artifact again"
        ) from error
    unsafe = [name for name in manifest.files if not _is_inside(name)]
    if unsafe:
        raise ArtifactError(f"{path} names a file outside its folder, {unsafe[0]!r}; do not load it")
    if manifest.hash != manifest.computed_hash():
        raise ArtifactError(f"{path} was edited: its hash does not fit its content; build or fetch it again")
    return manifest


def verify_artifact(folder: str | Path, weights: bool = False) -> Manifest:
    """The Manifest of an artifact folder whose files are what it says; ArtifactError naming what is not.

    Sizes of all files, the headers of weights, and sha256 of code, buffers and configs, always; sha256 of the weights
    with `weights=True`.
    README.md, recipe.yaml, scores.json, images/ and engines/ may change after the artifact was written. The base's own
    files in a thin artifact may lie elsewhere; those that are there are checked.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    checked = dict(manifest.needed)
    if manifest.weights == "thin":
        checked = {path: file for path, file in checked.items() if (folder / path).exists() or not is_elsewhere(file)}
    for path, file in checked.items():
        on_disk = folder / path
        if not on_disk.is_file():
            raise ArtifactError(f"{on_disk} is missing; build or fetch the artifact again")
        size = on_disk.stat().st_size
        if size != file.size:
            raise ArtifactError(
                f"{on_disk} has {size} bytes, the manifest says {file.size}: cut short or altered; "
                "build or fetch the artifact again"
            )
    hashed = [path for path, file in checked.items() if weights or not file.weights]
    for path, actual in sha256_of_all(folder, hashed, "verifying").items():
        if actual != checked[path].sha256:
            raise ArtifactError(
                f"{folder / path} is not the file that was written: its sha256 differs from the manifest's "
                f"({checked[path].sha256[:12]}...); build or fetch the artifact again"
            )
    for path in checked:
        if path.endswith(".safetensors") and (problem := damage_of(folder / path)):
            raise ArtifactError(f"{folder / path} is damaged: {problem}; build or fetch the artifact again")
    if manifest.index is not None and (problem := index_problem(manifest, read_json_file(folder / MODULAR_INDEX))):
        raise ArtifactError(f"{folder}: {problem}; build or fetch the artifact again")
    return manifest


def unlisted_files(manifest: Manifest, paths: Iterable[str]) -> list[str]:
    """Of an artifact's paths those that surgery.json does not list and diffusers or transformers would read.

    A second index swaps the weights, an adapter_config.json loads an adapter: what is not listed is never loaded.
    """
    folders = {path.rpartition("/")[0] for path in manifest.needed} - {""}
    return [
        path
        for path in sorted(set(paths) - {MANIFEST, *manifest.files})
        if not path.startswith(NOT_HASHED)
        and not path.rpartition("/")[2].startswith(".")
        and (path.endswith(".json") or any(path.startswith(f"{folder}/") for folder in folders))
        and not path.endswith(_TEXTS)
    ]


def published_index(index: Mapping, repo: str | None) -> dict[str, Any]:
    """A modular pipeline's index with `repo` in the places where a manifest has null for it."""
    specs = {name: {**spec} for name, spec in specs_of(index).items()}
    for spec in specs.values():
        if spec.get(SOURCE) is None:
            spec[SOURCE] = repo
    return {name: [*value[:2], specs[name]] if name in specs else value for name, value in index.items()}


def index_problem(manifest: Manifest, index: Mapping, repo: str | None = None) -> str | None:
    """What a modular artifact's index says that its manifest does not; None of any other, or if nothing is.

    repo: where the artifact is, a folder's being None: its index may have been written for any one repository.
    """
    if manifest.index is None:
        return None
    named = {spec.get(SOURCE) for name, spec in specs_of(index).items() if name in manifest.patched}
    places = {repo} if repo else named | {None}
    if any(index == published_index(manifest.index, place) for place in places):
        return None
    return f"{MODULAR_INDEX} has components come from elsewhere than {MANIFEST} says"


def foreign_code(index: Mapping, components: Collection[str]) -> str | None:
    """What in a pipeline's index would have code of the repository run besides the patched denoisers' own, or None."""
    if not isinstance(index.get("_class_name"), str):
        return "names a pipeline class of its own"
    own = [index[name] for name in components if isinstance(index.get(name), list)]
    if "auto_map" in index and index["auto_map"] not in [{"AutoModel": ".".join(map(str, one[:2]))} for one in own]:
        return f"has AutoModel run other code than that of {' and '.join(components)}"
    hints = {name: spec.get("type_hint") for name, spec in specs_of(index).items()}
    libraries = [(name, library) for name, (library, _) in components_of(index).items()]
    libraries += [(name, hint[0]) for name, hint in hints.items() if isinstance(hint, list) and hint]
    for name, library in libraries:
        if not isinstance(library, str):
            continue
        own = name in components and library.startswith("modeling_pladis_")
        if library not in ("diffusers", "transformers") and not own and not _is_pipeline_module(library):
            return f"takes {name} from {library!r}, which is neither diffusers nor transformers"
    return None


def _is_pipeline_module(name):
    """Whether diffusers itself has a module of that name beside its pipelines, such as stable_diffusion."""
    return isinstance(name, str) and name.isidentifier() and find_spec(f"diffusers.pipelines.{name}") is not None


def is_elsewhere(file: ManifestFile) -> bool:
    """Whether a file of a manifest can be had, byte for byte, from the repository that it comes from."""
    return file.origin.kind in ("base", "component") and file.origin.revision is not None


def list_files(manifest: Manifest, folder: str | Path, paths: Iterable[str]) -> None:
    """Write a Manifest to its folder with these files, made later, in its list, and without engines that are gone."""
    folder = Path(folder)
    kept = {
        path: file
        for path, file in manifest.files.items()
        if not path.startswith("engines/") or (folder / path).is_file()
    }
    kept |= {path: surgery_file((folder / path).stat().st_size, sha256_of(folder / path)) for path in paths}
    manifest = manifest.model_copy(update={"files": dict(sorted(kept.items()))})
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def json_text(data: object) -> str:
    """The text of a JSON file of an artifact, as it is written to disk and sent to the Hub."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def write_json(path: str | Path, data: object) -> None:
    """Write JSON to a temporary name beside `path`, then rename it there."""
    replace_file(path, json_text(data).encode("utf-8"))


def replace_file(path: str | Path, data: bytes) -> None:
    """Write bytes to a temporary name beside `path`, then rename it there; nothing is left of what fails."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _is_inside(name):
    parts = name.split("/")
    return not name.startswith("/") and "\\" not in name and ".." not in parts and "" not in parts
