"""The sheet of a comparison: a row per mode of attention, its image first, then a heat map per word."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import InputError

from .rows import Comparison

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL = 208  # pixels of a cell's longer side
_MARGIN, _GAP, _ROW_LABEL = 24, 8, 200
_TITLE, _TEXT, _SMALL = 24, 19, 14
_MOST_COLUMNS = 8  # of maps beside each other; more are spread over bands below each other
_BAND_HEAD = _TEXT + 10
_BAR, _BAND_FOOT = 10, 62
# What a row is, under its name, before its settings.
_EXPLANATIONS = {"dense": "the model without a patch:", "sparse": "alpha-entmax alone:"}


def heat_colours() -> Callable[[np.ndarray], np.ndarray]:
    """matplotlib's magma as a function from an array in [0, 1] to RGBA in [0, 1]; InputError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("attention maps are coloured by matplotlib: pip install 'pladis-surgery[validate]'") from error
    return matplotlib.colormaps["magma"]


def sheet(comparison: Comparison) -> "Image":
    """One PIL image of a Comparison: labelled, on white, with a colour bar below each column.

    The maps of a column share one colour range, from the lowest to the highest value among them, so that rows can be
    compared; negative weights are drawn as 0. gag's weights do not sum to one, so where it is a row it has colour
    ranges of its own, written below its maps.
    """
    from PIL import Image, ImageDraw

    colours = heat_colours()
    cell = _cell_size(comparison.rows[0].image)
    count = len(comparison.columns)
    bands = -(-count // _MOST_COLUMNS)
    per_band = -(-count // bands)
    width = 2 * _MARGIN + _ROW_LABEL + (1 + max(per_band, 3)) * (cell[0] + _GAP)
    heading = _heading(comparison, width - 2 * _MARGIN)
    top = _MARGIN + sum(size + 7 for _, size, _ in heading) + 14
    band_height = _BAND_HEAD + len(comparison.rows) * _row_height(cell) + _BAND_FOOT
    image = Image.new("RGB", (width, top + bands * band_height), "white")
    draw = ImageDraw.Draw(image)
    y = _MARGIN
    for line, size, colour in heading:
        draw.text((_MARGIN, y), line, colour, _font(size))
        y += size + 7
    for band in range(bands):
        y = top + band * band_height
        _draw_images(image, draw, comparison.rows, y, cell)
        for place, index in enumerate(range(count)[band * per_band : (band + 1) * per_band]):
            left = _MARGIN + _ROW_LABEL + (1 + place) * (cell[0] + _GAP)
            _draw_column(image, draw, comparison, index, (left, y), cell, colours)
    return image


def _draw_images(image, draw, rows, top, cell):
    """The names of the rows, and the images that they drew."""
    from PIL import Image

    left = _MARGIN + _ROW_LABEL
    draw.text((left, top), "image", "dimgray", _font(_TEXT))
    for number, row in enumerate(rows):
        y = top + _BAND_HEAD + number * _row_height(cell)
        draw.text((_MARGIN, y), row.mode, "black", _font(_TEXT + 2))
        text = f"{_EXPLANATIONS.get(row.mode, '')} {row.setting}"
        for line, words in enumerate(_wrapped(draw, text, _font(_SMALL), _ROW_LABEL - 14)):
            draw.text((_MARGIN, y + _TEXT + 10 + line * (_SMALL + 4)), words, "dimgray", _font(_SMALL))
        method = Image.Resampling.LANCZOS if row.image.width > cell[0] else Image.Resampling.NEAREST
        image.paste(row.image.convert("RGB").resize(cell, method), (left, y))


def _draw_column(image, draw, comparison, index, corner, cell, colours):
    """The maps of a word below each other, and their colour bar."""
    left, top = corner
    label = comparison.columns[index].label
    size = next((size for size in range(_TEXT, 9, -1) if draw.textlength(label, _font(size)) <= cell[0]), 9)
    draw.text((left, top), label, "black", _font(size))
    sharing = [row for row in comparison.rows if not _has_own_range(row)]
    shared = _range(sharing, index)
    for number, row in enumerate(comparison.rows):
        y = top + _BAND_HEAD + number * _row_height(cell)
        own = _has_own_range(row)
        low, high = _range([row], index) if own else shared
        image.paste(_heat_map(row.maps[index], cell, low, high, colours), (left, y))
        text = f"mean {_number(float(row.maps[index].mean()))}"
        text += f", range {_number(low)} to {_number(high)}" if own else ""
        draw.text((left, y + cell[1] + 3), text, "dimgray", _font(_SMALL))
    y = top + _BAND_HEAD + len(comparison.rows) * _row_height(cell) + 4
    bar = _coloured(np.tile(np.linspace(0, 1, cell[0]), (_BAR, 1)), colours)
    image.paste(bar, (left, y))
    low, high = map(_number, shared)
    middle = ", ".join(row.mode for row in sharing) if len(sharing) < len(comparison.rows) else ""
    for text, share in ((low, 0.0), (middle, 0.5), (high, 1.0)):
        x = left + share * (cell[0] - draw.textlength(text, _font(_SMALL)))
        draw.text((x, y + _BAR + 3), text, "dimgray", _font(_SMALL))


def _heading(comparison, width):
    """[(line, font size, colour)] above the maps: the prompt, and how to read them."""
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    modules = len(comparison.modules)
    averaged = {
        "mode": f"{modules} module{'s' if modules != 1 else ''}, their heads and all denoising steps",
        "step": f"{modules} module{'s' if modules != 1 else ''} and their heads, by denoising step",
        "block": "their heads and all denoising steps, by block",
    }
    text = (
        "How much each place of the image attends to each word: attention weights, averaged over "
        f"{averaged[comparison.by]}. Brighter is more. "
        "Within a column the same colour is the same weight; the bar below it shows the range."
    )
    if any(row.maps.min() < 0 for row in comparison.rows):
        text += " Negative averages are drawn as 0."
    if any(_has_own_range(row) for row in comparison.rows):
        text += " gag's weights do not sum to one: its row has colour ranges of its own."
    if comparison.cut_off:
        text += f" Beyond the text encoder's length, in whole or in part: {', '.join(comparison.cut_off)}."
    title = _wrapped(draw, f"“{comparison.prompt}”, seed {comparison.seed}", _font(_TITLE), width)
    below = _wrapped(draw, text, _font(_SMALL + 1), width)
    return [(line, _TITLE, "black") for line in title] + [(line, _SMALL + 1, "dimgray") for line in below]


def _heat_map(map_, size, low, high, colours):
    from PIL import Image

    enlarged = np.asarray(Image.fromarray(np.asarray(map_, np.float32)).resize(size, Image.Resampling.BILINEAR))
    return _coloured((enlarged - low) / (high - low) if high > low else np.zeros_like(enlarged), colours)


def _coloured(shares, colours):
    from PIL import Image

    return Image.fromarray((colours(np.clip(shares, 0, 1))[..., :3] * 255).round().astype(np.uint8))


def _range(rows, index):
    """The lowest and the highest value of a column over rows, neither below 0."""
    lowest = min(float(row.maps[index].min()) for row in rows)
    highest = max(float(row.maps[index].max()) for row in rows)
    return max(0.0, lowest), max(0.0, highest)


def _has_own_range(row):
    return "gag" in row.mode  # which a row by step or block is not called, where all are of one operator


def _cell_size(image):
    zoom = _CELL / max(image.size)
    return max(1, round(image.width * zoom)), max(1, round(image.height * zoom))


def _row_height(cell):
    return cell[1] + _SMALL + 5 + _GAP


def _number(value):
    return f"{value:.2g}"


def _font(size):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(draw, text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
