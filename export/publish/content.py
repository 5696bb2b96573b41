"""What a repository is to hold: every file of an artifact, its card and manifest made for that repository."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from surgery.artifact import Manifest, scores, verify_artifact
from surgery.artifact.endpoint import HANDLER, REQUIREMENTS
from surgery.artifact.manifest import MANIFEST, is_elsewhere, json_text, published_index, surgery_file
from surgery.engines.fitting import engine_files
from surgery.engines.record import ENGINES_FOLDER, Engine, check_files, read_engine
from surgery.errors import ArtifactError, InputError, PublishError
from surgery.hub import sha256_of
from surgery.hub.base import local_folder
from surgery.hub.bounded import open_image, parse_json, read_text
from surgery.hub.listing import MODULAR_INDEX, Origin
from surgery.recipe.reading import read_recipe
from surgery.recipe.schema import Publish

from .card import model_card
from .endpoint import endpoint_texts


def published_engines(folder: Path, manifest: Manifest) -> list[tuple[Path, Engine]]:
    """[(folder of an engine, Engine)]; what a build that was cut short left behind is no engine.

    Raises ArtifactError for one that was changed, or built of another artifact.
    """
    found = []
    for path in engine_files(folder):
        engine = read_engine(path.parent)
        if engine.artifact_hash != manifest.hash:
            raise ArtifactError(
                f"{path.parent} was built of another artifact ({engine.artifact_hash[:12]}, this is "
                f"{manifest.hash[:12]}); delete it, or build it again with `surgery export`"
            )
        check_files(path.parent, engine, manifest)
        found.append((path.parent, engine))
    return found


def files_of(folder: Path, engines: Iterable[tuple[Path, Engine]]) -> list[Path]:
    """Paths of all files of the engines, and of what else lies in the folder but is no leftover of a build."""
    owned = [path for place, _ in engines for path in sorted(place.iterdir())]
    others = [path for path in sorted((folder / ENGINES_FOLDER).glob("*")) if path.is_symlink() or path.is_file()]
    return [*owned, *others]


IMAGES_FOLDER = "images"
KEY = "surgery"  # the PNG text chunk


@dataclass(frozen=True)
class Picture:
    """A PNG that `surgery generate` drew of this artifact: rows of prompts, columns of seeds, base beside patched."""

    path: str  # images/x.png
    prompts: list
    seeds: list
    columns: list
    sampling: dict


def read_pictures(folder: str | Path, artifact_hash: str) -> list[Picture]:
    """The Pictures of an artifact folder, by name; ArtifactError for one that was not drawn of this very artifact."""
    pictures = []
    for path in sorted(Path(folder, IMAGES_FOLDER).glob("*")) if Path(folder, IMAGES_FOLDER).is_dir() else []:
        if path.is_dir() and path.with_suffix(".png").is_file():  # each image of that sheet alone, as it was drawn
            continue
        record = _record(path)
        if record.get("artifact") != artifact_hash:
            whose = f"of another artifact ({str(record['artifact'])[:12]})" if record.get("artifact") else "elsewhere"
            raise ArtifactError(
                f"{path} was drawn {whose}, so it may not stand on this artifact's card: take it away, or draw it with "
                f"`surgery generate {folder} PROMPT --out {path}`"
            )
        kinds = {"prompts": list, "seeds": list, "columns": list, "sampling": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
        if wrong:
            raise ArtifactError(f"{path} does not say its {wrong[0]}; draw it again with `surgery generate`")
        pictures.append(Picture(f"{IMAGES_FOLDER}/{path.name}", *(record[key] for key in kinds)))
    return pictures


def _record(path):
    try:
        with open_image(path) as image:
            record = parse_json(image.info.get(KEY, "{}"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
EVAL_RESULTS = ".eval_results/"
_ADDED_LATER = ("README.md", scores.SCORES, EVAL_RESULTS, "images/", "engines/", HANDLER, REQUIREMENTS)


@dataclass(frozen=True)
class RepositoryFile:
    """One file of the repository: its bytes here, in memory or on disk, or only where else on the Hub they are."""

    path: str
    size: int
    sha256: str
    data: bytes | None = None
    local: Path | None = None
    origin: Origin | None = None  # of weights, and of what else is the base's own
    weights: bool = False

    @property
    def is_here(self) -> bool:
        """Whether its bytes are here."""
        return self.data is not None or self.local is not None

    def read(self) -> bytes:
        """Its bytes, where they are here."""
        if self.data is not None:
            return self.data
        assert self.local is not None
        return self.local.read_bytes()

    @cached_property
    def git_blob(self) -> str:
        """The id that git gives the file's content, by which the Hub lists what is not in large file storage."""
        from huggingface_hub.utils.sha import git_hash

        return git_hash(self.read())


@dataclass(frozen=True)
class Draft:
    """An artifact folder, found whole and unaltered, with what its card needs, for whatever repository it goes to."""

    folder: Path
    manifest: Manifest
    publish: Publish
    purpose: tuple[str, ...]  # the metrics that the recipe names as what the surgery is for
    recipe: str
    scores: Any
    pictures: tuple[Picture, ...]
    engines: tuple  # of (folder, Engine)


@dataclass(frozen=True)
class Content:
    """All that the repository is to hold, by path."""

    manifest: Manifest
    items: dict[str, RepositoryFile]


def read_draft(folder: str | Path) -> Draft:
    """The Draft of an artifact folder, after checking all of it, weights included, against its manifest.

    Raises InputError for what is no folder, ArtifactError for files that are not the manifest's, a recipe or card that
    was edited, and scores or pictures of another artifact.
    """
    place = local_folder(folder)
    if place is None:
        raise InputError(f"there is no folder {folder}; `surgery apply` writes one")
    manifest = verify_artifact(place, weights=True)
    _check_text(place, manifest)
    recipe = read_recipe(place / "recipe.yaml").recipe
    return Draft(
        folder=place,
        manifest=manifest,
        publish=recipe.publish,
        purpose=tuple(recipe.validation.purpose) if recipe.validation else (),
        recipe=read_text(place / "recipe.yaml"),
        scores=scores.read_scores(place, manifest.hash),
        pictures=tuple(read_pictures(place, manifest.hash)),
        engines=tuple(published_engines(place, manifest)),
    )


def _check_text(folder, manifest):
    for path in (HANDLER, REQUIREMENTS):
        if (folder / path).is_file() and _differs(folder / path, manifest.files.get(path)):
            raise ArtifactError(f"{folder / path} was edited, and each push writes it anew: take it away")
    recipe, card = folder / "recipe.yaml", folder / "README.md"
    if not recipe.is_file() or _differs(recipe, manifest.files.get("recipe.yaml")):
        raise ArtifactError(
            f"{recipe} is not the recipe that this artifact was made with; put that back, or apply the new one"
        )
    if card.is_file() and _differs(card, manifest.files.get("README.md")):
        raise ArtifactError(
            f"{card} was edited, and the card that is published is written anew from manifest, recipe and scores: put "
            "your words into the recipe's `summary` and apply it again, or delete that README.md"
        )


def _differs(path, file):
    return file is not None and sha256_of(path) != file.sha256


def make_content(
    draft: Draft,
    repo: str | None,
    weights: Literal["copy", "thin"],
    licensing: Any,
    also: Iterable[RepositoryFile] = (),
    handler: bool = False,
) -> Content:
    """The Content of a Draft for OWNER/NAME; weights: "copy" or "thin". also: further RepositoryFiles, such
    as licence texts. handler: with what Hugging Face Inference Endpoints need, where it can run there.

    Raises PublishError where a thin publication is asked for and some weights are nowhere else, or where a file holds
    what looks like an access token.
    """
    manifest = draft.manifest.model_copy(update={"weights": weights})
    files, items = _listed(draft), {}
    for path, file in files.items():
        if weights == "thin" and is_elsewhere(file):
            continue
        if weights == "thin" and file.weights:
            raise _is_nowhere_else(path, file)
        local = draft.folder / path
        items[path] = RepositoryFile(
            path=path,
            size=file.size,
            sha256=file.sha256,
            local=local if local.is_file() else None,
            origin=file.origin if file.weights or is_elsewhere(file) else None,
            weights=file.weights,
        )
    endpoint = endpoint_texts(manifest) if handler else {}
    card = model_card(
        manifest,
        draft.publish,
        draft.recipe,
        repo=repo,
        scores=draft.scores,
        purpose=draft.purpose,
        pictures=draft.pictures,
        engines=[engine for _, engine in draft.engines],
        licensing=licensing,
        endpoint=bool(endpoint),
    )
    made = [item_of(path, text.encode("utf-8")) for path, text in {"README.md": card, **endpoint}.items()]
    if manifest.index is not None:
        made.append(item_of(MODULAR_INDEX, json_text(published_index(manifest.index, repo)).encode("utf-8")))
    for item in (*made, *also):
        files[item.path] = surgery_file(item.size, item.sha256)
    manifest = manifest.model_copy(update={"files": dict(sorted(files.items()))})
    items |= {
        item.path: item
        for item in (*made, item_of(MANIFEST, json_text(manifest.model_dump(mode="json")).encode("utf-8")), *also)
    }
    check_secrets(items.values())
    return Content(manifest, dict(sorted(items.items())))


def _listed(draft):
    """{path: ManifestFile} of the manifest's files but the card, and of what was added to the folder later."""
    files = {path: file for path, file in draft.manifest.files.items() if not path.startswith(_ADDED_LATER)}
    added = [draft.folder / scores.SCORES] if draft.scores else []
    added += [draft.folder / picture.path for picture in draft.pictures]
    added += files_of(draft.folder, draft.engines)
    for path in added:
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(draft.folder)):
            raise ArtifactError(
                f"{path} is a link to a file outside the artifact, which is not published; take it away"
            )
        files[path.relative_to(draft.folder).as_posix()] = surgery_file(path.stat().st_size, sha256_of(path))
    return files


def item_of(path: str, data: bytes) -> RepositoryFile:
    """An RepositoryFile of bytes in memory."""
    return RepositoryFile(path, len(data), hashlib.sha256(data).hexdigest(), data=data)


def _is_nowhere_else(path, file):
    why = (
        "lies in a folder on this machine" if not file.origin.revision else f"is {file.origin.kind}, not the base's own"
    )
    return PublishError(
        f"--weights thin needs every weight file on the Hub already, but {path} {why}; use --weights copy"
    )


def check_secrets(items: Iterable[RepositoryFile]) -> None:
    """Raise PublishError for a file that holds what looks like an access token."""
    from huggingface_hub import get_token

    token = (get_token() or "").encode()
    for item in items:
        if item.weights or item.size > 20e6 or not item.is_here:
            continue
        data = item.read()
        if _TOKEN.search(data) or (len(token) > 8 and token in data):
            raise PublishError(f"{item.path} holds what looks like an access token, so nothing was sent; take it out")
