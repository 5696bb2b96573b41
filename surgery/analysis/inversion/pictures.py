"""Images and their captions in, the sheet of an inversion out."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import InputError
from surgery.hub.bounded import open_image, upright
from surgery.runtime.sheet import fitted

if TYPE_CHECKING:
    from PIL.Image import Image

    from .inverting import Inversion


def captioned_images(
    images: Iterable[str | Path] = (), prompts: str | Iterable[str] = (), captions: str | Path | None = None
) -> tuple[list[str | Path], list[str]]:
    """([path], [caption]) of what a command line gives.

    images: paths. prompts: one caption for all, or one for each. captions: a file of prompts in place of those, as
    `surgery validate` reads them: one for each of the images in their order, or, without images, rows that have a
    `file` besides, seen from the file's folder.
    Raises InputError for numbers that do not match, a row without a file, and a file that cannot be read.
    """
    images = list(images)
    if bool(prompts) == bool(captions):
        raise InputError("give captions: --prompt TEXT (one for all images, or one for each), or --prompts FILE")
    if captions:
        return _from_file(Path(captions), images)
    if not images:
        raise InputError("there is no image; name image files, or a file with them: --prompts captions.jsonl")
    return images, one_each(prompts, len(images), "--prompt")


def one_each(prompts: str | Iterable[str], count: int, where: str = "prompts") -> list[str]:
    """As many captions as images; InputError, which begins with `where`, if they are neither one nor `count`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompts) not in (1, count):
        raise InputError(f"{where}: {len(prompts)} captions for {count} images; give one for all, or one for each")
    return prompts * count if len(prompts) == 1 else prompts


def check_images(images: "Iterable[str | Path | Image]") -> None:
    """Raise InputError for the first of some image files (path or PIL image) that cannot be opened."""
    for image in images:
        _opened(image, lambda opened: None)


def fitted_image(image: "str | Path | Image", height: int, width: int) -> "Image":
    """A PIL image (RGB) of height x width pixels from a file or PIL image, turned as its EXIF data say.

    It is resized and cropped around its middle, so that it is not distorted.
    """
    from PIL import Image, ImageOps

    def fit(opened):
        return ImageOps.fit(upright(opened).convert("RGB"), (width, height), Image.Resampling.LANCZOS)

    return _opened(image, fit)


def _opened(image, made_of):
    """`made_of(PIL image)` of a file or PIL image; InputError where that cannot be read."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return made_of(image)
    try:
        with open_image(image) as opened:
            return made_of(opened)
    except FileNotFoundError as error:
        raise InputError(f"there is no image {image}; check its name") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{image} cannot be read as an image: {getattr(error, 'strerror', None) or error}") from error


def _from_file(path, images):
    from surgery.validate.prompts.files import prompt_of, rows

    found = [(where, prompt_of(row, where)) for where, row in rows(path)]
    prompts = [prompt.text for _, prompt in found]
    if images:
        if any("file" in prompt.facts for _, prompt in found):
            raise InputError(f"{path} names image files itself; leave out those on the command line")
        if len(prompts) != len(images):
            raise InputError(f"{path}: {len(prompts)} captions for {len(images)} images; give one for each")
        return images, prompts
    if not found:
        raise InputError(f'{path} is empty; write an object per line, {{"file": "x.png", "prompt": "a red circle"}}')
    for where, prompt in found:
        if not isinstance(prompt.facts.get("file"), str) or not prompt.facts["file"]:
            raise InputError(f"{where}: there is no file; name the image there, or on the command line")
    return [path.parent / prompt.facts["file"] for _, prompt in found], prompts


ROUND_TRIP = "VAE round trip"


def sheet(inversion: "Inversion", smallest: int = 160) -> "Image":
    """One PIL image: a row for each image that the Inversion kept, under its caption, and a column for each side.

    Beneath a column's name stands its first metric to the image. Images under `smallest` pixels are enlarged without
    smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = {"image": (inversion.images, None)}
    columns |= {name: (side.images, side.values["image"]) for name, side in inversion.rows.items()}
    metric, info = next(iter(inversion.metrics.items()))
    width, height = inversion.images[0].size
    zoom = max(1, -(-smallest // min(width, height)))
    width, height = width * zoom, height * zoom
    text, gap, margin = max(14, width // 14), 4, 20
    font = ImageFont.load_default(text)
    row = 3 * text + height + margin + 14
    made = Image.new("RGB", (2 * margin + len(columns) * (width + gap), margin + len(inversion.images) * row), "white")
    draw = ImageDraw.Draw(made)
    for line in range(len(inversion.images)):
        top = margin + line * row
        caption = fitted(draw, inversion.prompts[line], font, made.width - 2 * margin)
        draw.text((margin, top), caption, "black", font)
        for column, (name, (images, values)) in enumerate(columns.items()):
            left = margin + column * (width + gap)
            draw.text((left, top + text + 3), fitted(draw, name, font, width), "dimgray", font)
            if values is not None:
                figure = f"{info.title} {values[metric][line]:.4g}"
                draw.text((left, top + 2 * text + 6), fitted(draw, figure, font, width), "dimgray", font)
            image = images[line].resize((width, height), Image.Resampling.NEAREST)
            made.paste(image, (left, top + 3 * text + 12))
    return made
