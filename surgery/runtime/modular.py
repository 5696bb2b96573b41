"""diffusers' modular pipelines, opened from a folder and called as its other pipelines are.

Such a pipeline is made of blocks, whose inputs are its arguments; guidance_scale is its guider's, and nothing but its
scheduler is called after a step.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.hub.base import read_index
from surgery.hub.listing import specs_of
from surgery.models.modular import is_modular, tell_class

__all__ = ["called", "is_modular", "open_modular", "settings_of"]


def open_modular(folder: Path, given: Mapping[str, Any], dtype: Any) -> Any:
    """The modular pipeline in a folder with its components, of which `given` are not loaded.

    What the folder has of a component is loaded from there, wherever the index says that it came from. No code of the
    folder is run: blocks and classes are diffusers' and transformers' own.
    """
    import diffusers

    index = read_index(folder)
    pipeline = getattr(diffusers, str(index["_class_name"]))(pretrained_model_name_or_path=str(folder))
    known = pipeline.component_names
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"{type(pipeline).__name__} takes no {unknown[0]}; its components are {', '.join(known)}")
    for name in pipeline.pretrained_component_names:
        spec = pipeline.get_component_spec(name)
        if name not in specs_of(index) or name in given:
            continue
        if (folder / name).is_dir():
            spec.pretrained_model_name_or_path, spec.subfolder, spec.revision = str(folder), name, None
        pipeline.update_components(**{name: spec.load(dtype=dtype)})
    pipeline.update_components(**given)
    for name, component in given.items():
        tell_class(pipeline, name, component)
    return pipeline


def settings_of(pipeline: Any, arguments: Mapping[str, Any]) -> set[str]:
    """What a modular pipeline can be called with, of `arguments` and beside: its blocks' inputs and guidance_scale.

    The latter is its guider's; a pipeline that has none takes one that means no guidance.
    """
    has_scale = hasattr(getattr(pipeline, "guider", None), "guidance_scale")
    scaled = {"guidance_scale"} if has_scale or (arguments.get("guidance_scale") or 0) <= 1 else set()
    return {name for name in pipeline.default_call_parameters if name} | scaled


@contextmanager
def called(pipeline: Any, arguments: Mapping[str, Any], callback: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Yields the arguments of a call of a modular pipeline, whose guider has their guidance_scale while it lasts.

    callback: as a callback_on_step_end, called after each step of the pipeline's scheduler.
    """
    arguments = dict(arguments)
    scheduler = pipeline.scheduler
    guider: Any = getattr(pipeline, "guider", None)
    scale, before = arguments.pop("guidance_scale", None), getattr(guider, "guidance_scale", None)
    scale = None if before is None else scale
    own, steps = vars(scheduler).get("step"), 0
    step = scheduler.step

    def stepped(prediction: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        result = step(prediction, timestep, *args, **kwargs)
        callback(pipeline, steps, timestep, {})
        steps += 1
        return result

    scheduler.step = stepped
    if scale is not None:
        # Under 1 the other pipelines run no CFG, which is a guider's 1, or 0 in the paper's own formula.
        guider.guidance_scale = max(scale, 1.0) - getattr(guider, "use_original_formulation", False)
    try:
        yield arguments
    finally:
        if scale is not None:
            guider.guidance_scale = before
        del scheduler.step
        if own is not None:
            scheduler.step = own
