"""The pictures of a report: differences with intervals, and pairs side by side."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.artifact.scores import Scores
from surgery.errors import InputError
from surgery.runtime.sheet import film_strip, fitted, png_of
from surgery.runtime.video import Video

from ..jobs import ImagePair
from ..store import read_drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"better": "#1a7f37", "worse": "#b3261e"}
_GREY = "#57606a"


def new_figure(width: float, height: float) -> "Figure":
    """A matplotlib Figure without any global state; InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the report's plots need matplotlib: pip install 'pladis-surgery[validate]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def png(figure: "Figure") -> bytes:
    """The PNG (bytes) of a Figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def difference_plot(scores: Scores) -> bytes | None:
    """Each metric's paired difference with its 95% interval, each on its own axis, its categories below it; or None."""
    shown = [metric for metric in scores.metrics if metric.difference is not None]
    if not shown:
        return None
    heights = [1 + len(metric.categories) for metric in shown]
    figure = new_figure(8, 0.9 * len(shown) + 0.3 * sum(heights))
    axes = figure.subplots(len(shown), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
    for axis, metric in zip(axes, shown, strict=True):
        rows = [("all", metric.difference, metric.interval), *_category_rows(metric)]
        for place, (name, difference, (low, high)) in enumerate(rows):
            colour = COLOURS.get(metric.verdict, _GREY) if name == "all" else "#8c959f"
            axis.plot([low, high], [place, place], color=colour, linewidth=3 if name == "all" else 2)
            axis.plot([difference], [place], "o", color=colour, markersize=7 if name == "all" else 5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [name for name, *_ in rows], parse_math=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        better = "higher" if metric.higher_is_better else "lower"
        axis.set_title(f"{metric.title or metric.name}: patched - base ({better} is better)", loc="left", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    return png(figure)


def _category_rows(metric):
    return [(category.name, category.difference, category.interval) for category in metric.categories]


_COLUMNS = 2  # pairs beside each other


@dataclass(frozen=True)
class LabelledPair:
    """A pair to show under its prompt and a line of figures."""

    pair: ImagePair
    figures: str


def pairs_sheet(shown: Sequence[LabelledPair], side: int = 256) -> bytes:
    """A PNG (bytes) of pairs, two beside each other, each image `side` pixels wide; small ones are not smoothed.

    A video is shown as a strip of frames below each other, base beside patched.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    gap, text = 6, 64
    width = 2 * side + gap + 24
    columns = [[_shown(path, side) for path in (each.pair.base, each.pair.patched)] for each in shown]
    height = max(image.height for images in columns for image in images) + text + 16
    lines = -(-len(shown) // _COLUMNS)
    sheet = Image.new("RGB", (min(_COLUMNS, len(shown)) * width + 12, lines * height + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (labelled, images) in enumerate(zip(shown, columns, strict=True)):
        left, top = 12 + number % _COLUMNS * width, 12 + number // _COLUMNS * height
        draw.text((left, top), fitted(draw, labelled.pair.job.prompt.text, font, 2 * side + gap), "black", font)
        draw.text((left, top + 22), fitted(draw, labelled.figures, small, 2 * side + gap), "dimgray", small)
        for column, (label, image) in enumerate(zip(("base", "patched"), images, strict=True)):
            draw.text((left + column * (side + gap), top + 42), label, "dimgray", small)
            sheet.paste(image, (left + column * (side + gap), top + text))
    return png_of(sheet)


def _shown(path, side):
    """The image `side` pixels wide, and of that height at most; of a video its whole strip."""
    from PIL import Image

    drawn = read_drawn(path)
    image = film_strip(drawn.frames) if isinstance(drawn, Video) else drawn
    smooth = Image.Resampling.LANCZOS if image.width >= side else Image.Resampling.NEAREST
    resized = image.resize((side, side * image.height // image.width), smooth)
    return resized if isinstance(drawn, Video) else resized.crop((0, 0, side, min(side, resized.height)))
