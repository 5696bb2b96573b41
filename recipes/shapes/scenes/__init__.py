"""Scenes of coloured shapes: drawn, captioned, found again in an image, and compared with what a prompt asks for."""

from .detecting import Found, detect
from .judging import is_satisfied
from .scenes import SHIPPED_HELD_OUT, Drawn, HeldOut, Scene, captions, render, sample_scene

__all__ = [
    "SHIPPED_HELD_OUT",
    "Drawn",
    "Found",
    "HeldOut",
    "Scene",
    "captions",
    "detect",
    "is_satisfied",
    "render",
    "sample_scene",
]
