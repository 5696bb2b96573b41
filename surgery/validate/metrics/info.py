"""What metrics share: what one says of itself, its precision, its batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..prompts import Prompt

Images = Sequence[Image.Image]  # in mode RGB
Files = Mapping[str, Path | str]  # where a metric's checkpoints are, by part
Device = torch.device | str


@dataclass(frozen=True)
class HubFiles:
    """Files of a Hub repository at a commit. revision None: the newest, whose commit is recorded with the scores."""

    repo: str
    files: tuple[str, ...]  # names or glob patterns
    revision: str | None = None


@dataclass(frozen=True)
class WebFile:
    """One file at a fixed address; sha256: the whole digest, or the leading digits that its publisher gives."""

    url: str
    sha256: str


@dataclass(frozen=True)
class Info:
    """A metric's name, what kind of figure it is, and its source.

    kind: "score" is a figure per image, given its prompt; "distance" one per set of images, against a reference set;
    "fidelity" one per pair, how near the patched image is to the base's own; "diversity" one per image, how
    unlike it is to the others of its prompt.
    margin: the largest difference that does not matter in practice; where the 95% interval lies within it there is "no
    difference". Ours, a tenth of what the papers report PLADIS to gain, rounded: the mean of Table 3 of PLADIS (arXiv
    2503.07677), for FID and GenEval that of SDXL in Table 1 of GAG (arXiv 2603.02531). None where they report nothing.
    """

    name: str  # clip_score
    title: str  # CLIPScore
    kind: Literal["score", "distance", "fidelity", "diversity"]
    higher_is_better: bool
    source: str  # paper or code that defines it
    checkpoints: dict[str, HubFiles | WebFile] = field(default_factory=dict)  # by the part that they play in it
    margin: float | None = None


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Without TF32, which changes features in the third digit on an NVIDIA GPU, and with deterministic algorithms.

    Puts back the caller's settings. torch.backends.cudnn.flags would do it too, but raises where the caller has set
    fp32_precision, torch's newer name for the same.
    """
    cudnn: Any = torch.backends.cudnn  # torch puts `conv` into it at import
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before


BATCH_SIZE = 16


def in_batches(
    score: Callable[[Images, list[str]], torch.Tensor],
    images: Images,
    prompts: Sequence[Prompt],
    size: int = BATCH_SIZE,
) -> np.ndarray:
    """float64 array (n,): `score(images, texts)` gives a tensor (b,) for at most `size` of n images and prompts."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images, but {len(prompts)} prompts")
    scores = []
    with torch.inference_mode(), exact_convolutions():
        for start in range(0, len(images), size):
            texts = [prompt.text for prompt in prompts[start : start + size]]
            scores += score(images[start : start + size], texts).tolist()
    return np.array(scores, dtype=np.float64)
