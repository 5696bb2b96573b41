"""Paired images: every prompt and seed from the base and from the patched pipeline, kept as they are drawn."""

from .jobs import Job, jobs_of
from .run import draw_sides
from .sides import Side, base_side, environment, identity_of, operator_code, patched_side, sides_of
from .store import ImageStore

__all__ = [
    "ImageStore",
    "Job",
    "Side",
    "base_side",
    "draw_sides",
    "environment",
    "identity_of",
    "jobs_of",
    "operator_code",
    "patched_side",
    "sides_of",
]
