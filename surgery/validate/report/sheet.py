"""Base and patched images of the pairs that differ most, side by side on one picture."""

import io
from dataclasses import dataclass
from pathlib import Path

from surgery.generating import fitted
from surgery.validate.images import read_image

_COLUMNS = 2  # pairs beside each other


@dataclass(frozen=True)
class Row:
    """A pair to show: its prompt, a line of figures, its two images."""

    prompt: str
    figures: str
    base: Path
    patched: Path


def pairs_sheet(rows, side=256):
    """A PNG (bytes) of Rows, two beside each other, each image `side` pixels wide; small ones are not smoothed."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    gap, text = 6, 64
    width = 2 * side + gap + 24
    height = side + text + 16
    lines = -(-len(rows) // _COLUMNS)
    sheet = Image.new("RGB", (min(_COLUMNS, len(rows)) * width + 12, lines * height + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, top = 12 + number % _COLUMNS * width, 12 + number // _COLUMNS * height
        draw.text((left, top), fitted(draw, row.prompt, font, 2 * side + gap), "black", font)
        draw.text((left, top + 22), fitted(draw, row.figures, small, 2 * side + gap), "dimgray", small)
        for column, (label, path) in enumerate((("base", row.base), ("patched", row.patched))):
            image = read_image(path)
            smooth = Image.Resampling.LANCZOS if image.width >= side else Image.Resampling.NEAREST
            image = image.resize((side, side * image.height // image.width), smooth)
            image = image.crop((0, 0, side, min(side, image.height)))
            draw.text((left + column * (side + gap), top + 42), label, "dimgray", small)
            sheet.paste(image, (left + column * (side + gap), top + text))
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()
