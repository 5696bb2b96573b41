"""The report of several rows: their table, and their images beside each other, a line for each prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.artifact.manifest import replace_file
from surgery.console import operation_text, sampling_text
from surgery.errors import SurgeryError
from surgery.runtime.sheet import fitted, png_of

from ..store import read_image
from .page import render, shared_facts

if TYPE_CHECKING:
    from ..rows import RowResult, RowsResult

_PROMPTS = 6  # that are shown, evenly spaced
_COLUMNS = 8  # beside each other
_SHEETS = 12


def write_rows_report(result: "RowsResult", title: str, lines: Sequence[str] = ()) -> Path:
    """Write report.html and its pictures of images into the result's folder; the page's path.

    lines: of text above the table. Raises SurgeryError where a file cannot be written.
    """
    pictures = row_sheets([result.rows], result)
    return write_page(result, title, lines, pictures, result.rows)


def write_page(
    result: "RowsResult",
    title: str,
    lines: Sequence[str],
    pictures: Mapping[str, bytes],
    rows: Sequence["RowResult"],
    front: Sequence[str] = (),
) -> Path:
    """Write the pictures ({title: PNG}), named by their titles, and report.html; front: rows on the Pareto front."""
    columns = {metric.name: metric.measured for row in rows for metric in row.metrics}
    facts = [*shared_facts(result.facts), *((row.name, _row_text(row)) for row in rows)]
    page = render(
        "rows",
        title,
        pictures,
        facts,
        lines=lines,
        metrics=[columns[name] for name in result.settings.metrics if name in columns],
        rows=rows,
        front=front,
    )
    files = {f"{name.partition(':')[0].replace(' ', '-')}.png": data for name, data in pictures.items()}
    for file, data in {**files, "report.html": page.encode("utf-8")}.items():
        path = result.folder / file
        try:
            replace_file(path, data)
        except OSError as error:
            raise SurgeryError(f"cannot write {path}: {error.strerror or error}; run the same command again") from error
    return result.folder / "report.html"


def _row_text(row):
    base, operations = row.facts["base"], row.facts["operations"]
    acts = "; ".join(map(operation_text, operations)) if operations else "untouched"
    revision = f" at {base['revision']}" if base["revision"] else ""
    return f"{base['pipeline']}{revision}, {acts}; {sampling_text(row.facts['sampling'])}"


def row_sheets(lines: Sequence[Sequence["RowResult"]], result: "RowsResult") -> dict[str, bytes]:
    """{title: PNG} of the rows of each line beside each other, its first row again where they do not fit in one."""
    sheets = []
    for first, *others in lines:
        cut = [others[at : at + _COLUMNS - 1] for at in range(0, len(others), _COLUMNS - 1)] or [[]]
        sheets += [rows_sheet([first, *some], result) for some in cut]
    return {f"images {number}": sheet for number, sheet in enumerate(sheets[:_SHEETS], 1)}


def rows_sheet(rows: Sequence["RowResult"], result: "RowsResult", side: int = 192) -> bytes:
    """A PNG (bytes): a line for each prompt, the rows' images beside each other, each `side` pixels wide."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    count = min(_PROMPTS, len(result.jobs))
    places = [number * len(result.jobs) // count for number in range(count)]
    gap, text = 6, 62
    first = read_image(rows[0].images[places[0]])
    height = side * first.height // first.width
    sheet = Image.new("RGB", (len(rows) * (side + gap) + 18, count * (height + text + 12) + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for line, place in enumerate(places):
        job, top = result.jobs[place], 12 + line * (height + text + 12)
        shown = f"{job.prompt.text or '(empty prompt)'}, seed {job.seed}"
        draw.text((12, top), fitted(draw, shown, font, sheet.width - 24), "black", font)
        for column, row in enumerate(rows):
            left = 12 + column * (side + gap)
            for number, label in enumerate(_two_lines(draw, row.name, small, side)):
                draw.text((left, top + 24 + 16 * number), label, "dimgray", small)
            image = read_image(row.images[place])
            smooth = Image.Resampling.LANCZOS if image.width >= side else Image.Resampling.NEAREST
            image = image.resize((side, side * image.height // image.width), smooth)
            sheet.paste(image.crop((0, 0, side, min(height, image.height))), (left, top + text))
    return png_of(sheet)


def _two_lines(draw, text, font, width):
    """The text in a line or two, the second cut short where it does not fit."""
    words, line = text.split(), ""
    while words and draw.textlength(f"{line} {words[0]}", font) <= width:
        line = f"{line} {words.pop(0)}".strip()
    rest = " ".join(words)
    return [each for each in (line, rest and fitted(draw, rest, font, width)) if each]
