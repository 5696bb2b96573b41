"""What is drawn from besides a prompt: an image, a mask, a control image; and the pipeline class that takes them.

A pipeline that takes them itself (inpainting, a refiner, image to video) is used as it is; of a plain one diffusers'
AutoPipeline names the class for the task, which is made of the same modules: a patch is in it.
"""

import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import BaseError, InputError
from surgery.hub import HubBase, LocalBase, select_files
from surgery.hub.base import local_folder
from surgery.hub.bounded import open_image, pillow_errors, upright
from surgery.hub.foreign import first_line, reading
from surgery.recipe.schema import USUAL_STEPS

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Inputs:
    """Paths of what is drawn from; controlnet: a repository or folder, which goes with control_image."""

    image: str | None = None
    mask: str | None = None
    control_image: str | None = None
    controlnet: str | None = None

    def check(self) -> None:
        """Raise InputError where one is given without what it goes with."""
        if self.mask and not self.image:
            raise InputError("--mask marks what of an image is drawn anew; give the --image too")
        if self.controlnet and not self.control_image:
            raise InputError("--controlnet follows a control image; give the --control-image too")

    def images(self) -> "dict[str, Image]":
        """{"image", "mask", "control_image": PIL image} of those given; InputError for what is no image."""
        paths = {name: getattr(self, name) for name in ("image", "mask", "control_image")}
        return {name: _image(Path(path), "L" if name == "mask" else "RGB") for name, path in paths.items() if path}


def images_of(files: Mapping[str, bytes]) -> "dict[str, Image]":
    """{"image", "mask": PIL image} of files, the mask being white where its alpha is 0, as OpenAI's clients mean it.

    Raises InputError for what is no image.
    """
    from PIL import Image

    images = {}
    for name, content in files.items():
        try:
            image = upright(Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")))
        except (OSError, ValueError, *pillow_errors()) as error:
            raise InputError(f"the {name} cannot be read: {error}") from error
        if name == "mask":
            clear = image.convert("RGBA").getchannel("A")
            images[name] = clear.point([255] + [0] * 255)
        else:
            images[name] = _with_mode(image, "RGB")
    return images


def _with_mode(image, mode):
    """The image in a mode of 8 bits; PIL itself cuts 16-bit greys off at 255, where all is white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda grey: grey / 257).convert("L")
    return image.convert(mode)


def _image(path, mode):
    try:
        with open_image(path) as image:
            return _with_mode(upright(image), mode)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as an image: {getattr(error, 'strerror', None) or error}") from error


def with_inputs(
    pipeline: Any, inputs: Inputs, images: "Mapping[str, Image]", sampling: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """(the pipeline that takes the inputs, `sampling` with them under that pipeline's own arguments).

    images: what `inputs.images()` gave. Images are resized to the sampling's height and width; a pipeline that takes
    its size from the image is not told it.
    Raises InputError where no pipeline of diffusers for this model takes them, BaseError for a ControlNet that cannot
    be read.
    """
    if not images:
        return pipeline, dict(sampling)
    control = _controlnet(inputs.controlnet, pipeline) if inputs.controlnet else None
    pipeline = _for_task(pipeline, images, control)
    name, accepted = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    arguments = {"image": "image", "mask": "mask_image", "control_image": "control_image"}
    if "control_image" not in accepted and "image" not in images:
        arguments["control_image"] = "image"  # of Stable Diffusion's ControlNets the control is the image
    for given in images:
        if arguments[given] not in accepted:
            hint = "give a --controlnet" if given == "control_image" else f"leave --{given} out"
            raise InputError(f"{name} takes no {given.replace('_', ' ')}; {hint}")
    size = sampling.get("width"), sampling.get("height")
    resized = {
        arguments[given]: image.resize((size[0] or image.width, size[1] or image.height))
        for given, image in images.items()
    }
    kept = {key: value for key, value in sampling.items() if key not in ("height", "width") or key in accepted}
    if "image" in images and sampling.get("strength") is not None:
        _check_strength(sampling["strength"], sampling.get("steps") or USUAL_STEPS)
    return pipeline, {**kept, **resized}


def _check_strength(strength, steps):
    if not 0 < strength <= 1:
        raise InputError(f"--strength must be above 0 and at most 1, not {strength:g}")
    if int(steps * strength) < 1:
        raise InputError(f"--strength {strength:g} leaves none of {steps} steps; give more of one of them")


def _for_task(pipeline, images, control):
    """The pipeline, or one of its modules whose class takes the images."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

    accepted = inspect.signature(type(pipeline).__call__).parameters
    if (
        control is None
        and ("image" in accepted or "image" not in images)
        and ("mask" not in images or "mask_image" in accepted)
    ):
        return pipeline
    kind = AutoPipelineForText2Image
    if "image" in images:
        kind = AutoPipelineForInpainting if "mask" in images else AutoPipelineForImage2Image
    try:
        return kind.from_pipe(pipeline, **({} if control is None else {"controlnet": control}))
    except ValueError as error:
        given = " and ".join(name.replace("_", " ") for name in images)
        raise InputError(
            f"diffusers has no pipeline that draws from {given} for {type(pipeline).__name__}: {first_line(error)}"
        ) from error


def _controlnet(name, pipeline):
    import diffusers

    local = local_folder(name)
    base = HubBase(name) if local is None else LocalBase(local)
    if "config.json" not in base.files:
        raise InputError(f"{name} holds no ControlNet: it has no config.json")
    class_name = str(base.read_json("config.json").get("_class_name"))
    if "ControlNet" not in class_name or not hasattr(diffusers, class_name):
        raise InputError(f"{name} is no ControlNet but a {class_name}")
    listed = {f"controlnet/{path}": path for path in base.files if "/" not in path}
    files = select_files(listed, {"controlnet": ["diffusers", class_name]})["controlnet"]
    if not files.weights:
        raise InputError(f"{name} has no weights of a ControlNet")
    fetched = [base.path(listed[path]) for path in (*files.config, *files.weights, files.index) if path]
    folder = fetched[0].parent
    with reading(f"{name} cannot be loaded", folder, BaseError):
        loaded = getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=pipeline.dtype)
    return loaded.to(pipeline.device)
