"""Which coloured shapes an image shows: regions of another colour than the background, each told by its outline.

An outline is compared as a soft coverage, scaled to its area about its centroid, with templates of several sharpnesses:
a decoder that smooths small shapes changes a hard mask's box and corners, but hardly its area and centroid.

What templates cannot tell is a small smoothed star from a disc. There its symmetry decides, by the moments of z^3, z^4
and z^5 about the centroid, each beside that of |z|^k: all are zero for a disc, and a star's largest is the fifth. Since
z^k is harmonic, smoothing by a round kernel leaves its moment as it is (the mean value property).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from surgery.recipes.shapes.scenes.scenes import coverage
from surgery.recipes.shapes.scenes.vocabulary import COLOURS, PALETTE, SHAPES

_CONTRAST = 60  # RGB distance from the background at which an object begins; the palette is 135 or more away
_SMALLEST_AREA = 30  # pixels; the smallest star drawn covers 75
_COLOUR_SHARE = 0.1  # of a region without its rim, for a colour to be an object of its own
_COLOUR_DISTANCE = 70  # RGB; neighbouring colours of the palette are 86 or more apart
_MISFIT = 0.12  # squared difference from the best template, as a share of the outline's own square
_FIVEFOLD = 0.09  # the least fifth moment of a star
_GRID = 25  # points a side of a scaled outline ...
_REACH = 1.15  # ... which reaches so far from the centroid, in units of the root of its area
_BLURS = (0.0, 0.06, 0.12, 0.18, 0.24)  # standard deviations of the templates' smoothing, in the same unit


@dataclass(frozen=True)
class Found:
    """One region of an image: colour and shape, None where neither is recognised; its centroid in pixels."""

    colour: str | None
    shape: str | None
    x: float
    y: float


def detect(image):
    """The Found objects of an RGB image, (height, width, 3) uint8; regions come in reading order of their first pixel.

    A region is one object if its outline is a shape's, whatever shades it has; if not, each piece of one colour is, as
    where objects of two colours touch. Objects of one colour that touch are one region of no known shape.
    """
    from scipy import ndimage

    image = np.asarray(image).astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    contrast = np.linalg.norm(image - np.median(border, axis=0), axis=-1)
    regions, count = ndimage.label(contrast > _CONTRAST)
    found = []
    for number in range(1, count + 1):
        region = regions == number
        if region.sum() < _SMALLEST_AREA:
            continue
        free = (regions == 0) | region
        whole = _describe(region, free, image, contrast)
        pieces = [] if whole.shape else [_describe(piece, free, image, contrast) for piece in _pieces(region, image)]
        found += pieces or [whole]
    return found


def _pieces(region, image):
    """The masks of a region's pieces of one colour each; none if it is of one colour."""
    from scipy import ndimage

    distances = np.linalg.norm(image[..., None, :] - _palette(), axis=-1)  # (height, width, colours)
    core = ndimage.binary_erosion(region)
    core = core if core.any() else region
    votes = np.bincount(distances[core].argmin(-1), minlength=len(COLOURS))
    colours = np.flatnonzero(votes > _COLOUR_SHARE * core.sum())
    if len(colours) < 2:
        return []
    nearest = colours[distances[..., colours].argmin(-1)]
    pieces = []
    for colour in colours:
        labels, count = ndimage.label(region & (nearest == colour))
        pieces += [labels == number for number in range(1, count + 1)]
    return [piece for piece in pieces if piece.sum() >= _SMALLEST_AREA]


def _describe(part, free, image, contrast):
    """The Found of the object with the pixels `part`; its soft edge may be where it is `free`."""
    from scipy import ndimage

    around = ndimage.binary_dilation(part, iterations=3) & free
    outline = np.where(around, np.minimum(contrast / np.percentile(contrast[part], 90), 1), 0)
    # A smoothed object is a mixture with the background, least so where it stands out most.
    strongest = part & (contrast >= np.percentile(contrast[part], 60))
    distances = np.linalg.norm(np.median(image[strongest], axis=0) - _palette(), axis=-1)
    colour = COLOURS[distances.argmin()] if distances.min() < _COLOUR_DISTANCE else None
    rows, columns = np.nonzero(part)
    return Found(colour, _shape(_scaled(outline)), float(columns.mean()), float(rows.mean()))


def _palette():
    return np.array(list(PALETTE.values()), np.float32)


def _shape(outline):
    """The name of a scaled outline's shape, None if it is like none."""
    names, templates = _templates()
    misfits = ((templates - outline) ** 2).sum((1, 2)) / (outline**2).sum()
    if misfits.min() > _MISFIT:
        return None
    threefold, fourfold, fivefold = (_symmetry(outline, order) for order in (3, 4, 5))
    if fivefold > max(_FIVEFOLD, abs(threefold), abs(fourfold)):
        return "star"
    return names[misfits.argmin()]


def _symmetry(outline, order):
    """The moment of z^order of a scaled outline, from -1 to 1: positive if a corner points up, 0 for a disc."""
    steps = np.linspace(-_REACH, _REACH, _GRID)
    z = 1j * steps - steps[:, None]  # the real axis points up
    return float((outline * (z**order).real).sum() / (outline * np.abs(z) ** order).sum())


def _scaled(outline):
    """(_GRID, _GRID): a coverage about its centroid, in units of the root of its area."""
    from scipy import ndimage

    area = outline.sum()
    rows, columns = np.indices(outline.shape)
    steps = np.linspace(-_REACH, _REACH, _GRID) * np.sqrt(area)
    down, across = (outline * rows).sum() / area + steps, (outline * columns).sum() / area + steps
    return ndimage.map_coordinates(outline, np.meshgrid(down, across, indexing="ij"), order=1)


@cache
def _templates():
    """Names and scaled outlines, (templates, _GRID, _GRID): each shape in each sharpness."""
    from scipy import ndimage

    names, outlines = [], []
    for shape in SHAPES:
        drawn = np.pad(coverage(shape, 64), 48)
        for blur in _BLURS:
            names.append(shape)
            outlines.append(_scaled(ndimage.gaussian_filter(drawn, blur * np.sqrt(drawn.sum()))))
    return names, np.stack(outlines)
