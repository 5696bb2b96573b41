"""Prompts for the shapes pipeline, and whether an image shows what its prompt says.

In the manner of GenEval (Ghosh et al. 2023): a detector lists the objects of an image, and a prompt is satisfied when
the objects it names are there, in their number, colours and relation. The detector is exact arithmetic on flat
coloured shapes: connected regions that differ from the background, the nearest palette colour of each, and the shape
template that overlaps it best.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

PALETTE = {
    "red": (220, 40, 40),
    "green": (35, 165, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 50, 180),
    "orange": (250, 135, 25),
    "cyan": (60, 205, 225),
    "black": (25, 25, 25),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
CATEGORIES = ("single", "colour", "two_objects", "counting", "position", "colour_attribution")

_SIDE = 32  # pixels of a normalised shape mask
_COLOURS = np.array(list(PALETTE.values()), float)


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the (colour or None, shape) of each object that it names; `relation` of the first to the second."""

    category: str
    text: str
    objects: tuple[tuple[str | None, str], ...]
    relation: str | None = None


@dataclass(frozen=True)
class Found:
    """One region of an image: colour and shape, None where neither is recognised; its centre in pixels."""

    colour: str | None
    shape: str | None
    x: float
    y: float


def make_prompts(per_category, seed=0):
    """`per_category` prompts of each category, drawn from a seed."""
    random = np.random.default_rng(seed)
    prompts = []
    for index in range(per_category):
        colours = [str(c) for c in random.permutation(list(PALETTE))[:2]]
        first, second = (str(s) for s in random.permutation(list(SHAPES))[:2])
        count = 2 + index % 3
        relation = list(RELATIONS)[index % 4]
        named, other = _noun(first, colours[0]), _noun(second, colours[1])
        objects = ((colours[0], first), (colours[1], second))
        shapes_only = ((None, first), (None, second))
        prompts += [
            Prompt("single", _noun(first), shapes_only[:1]),
            Prompt("colour", named, objects[:1]),
            Prompt("two_objects", f"{_noun(first)} and {_noun(second)}", shapes_only),
            Prompt("counting", f"{NUMBERS[count]} {colours[0]} {SHAPES[first]}", objects[:1] * count),
            Prompt("position", f"{_noun(first)} {RELATIONS[relation]} {_noun(second)}", shapes_only, relation),
            Prompt("colour_attribution", f"{named} and {other}", objects),
        ]
    return prompts


def is_satisfied(prompt, found):
    """Whether the objects found in an image are what the prompt says."""
    free = list(found)
    for colour, shape in prompt.objects:
        match = next((f for f in free if f.shape == shape and colour in (None, f.colour)), None)
        if match is None:
            return False
        free.remove(match)
    if prompt.category == "counting":
        colour, shape = prompt.objects[0]
        return sum(f.shape == shape and f.colour == colour for f in found) == len(prompt.objects)
    if prompt.relation:
        first, second = ([f for f in found if f.shape == shape] for _, shape in prompt.objects)
        return any(_relates(a, prompt.relation, b) for a in first for b in second)
    return True


def detect(image):
    """The Found objects of an RGB image, (height, width, 3) uint8."""
    image = image.astype(float)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    contrast = np.linalg.norm(image - np.median(border, axis=0), axis=-1)
    nearest = np.linalg.norm(image[..., None, :] - _COLOURS, axis=-1).argmin(-1)
    labels, count = ndimage.label(contrast > 60)
    found = []
    for region in (labels == number for number in range(1, count + 1)):
        if region.sum() < 30:
            continue
        core = ndimage.binary_erosion(region)
        core = core if core.sum() >= 8 else region
        votes = np.bincount(nearest[core], minlength=len(PALETTE))
        # Touching objects are one region; edges blend into other colours, so a colour needs a fifth of the core.
        for colour in np.flatnonzero(votes > 0.2 * core.sum()):
            alone = (votes > 0.2 * core.sum()).sum() == 1
            parts, pieces = ndimage.label(region if alone else region & (nearest == colour))
            for part in (parts == number for number in range(1, pieces + 1)):
                if part.sum() >= 30:
                    found.append(_describe(part, image))
    return found


def _describe(part, image):
    rows, columns = np.where(part)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    mask = _normalised(part)
    overlap = {
        shape: max((mask & t).sum() / (mask | t).sum() for t in templates) for shape, templates in _TEMPLATES.items()
    }
    best = max(overlap, key=overlap.get)
    recognised = overlap[best] >= 0.72 and 2 / 3 < width / height < 3 / 2
    core = ndimage.binary_erosion(part)
    distances = np.linalg.norm(np.median(image[core if core.any() else part], axis=0) - _COLOURS, axis=-1)
    colour = list(PALETTE)[distances.argmin()] if distances.min() < 70 else None
    return Found(colour, best if recognised else None, columns.mean(), rows.mean())


def _normalised(mask):
    """The mask's bounding box, resampled to _SIDE x _SIDE."""
    rows, columns = np.where(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    steps = [((np.arange(_SIDE) + 0.5) * side / _SIDE).astype(int) for side in box.shape]
    return box[steps[0]][:, steps[1]]


def _templates():
    """Each shape's mask, sharp and with the corners rounded as a decoder rounds them."""
    grid = (np.arange(96) + 0.5) / 96
    x, y = np.meshgrid(grid, grid)
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    corners = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    corners = (corners - corners.min(0)) / np.ptp(corners, axis=0)
    inside = np.zeros_like(x, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay + 1e-12) + ax)
    sharp = {
        "circle": (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25,
        "square": np.ones_like(x, bool),
        "triangle": np.abs(x - 0.5) <= y / 2,
        "star": inside,
        "cross": (np.abs(x - 0.5) <= 0.18) | (np.abs(y - 0.5) <= 0.18),
    }
    blurs = ((0.01, 0.5), (4, 0.5), (8, 0.5), (4, 0.35))
    return {
        shape: [_normalised(ndimage.gaussian_filter(np.pad(mask, 16).astype(float), s) > t) for s, t in blurs]
        for shape, mask in sharp.items()
    }


_TEMPLATES = _templates()


def _relates(first, relation, second):
    along, across = first.x - second.x, first.y - second.y
    if relation in ("above", "below"):
        along, across = across, along
    distance = -along if relation in ("left", "above") else along
    return distance > 4 and distance > 0.8 * abs(across)


def _noun(shape, colour=None):
    words = f"{colour} {shape}" if colour else shape
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
