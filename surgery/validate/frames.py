"""What a metric of images says of drawn files: of an image its value, of a video the mean over its frames."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from surgery.runtime.sheet import evenly
from surgery.runtime.video import Video

from .prompts import Prompt
from .store import read_drawn

SCORED = 8  # frames of a video, evenly spaced, its first and last among them
RULE = f"scores are the mean of {SCORED} evenly spaced frames, first and last among them; fidelity that of all frames"


def scored(metric: Any, files: Sequence[Path], prompts: Sequence[Prompt]) -> np.ndarray:
    """The score (n,) of each file by its prompt, float64; metric: of the kind "score"."""
    values = []
    for some, those in _together(files, prompts):
        frames = [[of[place] for place in evenly(len(of), SCORED)] for of in map(_frames, some)]
        texts = [prompt for prompt, of in zip(those, frames, strict=True) for _ in of]
        values += _means(metric.score(list(chain(*frames)), texts), frames)
    return np.array(values, np.float64)


def compared(metric: Any, files: Sequence[Path], others: Sequence[Path]) -> np.ndarray:
    """How close each file (n,) is to the other one, frame by frame, float64; metric: of the kind "fidelity"."""
    values = []
    for some, those in _together(files, others):
        frames, theirs = ([list(_frames(file)) for file in chosen] for chosen in (some, those))
        values += _means(metric.compare(list(chain(*frames)), list(chain(*theirs))), frames)
    return np.array(values, np.float64)


def _together(files, others) -> Iterator[tuple[list, list]]:
    """What is judged in one call: all files where they are images, each alone where they are videos."""
    size = 1 if files and isinstance(read_drawn(files[0]), Video) else max(1, len(files))
    for start in range(0, len(files), size):
        yield list(files[start : start + size]), list(others[start : start + size])


def _frames(file):
    drawn = read_drawn(file)
    return drawn.frames if isinstance(drawn, Video) else [drawn]


def _means(values, frames):
    """The mean of each file's frames."""
    ends = np.cumsum([len(of) for of in frames])[:-1]
    return [float(np.mean(part)) for part in np.split(np.asarray(values, np.float64), ends)]
