"""Tables, JSON and sizes for the verbs."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(title: str, columns: Sequence[str] | None, rows: Sequence[Sequence]) -> None:
    """Print a table on standard output, numbers to the right; columns: None for rows of a name and its value.

    It is as wide as the terminal, as COLUMNS says, or 80 characters. Without rows nothing is printed, and no column
    whose cells are all empty.
    """
    rows = [list(row) for row in rows]
    if not rows:
        return
    import shutil

    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", show_header=bool(columns))
    shown = [place for place in range(len(rows[0])) if any(row[place] not in ("", None) for row in rows)]
    for place in shown:
        numeric = all(_is_number(row[place]) for row in rows)
        name = columns[place] if columns else ""
        longest = max(map(len, name.split()), default=None)  # no word of a heading is cut
        made.add_column(name, justify="right" if numeric else "left", overflow="fold", min_width=longest)
    for row in rows:
        cells = [row[place] for place in shown]
        made.add_row(*(("yes" if cell else "no") if isinstance(cell, bool) else str(cell) for cell in cells))
    Console(width=shutil.get_terminal_size().columns, highlight=False, markup=False, emoji=False).print(made)


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


def _is_number(cell):
    if isinstance(cell, bool):
        return False
    return isinstance(cell, (int, float)) or str(cell).endswith((" B", "kB", "MB", "GB"))


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on standard error, a line each."""
    for warning in warnings:
        print(f"surgery: warning: {warning}", file=sys.stderr)
