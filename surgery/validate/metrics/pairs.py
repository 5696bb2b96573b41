"""Pairs of a patched and a base image as tensors, for the fidelity metrics."""

import numpy as np
import torch

from surgery.errors import InputError


def pair_tensors(patched, base, device, title, smallest):
    """Yield (patched, base) as float64 tensors (1, 3, height, width) in [0, 1], one pair after another.

    Raises InputError for as many patched as base images not being there, for a pair of different sizes and for one with
    a side under `smallest` pixels; it says which pair, counted from 0. title: the metric's, for the errors.
    """
    if len(patched) != len(base):
        raise InputError(f"{title} compares pairs, but there are {len(patched)} patched and {len(base)} base images")
    for index, (one, other) in enumerate(zip(patched, base, strict=True)):
        if one.size != other.size:
            raise InputError(
                f"{title}: in pair {index} the patched image is {_size(one)} and the base's {_size(other)}; "
                "generate both at one height and width"
            )
        if min(one.size) < smallest:
            raise InputError(
                f"{title}: pair {index} is {_size(one)}, and each side must have at least {smallest} pixels; "
                "generate larger images or leave this metric out"
            )
        yield _tensor(one, device), _tensor(other, device)


def torchmetrics_function(name):
    """A function of torchmetrics.functional.image; InputError where torchmetrics is not installed."""
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise InputError(f"{name} needs torchmetrics, which is not installed: pip install torchmetrics") from error
    return getattr(image, name)


def _tensor(image, device):
    pixels = torch.from_numpy(np.array(image)).to(device)  # (height, width, 3), uint8
    return pixels.permute(2, 0, 1)[None].double() / 255


def _size(image):
    return f"{image.width}x{image.height}"
