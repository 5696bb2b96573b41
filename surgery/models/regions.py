"""The regional prompts of a live pipeline's `regions`: which part of the image each of them is for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError

if TYPE_CHECKING:
    import torch

REGIONS = "pladis_regions"  # the attribute of a pipeline that has them
_SIDE = 512  # of the canvas that boxes are drawn on, and masks brought to
_KEYS = "prompt and either box, [left, top, right, bottom] as parts of the image, or mask"


def regions_of(given: Any) -> "tuple[list[str], torch.Tensor]":
    """(prompts, (regions, height, width) bool) of regions as `surgery.regions` takes them; InputError naming one."""
    import torch

    if not isinstance(given, (list, tuple)) or not given:
        raise InputError(f"regions must be a list of mappings with {_KEYS}, not {given!r}"[:300])
    prompts, areas = [], []
    for number, one in enumerate(given):
        where = f"regions[{number}]"
        if not isinstance(one, Mapping) or set(one) not in ({"prompt", "box"}, {"prompt", "mask"}):
            raise InputError(f"{where} must have {_KEYS}, not {one!r}"[:300])
        if not isinstance(one["prompt"], str) or not one["prompt"].strip():
            raise InputError(f"{where}.prompt must be text, not {one['prompt']!r}"[:300])
        prompts.append(one["prompt"])
        areas.append(_area_of_box(where, one["box"]) if "box" in one else _area_of_mask(where, one["mask"]))
    return prompts, torch.stack(areas)


def _area_of_box(where: str, box: Any) -> "torch.Tensor":
    import torch

    numbers = isinstance(box, (list, tuple)) and len(box) == 4 and all(_is_number(one) for one in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise InputError(
            f"{where}.box must be [left, top, right, bottom] as parts of the image, 0 to 1, each first below its "
            f"second, not {box!r}"[:300]
        )
    left, top, right, bottom = (round(one * _SIDE) for one in box)
    area = torch.zeros(_SIDE, _SIDE, dtype=torch.bool)
    area[top:bottom, left:right] = True
    if not area.any():
        raise InputError(f"{where}.box {box!r} is too small to hold anything; make it larger")
    return area


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _area_of_mask(where: str, mask: Any) -> "torch.Tensor":
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    if isinstance(mask, (str, Path)):
        try:
            with Image.open(mask) as image:
                mask = image.convert("L")
        except FileNotFoundError:
            raise InputError(f"{where}.mask: there is no file {mask}") from None
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{where}.mask: {mask} is no image that can be read: {error}"[:300]) from None
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) > 127
    area = torch.as_tensor(np.asarray(mask)).squeeze().to(torch.float32)
    if area.ndim != 2 or not area.numel():
        raise InputError(f"{where}.mask must be an image, a file of one or (height, width) numbers")
    area = torch.nn.functional.interpolate(area[None, None], (_SIDE, _SIDE), mode="nearest-exact")[0, 0] > 0.5
    if not area.any():
        raise InputError(f"{where}.mask is empty: white (or 1) is the region")
    return area


def region_of_text(text: str) -> dict[str, Any]:
    """A region as the command line has it, "left,top,right,bottom=prompt" or "mask.png=prompt"; InputError if none."""
    where, equals, prompt = text.partition("=")
    if not equals or not prompt.strip():
        raise InputError(f"--region {text[:100]}: write LEFT,TOP,RIGHT,BOTTOM=PROMPT (parts of 1) or MASK.png=PROMPT")
    numbers = where.split(",")
    if len(numbers) != 4:
        return {"prompt": prompt.strip(), "mask": where.strip()}
    try:
        return {"prompt": prompt.strip(), "box": [float(number) for number in numbers]}
    except ValueError:
        raise InputError(f"--region {text[:100]}: {where} is not four numbers from 0 to 1") from None
