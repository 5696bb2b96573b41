"""Which pipelines draw videos, and at what rate their frames are meant to be shown."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

USUAL_RATE = 16  # frames a second, where neither the sampling settings nor the pipeline say


def draws_videos(pipeline_class: "type | str | None") -> bool:
    """Whether pipelines of a class of diffusers, or of that name, draw videos: those that ask how many frames.

    Of a modular pipeline's class as its default blocks do.
    """
    return "num_frames" in _parameters(pipeline_class)


def frame_rate(pipeline_class: "type | str | None", sampling: Mapping[str, Any]) -> int:
    """Frames a second: the sampling's `fps`, else the default of a model that is told its rate, else USUAL_RATE."""
    if sampling.get("fps"):
        return sampling["fps"]
    told = _parameters(pipeline_class).get("frame_rate")
    return told.default if told is not None and isinstance(told.default, int) else USUAL_RATE


def number_of_frames(pipeline_class: "type | str | None", sampling: Mapping[str, Any]) -> int | None:
    """How many frames a video has: the sampling's `num_frames`, else the pipeline's default; None of images."""
    told = _parameters(pipeline_class).get("num_frames")
    if told is None:
        return None
    return sampling.get("num_frames") or (told.default if isinstance(told.default, int) else None)


def _parameters(pipeline_class):
    if isinstance(pipeline_class, str):
        import diffusers

        pipeline_class = getattr(diffusers, pipeline_class, None)
    if pipeline_class is None:
        return {}
    if hasattr(pipeline_class, "default_blocks_name"):
        return _inputs_of_blocks(pipeline_class.default_blocks_name)
    return inspect.signature(pipeline_class.__call__).parameters


@functools.cache
def _inputs_of_blocks(name):
    """{name: input, with its `default`} of a modular pipeline's blocks, where they give videos; else {}."""
    import diffusers

    blocks = getattr(diffusers, str(name), None)
    if blocks is None:
        return {}
    made = blocks()
    gives = {output.name for output in made.outputs}
    return {given.name: given for given in made.inputs if given.name} if "videos" in gives else {}
