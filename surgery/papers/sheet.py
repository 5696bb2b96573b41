"""Rows of images as one picture: a line for each prompt, a column for each row of the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.runtime.sheet import fitted
from surgery.validate.store import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 256  # pixels of a large image's width on the sheet
_SMALLEST = 128  # under which an image is enlarged without smoothing
_GAP, _TEXT = 6, 16


def sheet(columns: Mapping[str, Sequence[Path]], prompts: Sequence[str]) -> "Image":
    """One PIL image of {column: an image file of each prompt}; every column under its name, every line its prompt."""
    from PIL import Image, ImageDraw, ImageFont

    first = _scaled(next(iter(columns.values()))[0])
    width, height = first.size
    line = height + 2 * (_TEXT + _GAP)
    made = Image.new("RGB", (len(columns) * (width + _GAP) + _GAP, len(prompts) * line + _GAP), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(_TEXT - 3)
    for at, prompt in enumerate(prompts):
        top = _GAP + at * line
        draw.text((_GAP, top), fitted(draw, prompt, font, made.width - 2 * _GAP), "black", font)
        for column, (name, paths) in enumerate(columns.items()):
            left = _GAP + column * (width + _GAP)
            draw.text((left, top + _TEXT + 2), fitted(draw, name, font, width), "dimgray", font)
            made.paste(_scaled(paths[at]).resize((width, height)), (left, top + 2 * _TEXT + 4))
    return made


def _scaled(path: Path) -> "Image":
    from PIL import Image

    image = read_image(path).convert("RGB")
    if image.width > _SIDE:
        return image.resize((_SIDE, round(_SIDE * image.height / image.width)), Image.Resampling.LANCZOS)
    zoom = max(1, -(-_SMALLEST // image.width))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
