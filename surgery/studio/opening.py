"""From what the command line names, a recipe, an artifact or a pipeline, to a model that the page draws with."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.artifact.fetch import model_folder
from surgery.artifact.manifest import MANIFEST, read_manifest
from surgery.artifact.scores import Scores, read_scores
from surgery.console import quiet_bars
from surgery.errors import ArtifactError, BaseError, InputError, RecipeError
from surgery.hub.base import HubBase, local_folder

if TYPE_CHECKING:
    import torch

    from surgery.recipe.plan import Planned

_PLAIN = [{"replace": "cross-attention", "layers": ["all"], "with": {"operator": "pladis"}}]  # the papers' defaults


@dataclass(frozen=True)
class Opened:
    """A model that is ready to draw, and what the page begins with.

    name: as the page calls it. base: the `base` of a recipe for it, relative to nothing; {} where it is not known.
    operations: as in a recipe. sampling: as its manifest records it, without guidance, which is beside it.
    rest: the other keys of its recipe. note: what a recipe of the page lacks, in words.
    """

    name: str
    pipeline: Any
    base: Mapping[str, Any]
    operations: list[dict[str, Any]]
    sampling: Mapping[str, Any]
    guidance: dict[str, Any] | None = None
    hash: str | None = None
    scores: Scores | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def recipe_named(model: str) -> Path | None:
    """The file of a recipe that `model` is, by its path or as one that ships; None for a folder or a repository.

    InputError for what is none of them.
    """
    from surgery.recipe.reading import find_recipe, shipped_recipe

    if model.endswith((".yaml", ".yml")):
        return find_recipe(model)
    if local_folder(model) is None and "/" not in model:
        return shipped_recipe(model)  # which says what was probably meant
    return None


def open_for_page(
    model: str,
    revision: str | None = None,
    out: str | Path = "out/studio",
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
) -> Opened:
    """The Opened of a recipe, an artifact or a plain pipeline, in a folder or on the Hub.

    A recipe is applied first, into `out`, once. A plain pipeline begins with the papers' PLADIS.
    Raises RecipeError, InputError, BaseError, ArtifactError and UnsupportedModelError as `surgery apply` and `load`.
    """
    from surgery.runtime.load import open_model

    recipe, planned = recipe_named(model), None
    if recipe:
        if revision:
            raise InputError("--revision is of a Hub repository; a recipe names its base's itself")
        planned = _planned(recipe)
        model = str(_applied(planned, out))
    quiet_bars()
    pipeline, recorded, found = open_model(model, revision, device, dtype=dtype)
    sampling = {key: value for key, value in recorded.items() if key != "guidance"}
    name = Path(model).name if local_folder(model) else model
    if found is None:
        return _without_manifest(pipeline, name, model, revision, sampling)
    folder = model_folder(model, revision)
    manifest = read_manifest(folder)
    data = _recipe_data(planned, manifest, model, revision)
    base, note = _base(planned, manifest, data, Path(model))
    operations = [dict(one) for one in data.get("operations", ())] or _operations(manifest.operations)
    kept = ("summary", "validate", "publish")
    return Opened(
        name=manifest.name if planned else name,
        pipeline=pipeline,
        base=base,
        operations=operations,
        sampling=sampling,
        guidance=recorded.get("guidance"),
        hash=found,
        scores=_scores(model, revision, found),
        rest={key: data[key] for key in kept if data.get(key) and not _names_a_file(data[key])},
        note=note,
    )


def _planned(recipe: Path) -> "Planned":
    from surgery.recipe.plan import make_plan

    return make_plan(recipe)


def _applied(planned, out):
    from surgery.applying import kept_artifact

    return kept_artifact(planned, Path(out)).absolute()


def _without_manifest(pipeline, name, model, revision, sampling):
    from surgery.models.patching import operations_of

    patched = operations_of(pipeline)
    if patched:
        note = f"{name} has no {MANIFEST}, so what it was made of is not known, and a recipe cannot name it"
        return Opened(name, pipeline, {}, _operations(patched), sampling, note=note)
    folder = local_folder(model)
    base = {"pipeline": str(folder.absolute()) if folder else model}
    if not folder:
        base["revision"] = HubBase(model, revision).commit
    return Opened(name, pipeline, base, copy.deepcopy(_PLAIN), sampling)


def _operations(patched) -> list[dict[str, Any]]:
    """Operations of a manifest or a live pipeline as a recipe has them, the dense ones under additions left out."""
    found = []
    for one in patched:
        setting = dict(one) if isinstance(one, Mapping) else one.model_dump()
        setting.pop("additions", None)
        bare = setting["operator"] == "pladis" and setting["scale"] == 0.0
        if bare and len(patched) > 1:
            continue
        layers, schedule = setting.pop("layers"), setting.pop("schedule", None)
        replace = setting.pop("replace", None) or "cross-attention"
        found.append({"replace": replace, "layers": layers, "with": setting})
        if schedule:
            found[-1]["schedule"] = schedule
    return found


def _recipe_data(planned, manifest, model, revision) -> dict[str, Any]:
    """What the recipe of an artifact says, as plain data; {} where it has none, or another than it was made by."""
    from surgery.recipe.reading import read_recipe

    if planned:
        return copy.deepcopy(planned.recipe_file.document.data)
    path = _beside(model, revision, "recipe.yaml")
    if path is None:
        return {}
    try:
        recipe = read_recipe(path)
    except RecipeError:
        return {}
    return recipe.document.data if recipe.hash == manifest.recipe_hash else {}


def _beside(model, revision, name) -> Path | None:
    """A file of an artifact that loading does not need; None where there is none."""
    folder = local_folder(model)
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    base = HubBase(model, revision)
    return base.path(name) if name in base.files else None


def _scores(model, revision, found):
    try:
        path = _beside(model, revision, "scores.json")
        return read_scores(path.parent, found) if path else None
    except (ArtifactError, BaseError):
        return None  # the page is not on them; `surgery verify` says what is wrong with them


def _base(planned, manifest, data, folder) -> tuple[dict[str, Any], str]:
    """(the base of a recipe with absolute folders, what is wrong with that, in words)."""
    said = dict(data.get("base") or {})
    if not said:
        said = {key: manifest.base[key] for key in ("pipeline", "variant") if manifest.base.get(key)}
    if said.get("pipeline") and manifest.base.get("revision"):
        said["revision"] = manifest.base["revision"]  # the very commit that is on the screen
    places = [planned.recipe_file.folder] if planned else [folder, Path.cwd(), _shipped()]
    names = said.get("pipeline") or said.get("config") or said.get("single_file")
    name = names["file"] if isinstance(names, Mapping) else names
    local = isinstance(name, str) and (name.startswith((".", "/", "~")) or manifest.base.get("revision") is None)
    if not local:
        return said, ""
    for place in places:
        found = place / Path(str(name)).expanduser()
        if planned or (found.is_dir() and _is_base_of(found, manifest)):
            return _absolute(said, place), ""
    return said, f"its base {name} is no folder of this machine: write this where that lies"


def _is_base_of(folder: Path, manifest) -> bool:
    """Whether a folder holds the files that an artifact took from its base, by their sizes."""
    taken = {file.origin.path: file.size for file in manifest.files.values() if file.origin.kind == "base"}
    taken = {path: size for path, size in taken.items() if path}
    return not (folder / MANIFEST).exists() and all(
        (folder / path).is_file() and (folder / path).stat().st_size == size for path, size in taken.items()
    )


def _shipped() -> Path:
    from surgery.recipe.reading import shipped_recipes

    return next(iter(shipped_recipes().values())).parent


def _absolute(base, folder):
    """A recipe's base with what lies on this machine by its absolute path."""

    def placed(text):
        path = folder / Path(text).expanduser()
        return os.path.abspath(path) if path.exists() else text

    def of(value, key=None):
        if isinstance(value, Mapping):
            own = {name: of(one, name) for name, one in value.items()}
            return {**own, "file": value["file"]} if value.get("repo") and "file" in value else own
        if isinstance(value, list):
            return [of(one, key) for one in value]
        return placed(value) if isinstance(value, str) and key in _PLACES else value

    return {key: of(value, key) for key, value in base.items()}


_PLACES = ("pipeline", "single_file", "config", "file", "repo")


def _names_a_file(value):
    """Whether a `validate` names files from its recipe's folder on, which a recipe elsewhere would not find."""
    texts = [value.get(name) for name in ("prompts", "reference")] if isinstance(value, Mapping) else []
    return any(isinstance(text, str) and ("/" in text or "." in text) for text in texts)
