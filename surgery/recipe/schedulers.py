"""What is wrong with a recipe's scheduler and timesteps, found by making the scheduler and using it."""

import inspect
from collections.abc import Mapping

from surgery.errors import BaseError, Problem, nearest
from surgery.hub import HubBase, LocalBase
from surgery.hub.foreign import first_line, reading, size_problem
from surgery.hub.listing import components_of

from .document import Document
from .schema import Recipe

_LARGEST = 100_000  # of a whole number; a scheduler has a table of as many entries as it was trained with timesteps
_CONFIG = "scheduler/scheduler_config.json"


def scheduler_problems(
    base: LocalBase | HubBase, model_index: Mapping, recipe: Recipe, document: Document
) -> list[Problem]:
    """The Problems of `base.scheduler` and `sampling.timesteps`, found by making the scheduler and using it."""
    import diffusers

    scheduler, location = recipe.base.scheduler, ("base", "scheduler")
    _, name = components_of(model_index).get("scheduler", (None, ""))  # none either where it is no pair of names
    base_class = getattr(diffusers, name, None)
    if scheduler is None and recipe.sampling.timesteps is None:
        return []
    if _CONFIG not in base.files or not inspect.isclass(base_class):
        return [document.problem(location, "the base has no scheduler config to start from")]
    if scheduler is None:
        if problem := size_problem(base.read_json(_CONFIG)):
            raise BaseError(f"{base.name}/{_CONFIG} cannot be right: {problem}; fetch the base again")
        with reading(f"{base.name}/{_CONFIG} makes no {base_class.__name__}", kind=BaseError):
            made = base_class.from_config(base.read_json(_CONFIG))  # pyright: ignore[reportAttributeAccessIssue]
        return _sampling_problems(made, recipe.sampling, document)

    scheduler_class = getattr(diffusers, scheduler.class_name, None)
    if not (inspect.isclass(scheduler_class) and hasattr(scheduler_class, "set_timesteps")):
        near = nearest(scheduler.class_name, [name for name in dir(diffusers) if name.endswith("Scheduler")])
        hint = f'did you mean "{near}"?' if near else ""
        return [document.problem((*location, "class"), f"diffusers has no scheduler {scheduler.class_name}", hint)]
    if not hasattr(scheduler_class, "scale_model_input"):  # flow matching and the like
        message = f"{scheduler.class_name} does not fit a pipeline made for {base_class.__name__}"
        return [document.problem((*location, "class"), message)]
    valid = [name for name in inspect.signature(scheduler_class.__init__).parameters if name != "self"]
    problems = []
    for key in scheduler.overrides():
        if key not in valid:
            near = nearest(key, valid)
            hint = f'did you mean "{near}"?' if near else f"it takes {', '.join(valid)}"
            problems.append(document.problem((*location, key), f"is no setting of {scheduler.class_name}", hint))
        elif isinstance(scheduler.overrides()[key], int) and abs(scheduler.overrides()[key]) > _LARGEST:
            problems.append(document.problem((*location, key), f"is too large: {_LARGEST} at most"))
    if problems:
        return problems
    try:
        make = scheduler_class.from_config  # pyright: ignore[reportAttributeAccessIssue]
        made = make(base.read_json(_CONFIG), **scheduler.overrides())
        made.set_timesteps(recipe.sampling.steps or 4)
    except Exception as error:  # a scheduler's constructor does arithmetic with whatever it is given
        settings = ", ".join(f"{key}={value}" for key, value in scheduler.overrides().items())
        message = f"{scheduler.class_name} does not work with {settings}: {first_line(error)}"
        return [document.problem(location, message)]
    return _sampling_problems(made, recipe.sampling, document)


def _sampling_problems(scheduler, sampling, document):
    if sampling.timesteps is None:
        return []
    location = ("sampling", "timesteps")
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        name = type(scheduler).__name__
        hint = "give steps instead, or another base.scheduler, such as LCMScheduler"
        return [document.problem(location, f"{name} takes no timesteps of one's own", hint)]
    try:
        scheduler.set_timesteps(timesteps=sampling.timesteps)
    except Exception as error:  # as above
        return [document.problem(location, f"{type(scheduler).__name__} refuses them: {first_line(error)}")]
    return []
