"""Shape alignment: whether an image of the tiny shapes pipeline shows what its prompt says."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery.errors import InputError
from surgery.recipes.shapes.scenes.detecting import detect
from surgery.recipes.shapes.scenes.judging import is_satisfied, problem_with
from surgery.recipes.shapes.scenes.scenes import SIDE

from ..prompts import Prompt
from .info import Device, Files, Images, Info


class ShapeAlignment:
    """1 for an image that shows what its prompt says and 0 for one that does not; no checkpoint, no network.

    It is for the shapes prompts and for images like those of recipes/shapes, flat coloured shapes of 64x64 pixels on a
    light background, and means nothing for others.
    """

    info = Info(
        name="shape_alignment",
        title="Shape alignment",
        margin=0.005,  # as GenEval
        kind="score",
        higher_is_better=True,
        source="this package; the rules of GenEval (Ghosh et al. 2023, arXiv 2310.11513) on shapes found by geometry",
    )

    @staticmethod
    def check_prompts(prompts: Iterable[Prompt]) -> None:
        """Raise InputError unless all `Prompt`s have the facts of the shapes prompts."""
        for prompt in prompts:
            problem = problem_with(prompt.facts)
            if problem:
                raise InputError(
                    f"shape_alignment judges the shapes prompts, for the pipeline of recipes/shapes, and "
                    f"{prompt.text[:80]!r} {problem}; give `prompts: shapes`, or leave the metric out"
                )

    @staticmethod
    def check_sampling(sampling: Mapping[str, Any]) -> None:
        """Raise InputError for an artifact whose sampling settings give images of another size."""
        size = sampling.get("width", SIDE), sampling.get("height", SIDE)
        if any(side not in (None, SIDE) for side in size):
            raise _other_size(*size)

    def __init__(self, files: Files, device: Device) -> None:
        """files is empty and device unused: the arithmetic is numpy's. InputError where scipy is not installed."""
        try:
            import scipy.ndimage  # noqa: F401
        except ImportError as error:
            raise InputError("shape_alignment needs scipy, which is not installed: pip install scipy") from error

    def score(self, images: Images, prompts: Sequence[Prompt]) -> np.ndarray:
        """float64 array (n,) of 1 or 0 for n RGB PIL images of 64x64 pixels and their `Prompt`s.

        Raises InputError, before any image is judged, for one of another size and for a prompt without facts.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
        self.check_prompts(prompts)
        for image in images:
            if image.size != (SIDE, SIDE):
                raise _other_size(image.width, image.height)
        verdicts = [
            is_satisfied(prompt.facts, detect(np.asarray(image))) for image, prompt in zip(images, prompts, strict=True)
        ]
        return np.array(verdicts, dtype=np.float64)


def _other_size(width, height):
    return InputError(
        f"shape_alignment judges images of {SIDE}x{SIDE} pixels, as the pipeline of recipes/shapes draws them, not "
        f"{width}x{height}; leave the metric out, or generate at that size"
    )
