"""Tables, JSON and sizes for the verbs."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(title: str, columns: Sequence[str] | None, rows: Sequence[Sequence]) -> None:
    """Print a table on standard output, numbers to the right; columns: None for rows of a name and its value.

    It is as wide as the terminal, as COLUMNS says, or 80 characters; columns for which there is no room follow in a
    further table, beside the first column again. Without rows nothing is printed, and no column whose cells are all
    empty.
    """
    import shutil

    from rich.console import Console

    cells = [[("yes" if cell else "no") if isinstance(cell, bool) else cell for cell in row] for row in rows]
    if not cells:
        return
    width = shutil.get_terminal_size().columns
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    found = [_Column(columns[at] if columns else "", list(own)) for at, own in enumerate(zip(*cells, strict=True))]
    for part in _parts([column for column in found if any(cell not in ("", None) for cell in column.cells)], width):
        console.print(_made(title, part, headed=bool(columns)))


@dataclasses.dataclass(frozen=True)
class _Column:
    name: str
    cells: list

    @property
    def numeric(self) -> bool:
        return all(_NUMBER.fullmatch(str(cell)) for cell in self.cells)

    @property
    def least(self) -> int:
        """The width below which a word of the heading, or a number, would be cut."""
        words = [*self.name.split(), *(map(str, self.cells) if self.numeric else ())]
        return max(map(len, words), default=1)


_GAP = 3  # characters between columns in rich's SIMPLE_HEAD, and at both edges together
_NUMBER = re.compile(r"[+-]?\d[\d.]*(e[+-]?\d+)?%?( ?(B|kB|MB|GB))?|[+-]?(nan|inf)|-?")


def _parts(columns, width):
    """The columns in as many tables as they need, the first of them in each."""
    first, *others = columns
    part, parts = [first], []
    for column in others:
        if len(part) > 1 and sum(one.least + _GAP for one in (*part, column)) + _GAP > width:
            parts.append(part)
            part = [first]
        part.append(column)
    return [*parts, part]


def _made(title, columns, headed):
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_header=headed)
    for column in columns:
        side = "right" if column.numeric else "left"
        made.add_column(column.name, justify=side, overflow="fold", min_width=column.least)
    for row in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*map(str, row))
    return made


def print_json(data: object) -> None:
    """Print dataclasses, models and plain data as JSON."""
    print(json.dumps(data, indent=2, default=_plain, ensure_ascii=False))


def size(count: float | None) -> str:
    """ "17.2 MB" for a number of bytes (MB is a million)."""
    if count is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def many(count: int, noun: str) -> str:
    """ "1 module", "7 modules"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def relative(path: str | Path) -> Path:
    """The path as seen from the working folder, if it lies below it."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)  # pyright: ignore[reportArgumentType]
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    return str(value)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on standard error, a line each."""
    for warning in warnings:
        print(f"surgery: warning: {warning}", file=sys.stderr)
