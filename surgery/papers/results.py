"""What a table came to here, beside what its paper reports."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .costs import Cost
from .entries import Entry, On
from .manifest import PAPERS, Manifest

SCHEMA_VERSION = 1
Verdict = Literal["yes", "no", "cannot tell", ""]


@dataclass(frozen=True)
class Measured:
    """A figure of ours. interval: of the difference, or of the value where there is no difference to be had.

    difference: from the row that it is compared with. n: images, or pairs of them, behind it.
    """

    value: float
    difference: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None


@dataclass(frozen=True)
class Cell:
    """A row's figure in one column. paper, paper_difference: as the paper reports them. ours: None if not measured.

    reproduced: whether ours differs from the compared row in the direction in which the paper's does.
    """

    prompts: str
    column: str
    paper: float | None
    paper_difference: float | None
    ours: Measured | None
    reproduced: Verdict


@dataclass(frozen=True)
class ResultRow:
    """A row of the table. compared_with: the row whose figures the differences are from; None for that row itself."""

    name: str
    compared_with: str | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Reproduction:
    """A table, drawn. files: {what: path} of pictures, pages and reports beside result.json; facts: of the run."""

    name: str
    table: Manifest
    on: On | None
    cost: Cost
    rows: tuple[ResultRow, ...]
    notes: tuple[str, ...]
    files: Mapping[str, Path]
    facts: Mapping[str, Any]
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """Plain data, as result.json holds it; paths start at its folder where they lie below it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "table": self.name,
            "paper": PAPERS[self.table.paper],
            "place": self.table.place,
            "title": self.table.title,
            "kind": self.table.kind,
            "on": self.on,
            "comparable": self.on is None,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
            "files": {what: path.as_posix() for what, path in self.files.items()},
            "facts": dict(self.facts),
        }


def verdict(paper_difference: float | None, ours: Measured | None) -> Verdict:
    """Whether ours goes in the paper's direction: "yes" or "no" where the whole interval says so, else "cannot tell".

    "" where the paper reports no difference, or there is none of ours.
    """
    if not paper_difference or ours is None or ours.difference is None or ours.interval is None:
        return ""
    low, high = sorted(ours.interval)
    if low <= 0 <= high:
        return "cannot tell"
    return "yes" if (low > 0) == (paper_difference > 0) else "no"


def result_rows(
    names: Sequence[tuple[str, str | None]],
    reported: Mapping[str, Mapping[str, Mapping[str, float]]],
    measured: Mapping[str, Mapping[tuple[str, str], Measured]],
    comparable: bool,
) -> tuple[ResultRow, ...]:
    """The ResultRows of a table.

    names: (row, the row it is compared with); reported, measured: {row: its figures}, the latter by (prompts, column).
    comparable: that verdicts may be given.
    """
    columns = _columns(reported, measured)
    rows = []
    for name, other in names:
        cells = []
        for prompts, column in columns:
            paper = reported.get(name, {}).get(prompts, {}).get(column)
            before = reported.get(other, {}).get(prompts, {}).get(column) if other else None
            change = round(paper - before, 9) if paper is not None and before is not None else None
            ours = measured.get(name, {}).get((prompts, column))
            cells.append(Cell(prompts, column, paper, change, ours, verdict(change, ours) if comparable else ""))
        rows.append(ResultRow(name, other, tuple(cells)))
    return tuple(rows)


def compared_rows(table: Manifest, entries: Sequence[Entry]) -> list[tuple[str, str | None]]:
    """(row, the row that it is set against): the table's `against`, or the untouched row of its own model."""
    bases = {entry.model: entry.name for entry in reversed(entries) if not entry.patched}
    pairs: list[tuple[str, str | None]] = []
    for entry in entries:
        other = table.against or (bases.get(entry.model) if entry.patched else None)
        pairs.append((entry.name, other if other != entry.name else None))
    return pairs


def title_of(column: str, table: Manifest) -> str:
    """A column's heading: the paper's own name of it, or the metric's."""
    return table.columns.get(column, column)


def _columns(reported, measured):
    """[(prompts, column)] with figures: the paper's in its order, then what was measured besides."""
    found = [(prompts, column) for of in reported.values() for prompts, figures in of.items() for column in figures]
    return list(dict.fromkeys([*found, *(place for of in measured.values() for place in of)]))
