"""Drawn images or videos side by side in one labelled grid, and the frames of a video below each other."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .video import Video

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from PIL.PngImagePlugin import PngInfo

    Columns = Mapping[str, Mapping[tuple[str, int], Image]]
    VideoColumns = Mapping[str, Mapping[tuple[str, int], Video]]


def picture(columns: "Columns", prompts: Sequence[str], seeds: Sequence[int], smallest: int = 160) -> "Image":
    """One PIL image: a row per prompt, and for each seed the images of every column beside each other, labelled.

    columns: {label: {(prompt, seed): image}}. Images under `smallest` pixels are enlarged without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = next(iter(next(iter(columns.values())).values())).size
    zoom = max(1, -(-smallest // min(width, height)))
    width, height = width * zoom, height * zoom
    text, gap, group_gap = max(14, width // 12), 4, 20
    font = ImageFont.load_default(text)
    group = len(columns) * (width + gap) + group_gap
    row = 2 * text + height + group_gap + 10
    sheet = Image.new("RGB", (group_gap + len(seeds) * group, group_gap + len(prompts) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for line, prompt in enumerate(prompts):
        top = group_gap + line * row
        draw.text((group_gap, top), fitted(draw, prompt, font, sheet.width - 2 * group_gap), "black", font)
        for position, seed in enumerate(seeds):
            for column, (label, images) in enumerate(columns.items()):
                left = group_gap + position * group + column * (width + gap)
                draw.text((left, top + text + 3), fitted(draw, f"{label}, seed {seed}", font, width), "dimgray", font)
                image = images[prompt, seed].convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (left, top + 2 * text + 8))
    return sheet


def moving_picture(columns: "VideoColumns", prompts: Sequence[str], seeds: Sequence[int]) -> Video:
    """One Video whose every frame is the `picture` of the videos' frames at that place; all have the same number."""
    first = next(iter(next(iter(columns.values())).values()))
    frames = []
    for number in range(len(first.frames)):
        at = {label: {job: video.frames[number] for job, video in of.items()} for label, of in columns.items()}
        frames.append(picture(at, prompts, seeds))
    return Video(frames, first.fps)


def evenly(count: int, most: int) -> list[int]:
    """Places of at most `most` of `count` frames, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def film_strip(frames: "Sequence[Image]", most: int = 4) -> "Image":
    """Frames of a video below each other as one PIL image: at most `most`, as `evenly` chooses them."""
    from PIL import Image

    chosen = [frames[place] for place in evenly(len(frames), most)]
    width, height = chosen[0].size
    strip = Image.new("RGB", (width, height * len(chosen)))
    for place, frame in enumerate(chosen):
        strip.paste(frame, (0, place * height))
    return strip


def fitted(draw: "ImageDraw", text: str, font: "FreeTypeFont | ImageFont", width: float) -> str:
    """The text in one line, cut short with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    while len(text) > 1 and draw.textlength(text, font) > width:
        text = text[:-2].rstrip() + "…"
    return text


def png_of(image: "Image", text: "PngInfo | None" = None) -> bytes:
    """The PNG of a PIL image, with what it is to carry as text."""
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=text)
    return file.getvalue()
