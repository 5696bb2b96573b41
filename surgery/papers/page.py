"""A reproduced table as Markdown, and as one HTML page that loads nothing."""

import base64
from importlib import resources
from pathlib import Path

from .manifest import PAPERS
from .results import Cell, Measured, Reproduction, title_of

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def heading(done: Reproduction) -> list[str]:
    """The columns after the row's name: the paper's figure, ours, and whether it goes the paper's way."""
    columns = []
    for cell in done.rows[0].cells if done.rows else ():
        title = f"{title_of(cell.column, done.table)}, {cell.prompts}"
        columns += [f"{title}: paper"] if has_paper(done, cell) else []
        columns += [f"{title}: ours"] if has_ours(done, cell) else []
        columns += ["reproduced"] if done.on is None and has_paper(done, cell) and has_ours(done, cell) else []
    return columns


def cell_text(done: Reproduction, row) -> list[str]:
    """The texts of a row under `heading`."""
    texts = []
    for cell in row.cells:
        paper, ours = has_paper(done, cell), has_ours(done, cell)
        texts += ["" if cell.paper is None else f"{cell.paper:g}"] if paper else []
        texts += [measured_text(cell.ours)] if ours else []
        texts += [cell.reproduced] if done.on is None and paper and ours else []
    return texts


def has_paper(done: Reproduction, cell: Cell) -> bool:
    """Whether the paper reports a figure in this column for any row."""
    return any(other.paper is not None for other in _column(done, cell))


def has_ours(done: Reproduction, cell: Cell) -> bool:
    """Whether anything was measured in this column."""
    return any(other.ours is not None for other in _column(done, cell))


def _column(done, cell):
    place = (cell.prompts, cell.column)
    return [other for row in done.rows for other in row.cells if (other.prompts, other.column) == place]


def measured_text(ours: Measured | None) -> str:
    """ "26.61, +0.7 (+0.52 to +0.89)": a value, its difference from the compared row, that one's 95% interval."""
    if ours is None:
        return ""
    text = f"{ours.value:.4g}"
    signed = "" if ours.difference is None else "+"
    text += "" if ours.difference is None else f", {ours.difference:+.3g}"
    return text if ours.interval is None else f"{text} ({' to '.join(f'{end:{signed}.3g}' for end in ours.interval)})"


def about(done: Reproduction) -> list[str]:
    """What a reader has to know before the table, a sentence each."""
    lines = [f"{PAPERS[done.table.paper]}, {done.table.place}."]
    if done.on:
        lines.append(
            "Drawn with the shapes model that ships, on its own prompts and by its own metric: the paper's figures are "
            "of other models and other prompts and are not comparable with these."
        )
    compared = sorted({row.compared_with for row in done.rows if row.compared_with})
    if compared and any(cell.ours for row in done.rows for cell in row.cells):
        lines.append(
            "Ours: the value, its difference from the row that it is compared with, and that one's 95% interval. "
            f"Compared with: {', '.join(compared)}."
        )
    if done.on is None and any(cell.reproduced for row in done.rows for cell in row.cells):
        lines.append(
            "Reproduced: yes where the whole interval lies on the side of the paper's difference, no where on the "
            "other, cannot tell where it holds zero."
        )
    return lines


def markdown(done: Reproduction) -> str:
    """The table as GitHub's Markdown."""
    columns = ["row", *heading(done)]
    lines = [f"# {done.table.title} ({done.name})", "", *about(done), ""]
    if len(columns) > 1:
        rows = [[row.name, *cell_text(done, row)] for row in done.rows]
        lines += [_line(columns), _line(["---"] * len(columns)), *map(_line, rows), ""]
    lines += [f"- {note}" for note in done.notes]
    lines += [f"- {what}: [{path.name}]({path.as_posix()})" for what, path in done.files.items()]
    lines += ["", *(f"- {key}: {value}" for key, value in done.facts.items())]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells):
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def html(done: Reproduction) -> str:
    """The same as one HTML page, pictures in it."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((resources.files("surgery.papers") / "page.html").read_text("utf-8"))
    pictures = {what: _embedded(done.folder / path) for what, path in done.files.items() if path.suffix == ".png"}
    return template.render(
        policy=_POLICY,
        title=f"{done.table.title} ({done.name})",
        about=about(done),
        columns=heading(done),
        rows=[(row.name, cell_text(done, row)) for row in done.rows],
        notes=done.notes,
        pictures=pictures,
        files={what: path for what, path in done.files.items() if path.suffix != ".png"},
        facts=done.facts,
    )


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
