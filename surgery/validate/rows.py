"""Several rows in one run: recipes that may differ in anything, drawn from the same prompts and seeds.

Operator, layers, hyperparameters, guidance, sampling, scheduler and the base model may all differ. What is alike is
drawn once: the images of a base that rows share, of rows that come to the same. A run that was cut short goes on from
what it holds.

    rows = [
        Row("CFG", "shapes", patched=False),
        Row("PLADIS", "shapes", ("operations.0.with.scale=1.0",)),
        Row("GAG", "shapes", ("operations.0.with={operator: gag}",)),
    ]
    result = score_rows(rows, out="out/rows", prompts="shapes", limit=60, against="CFG")
    result.row("GAG").metric("shape_alignment").difference
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from surgery.applying import kept_artifact
from surgery.artifact.manifest import write_json
from surgery.artifact.scores import Metric
from surgery.errors import InputError, SurgeryError
from surgery.hub.bounded import parse_yaml
from surgery.recipe.plan import Planned, make_plan
from surgery.recipe.schema import Validate

from .jobs import Drawing, DrawnImages, Job, Side, base_side, identity_of, operator_code, patched_side
from .scoring import Scorer, check_metrics, score
from .session import Session, SessionConfig, Settings, open_session, open_settings
from .store import locked

_SCHEMA_VERSION = 1
RESULT = "rows.json"


@dataclass(frozen=True)
class Row:
    """A recipe (a path, or the name of one that ships) with `--set` overrides; patched=False: its untouched base.

    against: the name of the row that this one is compared with, in place of the run's.
    """

    name: str
    recipe: Path | str
    overrides: tuple[str, ...] = ()
    patched: bool = True
    against: str | None = None


@dataclass(frozen=True)
class RowMetric:
    """One metric of one row: `value` with its 95% `interval`.

    paired: the same beside the row that it is compared with, `paired.difference` with `paired.interval`; None where
    there is none, as for the base itself. Of a fidelity metric, which compares with that row's images, `value` is
    `paired.patched`, and a row without one has no such metric.
    """

    value: float
    interval: tuple[float, float]
    measured: Metric
    is_compared: bool

    @property
    def name(self) -> str:
        """ "clip_score"."""
        return self.measured.name

    @property
    def title(self) -> str:
        """ "CLIPScore"."""
        return self.measured.title or self.measured.name

    @property
    def paired(self) -> Metric | None:
        """The Metric with the difference to the row that this one is compared with."""
        return self.measured if self.is_compared else None

    @property
    def difference(self) -> float | None:
        """Its value less that of the row that it is compared with."""
        return self.paired.difference if self.paired else None

    @property
    def verdict(self) -> str:
        """That of `Metric.verdict`; "" for what is not compared."""
        return self.paired.verdict if self.paired else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        named = {key: getattr(self.measured, key) for key in ("name", "title", "kind", "higher_is_better", "n")}
        paired = {**self.paired.model_dump(), "verdict": self.verdict} if self.paired else None
        return {**named, "value": self.value, "interval": list(self.interval), "paired": paired}


@dataclass(frozen=True)
class RowResult:
    """What a Row came to. images: its PNG files, in the order of `RowsResult.jobs`.

    against: the name of the row that it is compared with, "its base", or None. facts: base, operations, sampling,
    evaluations of the denoiser at a step.
    """

    row: Row
    n: int
    metrics: tuple[RowMetric, ...]
    images: tuple[Path, ...]
    against: str | None
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """The row's name."""
        return self.row.name

    def metric(self, name: str) -> RowMetric | None:
        """Its metric of that name, if it has one."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class RowsResult:
    """What a run came to. jobs: prompt and seed of each image, the same for every row; facts: how it was measured."""

    folder: Path
    rows: tuple[RowResult, ...]
    jobs: tuple[Job, ...]
    settings: Settings
    facts: dict[str, Any]

    def row(self, name: str) -> RowResult:
        """The result of the row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the facts of the run, then every row with its metrics and its images, from `folder` on."""
        rows = [
            {
                "name": row.name,
                "row": {**asdict(row.row), "recipe": str(row.row.recipe), "overrides": list(row.row.overrides)},
                "n": row.n,
                "against": row.against,
                "metrics": [metric.to_json() for metric in row.metrics],
                "images": [path.relative_to(self.folder).as_posix() for path in row.images],
                "facts": row.facts,
            }
            for row in self.rows
        ]
        jobs = [{"prompt": job.prompt.text, "category": job.prompt.category, "seed": job.seed} for job in self.jobs]
        return {"schema_version": _SCHEMA_VERSION, **self.facts, "jobs": jobs, "rows": rows}


def score_rows(
    rows: Sequence[Row],
    *,
    out: Path | str,
    prompts: str | Path | Sequence[str] | None = None,
    limit: int | None = None,
    images_per_prompt: int | None = None,
    seed: int | None = None,
    metrics: Sequence[str] | None = None,
    reference: Path | str | None = None,
    drawing: Drawing | None = None,
    checkpoints: Mapping[str, Path | str] | None = None,
    announce: Callable[[int, int, int], object] | None = None,
    against: str | None = None,
    for_sweep: bool = False,
) -> RowsResult:
    """Draw and score every Row on the same prompts and seeds; returns the RowsResult and writes it as rows.json.

    out: the work folder. prompts, limit, images_per_prompt, seed, metrics, reference: what is None is as the first
    row's recipe says under `validate`; a path among them starts at the working folder, one of the recipe's at its
    folder. against: the name of the row that all are compared with; without it each is compared with its own base,
    which is drawn too. for_sweep: as `open_settings` takes it.
    announce: called with (images there, images to draw, batch) before each drawing.
    Raises RecipeError, InputError and what drawing raises; what was drawn and scored by then is kept.
    """
    given = {"prompts": prompts, "limit": limit, "images_per_prompt": images_per_prompt, "seed": seed}
    given |= {"metrics": metrics, "reference": reference}
    _check_names(rows, against)
    said, planned = zip(*(planned_row(row) for row in rows), strict=True)
    recipe_file = planned[0].recipe_file
    settings = open_settings(
        recipe_file.recipe.validation or Validate(),
        {**said[0], **{key: value for key, value in given.items() if value is not None}},
        recipe_file.folder,
        for_sweep,
    )
    for each in planned:
        check_metrics(settings, each.sampling)
    work = Path(out)
    with locked(work):
        opener = partial(SessionConfig, settings=settings, drawing=drawing, checkpoints=checkpoints)
        bases = _Bases(work, opener)
        sides = [bases.sides(at, row, each) for at, (row, each) in enumerate(zip(rows, planned, strict=True))]
        compared = _compared(rows, sides, against)
        wanted = [own for _, own in sides]
        drawn = bases.draw([*wanted, *(side for side, _ in compared if side)], announce)
        scorers = bases.sessions[0].scorers
        results = []
        for row, plan, side, (other, name) in zip(rows, planned, wanted, compared, strict=True):
            found = _measured(scorers, work, drawn, side, other)
            images = tuple(drawn.paths[side.name][job.key] for job in drawn.jobs)
            results.append(RowResult(row, len(images), found, images, name, _facts(row, plan)))
        facts = bases.sessions[0].facts(drawn)
        del facts["schema_version"], facts["artifact_hash"], facts["sampling"]  # each row has its own
        result = RowsResult(work, tuple(results), drawn.jobs, settings, _plain(facts))
        write_json(work / RESULT, result.to_json())
    return result


def _check_names(rows, against):
    names = [row.name for row in rows]
    if not names:
        raise InputError("there are no rows to score; give one at least")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two rows are named {twice!r}; give each a name of its own")
    for name in (against, *(row.against for row in rows)):
        if name is not None and name not in names:
            raise InputError(f"against: no row is named {name!r}; there are {', '.join(names)}")


def planned_row(row: Row) -> tuple[dict[str, str], Planned]:
    """(what its overrides say under `validate` with paths of this machine, the Planned of the rest).

    A recipe may not name such a path, for it is published; these settings are no part of any artifact.
    """
    said, overrides = {}, []
    for override in row.overrides:
        key, _, text = override.partition("=")
        if key.strip() in ("validate.reference", "validate.prompts") and _value(text).startswith(("/", "~")):
            said[key.strip().partition(".")[2]] = _value(text)
        else:
            overrides.append(override)
    return said, make_plan(row.recipe, overrides)


def _value(text):
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        value = text
    return value if isinstance(value, str) else ""


class _Bases:
    """The bases of the rows: each written once, as an artifact, and drawn from with every sampling asked of it."""

    def __init__(self, work: Path, opener: Callable[..., SessionConfig]) -> None:
        self._work, self._opener = work, opener
        self._by_base: dict[str, Session] = {}
        self._groups: dict[tuple[str, str], tuple[Session, dict[str, Side]]] = {}  # by base and sampling: sides by key

    @property
    def sessions(self) -> list[Session]:
        """A Session of each base."""
        return list(self._by_base.values())

    def sides(self, number: int, row: Row, planned: Planned) -> tuple[Side, Side]:
        """(the Side of its base, its own Side) of the Row of that number and its Planned."""
        plan, sampling = planned.plan, planned.sampling
        content = [plan.base, plan.denoisers, plan.scheduler, [asdict(file) for file in plan.files]]
        key = json.dumps(content, sort_keys=True)
        if key not in self._by_base:
            self._by_base[key] = open_session(self._opener(kept_artifact(planned, self._work), self._work))
        session = self._by_base[key]
        manifest = session.manifest.model_copy(update={"sampling": sampling})
        identity = identity_of(manifest, session.folder, session.environment)
        operations = [{**operation, "layers": list(operation["layers"])} for operation in plan.carried]
        base = own = replace(base_side(identity), name=f"{number:03}-base")
        if row.patched:
            code = operator_code(manifest, session.folder)
            own = patched_side(f"{number:03}-{_slug(row.name)}", operations, identity, code)
        sampled = replace(session, manifest=manifest, config=replace(session.config, sampling=sampling))
        _, sides = self._groups.setdefault((key, json.dumps(sampling, sort_keys=True)), (sampled, {}))
        # A base that several rows have is one Side, and so are patched rows that come to the same.
        return sides.setdefault(base.key, base), sides.setdefault(own.key, own)

    def draw(self, wanted: Sequence[Side], announce: Callable[[int, int, int], object] | None) -> DrawnImages:
        """The DrawnImages of the Sides that are wanted, of the Jobs of which no side's image was blackened."""
        keys = {side.key for side in wanted}
        parts = []
        for session, sides in self._groups.values():
            chosen = [side for key, side in sides.items() if key in keys]
            if chosen:
                parts.append(session.draw(self._work, chosen, announce))
        kept = set.intersection(*({job.key for job in part.jobs} for part in parts))
        jobs = tuple(job for job in parts[0].jobs if job.key in kept)
        if len(jobs) < 2:
            raise SurgeryError(f"{len(jobs)} images of each row can be scored, and it takes 2; give more prompts")
        paths = {name: images for part in parts for name, images in part.paths.items()}
        sizes = sorted({size for part in parts for size in part.batch_sizes})
        return DrawnImages(jobs, paths, tuple(sizes))


def _compared(rows, sides, against):
    """(the Side that a row is compared with, in words whose it is) of each row; (None, None) for that row itself."""
    by_name = {row.name: own for row, (_, own) in zip(rows, sides, strict=True)}
    found = []
    for row, (base, own) in zip(rows, sides, strict=True):
        name = row.against or against
        other = by_name[name] if name else base
        found.append((None, None) if other.key == own.key else (other, name or "its base"))
    return found


def _measured(scorers: Sequence[Scorer], work: Path, drawn: DrawnImages, side: Side, other: Side | None):
    """The RowMetrics of a side: beside the other, or alone."""
    found = []
    for scorer in scorers:
        if other is None and scorer.info.kind == "fidelity":
            continue
        result = score(scorer, work, drawn.paired(other or side, side))
        found.append(RowMetric(result.metric.patched, result.own_interval, result.metric, other is not None))
    return tuple(found)


def _facts(row, planned):
    plan = planned.plan
    return {
        "base": dict(plan.base),
        "model_class": plan.model_class,
        "operations": [dict(operation) for operation in plan.carried] if row.patched else None,
        "scheduler": plan.scheduler,
        "sampling": planned.sampling,
        "evaluations": plan.evaluations,
        "plan_hash": plan.hash,
    }


def _plain(facts):
    facts = {key: value.model_dump() if hasattr(value, "model_dump") else value for key, value in facts.items()}
    return {**facts, "prompts": [prompts.model_dump() for prompts in facts["prompts"]]}


def _slug(text):
    """A text as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.,-]+", "-", text)[:60]
