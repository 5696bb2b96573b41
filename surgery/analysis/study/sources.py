"""Where a study's images come from: validations, and runs of several rows, of one model or of several."""

import csv
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from surgery.artifact import read_manifest
from surgery.artifact.manifest import MANIFEST
from surgery.artifact.scores import SCORES
from surgery.errors import InputError
from surgery.hub import sha256_of
from surgery.hub.bounded import read_json, read_text
from surgery.validate.session import work_folder

ROWS = "rows.json"  # what a run of several rows writes
MOST_AT_ONCE = 3  # images beside each other


@dataclass(frozen=True)
class Exhibit:
    """Images of one prompt and seed that raters see at once: files by side, RGB, of one size. model: "" for the one."""

    prompt: str
    seed: int
    images: Mapping[str, Path]
    model: str = ""


@dataclass
class Source:
    """One model's images: files by side of each prompt and seed. origin: its hash, or where they lie."""

    model: str
    origin: str
    sides: list[str]
    images: dict[tuple[str, int], dict[str, Path]] = field(default_factory=dict)


def read_sources(folders: Iterable[str | Path], sides: Sequence[str] | None = None) -> list[Source]:
    """The Sources in folders: artifacts that were validated, folders of reports, and runs with a rows.json.

    A validation has the sides "base" and "patched". Validations whose base images are the same file for file are one
    model's, and their patched sides are then called by the operator of the artifact, or by their folder. A run of rows
    has a side for each; where it holds several models, each row without a patch begins one, and its sides are "base"
    and the operators. sides: those to show, in this order. Raises InputError where a folder holds neither, its files
    are damaged, a side is not there, or models have different sides.
    """
    found = []
    for folder in map(Path, folders):
        found += _of_rows(folder) if (folder / ROWS).is_file() else [_of_validation(folder)]
    found = _merged(found)
    for number, source in enumerate(found):
        if len(found) > 1 and [other.model for other in found].count(source.model) > 1:
            source.model = f"{source.model} ({number + 1})"
        source.sides = _chosen(source, sides)
        if source.sides != found[0].sides:
            raise InputError(
                f"{found[0].model} has the sides {', '.join(found[0].sides)}, and {source.model} "
                f"{', '.join(source.sides)}, which cannot be pooled; name those that both have: --sides"
            )
    return found


def choose_exhibits(sources: Sequence[Source], count: int, seed: int = 0, pairwise: bool = False) -> list[Exhibit]:
    """`count` Exhibits, dealt evenly to the models, of each at most one of a prompt.

    pairwise: two of the sides at a time, each two of them as often; else all sides at once.
    """
    if count < 1:
        raise InputError(f"--pairs must be at least 1, not {count}")
    sides = sources[0].sides
    if len(sides) > MOST_AT_ONCE and not pairwise:
        raise InputError(
            f"{len(sides)} sides cannot be shown at once: {', '.join(sides)}; name two or three of them by --sides, or "
            "show two at a time by --pairwise"
        )
    groups = list(combinations(sides, 2)) if pairwise else [tuple(sides)]
    chosen = []
    for number, source in enumerate(sources):
        wanted = count // len(sources) + (number < count % len(sources))
        keys = [key for key, images in source.images.items() if set(sides) <= images.keys()]
        chance = random.Random(seed if len(sources) == 1 else f"{seed} {source.model}")
        chance.shuffle(keys)
        for place, (prompt, of_seed) in enumerate(list({key[0]: key for key in keys}.values())[:wanted]):
            images = source.images[prompt, of_seed]
            group = groups[place % len(groups)]
            exhibit = Exhibit(prompt, of_seed, {side: images[side] for side in group}, source.model)
            chosen.append(exhibit)
    return chosen


def _chosen(source, sides):
    wanted = list(sides) if sides else source.sides
    lacking = [side for side in wanted if side not in source.sides]
    if lacking:
        raise InputError(f"--sides: {source.model} has no {lacking[0]}; it has {', '.join(source.sides)}")
    if len(wanted) < 2 or len(set(wanted)) < len(wanted):
        raise InputError(f"a study compares two sides at least, each once, not {', '.join(wanted)}")
    return wanted


def report_of(folder: Path) -> Path:
    """The folder of the report on an artifact, or the one report in a validation folder."""
    of_artifact = (folder / MANIFEST).is_file()
    work = work_folder(folder) if of_artifact else folder
    name = f"report-{read_manifest(folder).hash[:12]}-*" if of_artifact else "report-*"
    reports = sorted(path.parent for path in work.glob(f"{name}/pairs.csv"))
    if of_artifact and len(reports) > 1 and (folder / SCORES).is_file():
        own = sha256_of(folder / SCORES)
        reports = [path for path in reports if (path / SCORES).is_file() and sha256_of(path / SCORES) == own]
    if len(reports) > 1:
        names = ", ".join(map(str, reports))
        raise InputError(f"{work} holds {len(reports)} reports; name one of them: {names}")
    return reports[0] if reports else work


def _of_validation(folder):
    report = report_of(folder)
    table, scores = report / "pairs.csv", report / SCORES
    if not table.is_file() or not scores.is_file():
        raise InputError(
            f"{report} holds no finished validation (pairs.csv, {SCORES}) and no run of rows ({ROWS}); run `surgery "
            "validate` first"
        )
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline="")))
        images = {
            (row["prompt"], int(row["seed"])): {side: report / row[side] for side in ("base", "patched")}
            for row in rows
        }
        origin = read_json(scores)["artifact_hash"]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"{table} or {scores} is damaged ({error}); run `surgery validate` again") from error
    return Source(_name_of(folder), origin, ["base", "patched"], images)


def _name_of(folder):
    """What a folder is called: the artifact's name, not that of its report or of the validation's folder."""
    folder = folder.absolute()
    folder = folder.parent if folder.name.startswith("report-") else folder
    return folder.name.removesuffix("-validation")


def _of_rows(folder):
    path = folder / ROWS
    try:
        data = read_json(path)
        keys = [(job["prompt"], int(job["seed"])) for job in data["jobs"]]
        groups: dict[str, list[Any]] = {}
        current = ""
        for row in data["rows"]:
            names = [other["name"] for other in data["rows"]]
            if row["facts"]["operations"] is None:
                current = row["name"]
            of_base = row["against"] if row["against"] in names else current
            groups.setdefault(row["name"] if row["facts"]["operations"] is None else of_base, []).append(row)
        several = len(groups) > 1
        found = []
        for rows in groups.values():
            labels = [_operators(row["facts"]["operations"]) if several else row["name"] for row in rows]
            labels = labels if len(set(labels)) == len(labels) else [row["name"] for row in rows]
            images = {key: {} for key in keys}
            for label, row in zip(labels, rows, strict=True):
                for key, file in zip(keys, row["images"], strict=True):
                    images[key][label] = folder / file
            model = rows[0]["name"] if several else folder.absolute().name
            found.append(Source(model, str(folder), labels, images))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); run its command again") from error
    if not found:
        raise InputError(f"{path} has no rows; run its command again")
    return found


def _operators(operations):
    return "+".join(dict.fromkeys(operation["operator"] for operation in operations)) if operations else "base"


def _merged(sources):
    """The sources, those of validations with the same base images as one, with a side for each."""
    merged: list[Source] = []
    for source in sources:
        home = next((other for other in merged if _share_a_base(other, source)), None)
        if home is None:
            merged.append(source)
            continue
        for own in ([home] if "patched" in home.sides else []) + [source]:
            _rename(own, "patched", own.model)
        home.sides += [side for side in source.sides if side not in home.sides]
        home.origin = f"{home.origin}, {source.origin}"
        for key, images in source.images.items():
            if key in home.images:
                home.images[key] |= {side: path for side, path in images.items() if side != "base"}
    return merged


def _share_a_base(one, other):
    """Whether two sources have the same base, by the bytes of its image of the first prompt that both have."""
    if "patched" not in other.sides or "base" not in one.sides:
        return False
    key = next((key for key in other.images if key in one.images), None)
    if key is None:
        return False
    try:
        return sha256_of(one.images[key]["base"]) == sha256_of(other.images[key]["base"])
    except OSError as error:
        raise InputError(f"the image {error.filename} cannot be read: {error.strerror}; draw it again") from error


def _rename(source, side, name):
    source.sides = [name if own == side else own for own in source.sides]
    for images in source.images.values():
        if side in images:
            images[name] = images.pop(side)
