"""The five outlines, as the share of each pixel that they cover."""

from functools import cache

import numpy as np

_SAMPLES = 6  # per pixel and direction


@cache
def coverage(shape, size):
    """(size, size) float32 in [0, 1], read-only: the shape, stretched to fill its box, anti-aliased."""
    steps = (np.arange(size * _SAMPLES) + 0.5) / (size * _SAMPLES)
    inside = _inside(shape, *np.meshgrid(steps, steps))
    # (size, samples, size, samples) -> (size, size)
    covered = inside.reshape(size, _SAMPLES, size, _SAMPLES).mean((1, 3), dtype=np.float32)
    covered.flags.writeable = False
    return covered


def _inside(shape, x, y):
    """Whether points of the unit box, y downwards, are in the shape."""
    if shape == "circle":
        return (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25
    if shape == "square":
        return np.ones_like(x, bool)
    if shape == "triangle":
        return np.abs(x - 0.5) <= y / 2
    if shape == "cross":
        return (np.abs(x - 0.5) <= 0.18) | (np.abs(y - 0.5) <= 0.18)
    return _inside_star(x, y)


def _inside_star(x, y):
    corner = np.arange(10)
    radius, angle = np.where(corner % 2 == 0, 1.0, 0.45), corner * np.pi / 5
    corners = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    corners = (corners - corners.min(0)) / np.ptp(corners, axis=0)
    inside = np.zeros_like(x, bool)
    # A point is inside where a ray to its right crosses the outline an odd number of times.
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return inside
