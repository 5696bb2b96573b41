"""Images from files, each with its caption, at the size of a model."""

from pathlib import Path

from surgery.bounded import open_image
from surgery.errors import InputError


def captioned_images(images=(), prompts=(), captions=None):
    """([path], [caption]) of what a command line gives.

    images: paths. prompts: one caption for all, or one for each. captions: a file of prompts in place of those, as
    `surgery validate` reads them: one for each of the images in their order, or, without images, rows that have a
    `file` besides, seen from the file's folder.
    Raises InputError for numbers that do not match, a row without a file, and a file that cannot be read.
    """
    if bool(prompts) == bool(captions):
        raise InputError("give captions: --prompt TEXT (one for all images, or one for each), or --prompts FILE")
    if captions:
        return _from_file(Path(captions), list(images))
    if not images:
        raise InputError("there is no image; name image files, or a file with them: --prompts captions.jsonl")
    return list(images), one_each(prompts, len(images), "--prompt")


def one_each(prompts, count, where="prompts"):
    """As many captions as images; InputError, which begins with `where`, if they are neither one nor `count`."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompts) not in (1, count):
        raise InputError(f"{where}: {len(prompts)} captions for {count} images; give one for all, or one for each")
    return prompts * count if len(prompts) == 1 else prompts


def check_images(images):
    """Raise InputError for the first of some image files (path or PIL image) that cannot be opened."""
    for image in images:
        _opened(image, lambda opened: None)


def fitted_image(image, height, width):
    """A PIL image (RGB) of height x width pixels from a file or PIL image, turned as its EXIF data say.

    It is resized and cropped around its middle, so that it is not distorted.
    """
    from PIL import Image, ImageOps

    def fit(opened):
        upright = ImageOps.exif_transpose(opened).convert("RGB")
        return ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)

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
