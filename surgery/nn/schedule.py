"""Hyperparameters that change from one denoising step to the next, as a pipeline's `callback_on_step_end`.

A schedule is plain data beside an operation, {"steps": [5, 20]} and the like:

    steps     [first, end]   the operator acts from step `first` up to, not including, step `end` (null: to the last)
    fraction  [from, to]     the same as parts of all steps: step i of n lies in it if from <= i/n < to
    sigma     [low, high]    the operator acts while the noise level of the model's input lies in [low, high]
    <name>    [v0, v1, ...]  values of a hyperparameter: one for each step, or stretched evenly over any number of steps

Steps are those that `num_inference_steps` asks for, counted from 0 at the most noise. A run that leaves some out keeps
their numbers: from an image of strength 0.5, 10 steps begin at step 5; with `denoising_end` 0.5 they end with step 4.
A scheduler of second order calls the model twice a step: both calls are that step.

A step must lie in every window that is named; outside, attention is dense. Values are written into the modules'
buffers between two calls of the model, so a compiled graph stays whole and is not compiled again.
"""

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from .hooks import offloaded_to
from .operators import LARGEST, OPERATIONS, value_problem

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

Window = Literal["steps", "fraction", "sigma"]
WINDOWS: tuple[Window, ...] = get_args(Window)


def schedule_problems(schedule: object, operator: str) -> list[tuple[str | None, str]]:
    """What is wrong with a schedule for an operator or addition: [(key or None, message)]; empty if nothing is."""
    if not isinstance(schedule, dict) or not schedule:
        return [(None, f"must name {', '.join(WINDOWS)} or a hyperparameter, with a list each")]
    problems = []
    for key, values in schedule.items():
        if key not in WINDOWS and key not in OPERATIONS[operator].defaults:
            known = ", ".join((*WINDOWS, *OPERATIONS[operator].defaults))
            problems.append((key, f"is no window and no hyperparameter of {operator}; there are {known}"))
        elif not isinstance(values, (list, tuple)) or not values:
            problems.append((key, f"must be a list, not {values!r}"))
        elif key in WINDOWS:
            problems += [(key, message) for message in window_problems(key, values)]
        else:
            wrong = [problem for value in values if (problem := value_problem(key, value))]
            problems += [(key, problem) for problem in wrong[:1]]
    return problems


def stored_schedule(schedule: Mapping[str, Sequence]) -> dict[str, list]:
    """A copy of a schedule as a config holds it: lists, and the largest number in place of infinity."""
    return {
        key: [LARGEST if value is not None and value > LARGEST else value for value in values]
        for key, values in schedule.items()
    }


def window_problems(key: Window, values: Sequence) -> list[str]:
    """What is wrong with a window, [from, to], of one of WINDOWS; empty if nothing is."""
    if len(values) != 2:
        return [f"must be two numbers, from and to, not {len(values)}"]
    low, high = values
    if key == "steps":
        if not _is_count(low) or not (high is None or _is_count(high)):
            return [f"must be two step numbers of 0 or above (the second may be null), not {list(values)!r}"]
        return [] if high is None or low < high else [f"must rise: {low} to {high} holds no step"]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return [f"must be two numbers, not {list(values)!r}"]
    if not 0 <= low < high or math.isinf(low) or (key == "fraction" and high > 1):
        return [f"must rise from 0 or above{' to at most 1' if key == 'fraction' else ''}, not {list(values)!r}"]
    return []


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def step_values(
    schedule: dict[str, list], operator: str, step: int, steps: int, sigma: float | None = None
) -> dict[str, float]:
    """The hyperparameters that a schedule sets at `step` (from 0) of `steps`: {name: float}; others stay as they are.

    sigma: the noise level; needed where the schedule has a window of it.
    """
    if not is_inside(schedule, step, steps, sigma):
        return dict(OPERATIONS[operator].off)
    lists = {name: values for name, values in schedule.items() if name not in WINDOWS}
    return {name: float(values[step * len(values) // steps]) for name, values in lists.items()}


def is_inside(windows: dict[str, list], step: int, steps: int, sigma: float | None = None) -> bool:
    """Whether `step` (from 0) of `steps` lies in every window of a schedule; sigma: its noise level, as there."""
    inside = True
    for key in WINDOWS:
        if key in windows:
            low, high = windows[key]
            position = {"steps": step, "fraction": step / steps, "sigma": sigma}[key]
            # An end that was infinite is stored as LARGEST, and pure noise is an infinite level.
            below_end = position <= high or high >= LARGEST if key == "sigma" else high is None or position < high
            inside = inside and low <= position and below_end
    return inside


class StepSchedule:
    """Carries out the schedules of a model's modules, or of several models', in one run of their pipeline.

    It is a `callback_on_step_end`:

        with StepSchedule(pipe, pipe.unet) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)

    The first call's values are set when it is made, and again when the pipeline sets its scheduler. After the last
    step, or on leaving the block, every buffer is as it was. steps, timesteps: taken, but not needed: the scheduler
    tells them. then: another callback_on_step_end to call after it.
    Raises ValueError where no module has a schedule, the buffers are offloaded to the meta device, or a window of sigma
    meets a scheduler that tells no noise level.
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        model: nn.Module | Iterable[nn.Module],
        steps: int | None = None,
        then: Callable | None = None,
        timesteps: list | None = None,
    ):
        models = [model] if isinstance(model, nn.Module) else list(model)
        self._modules: list[Any] = [part for own in models for part in own.modules() if schedules_of(part)]
        self._then = then
        if not self._modules:
            raise ValueError("no module of this model has a schedule")
        if where := next(filter(None, (offloaded_to(own, self._modules) for own in models)), None):
            raise ValueError(
                f"a schedule cannot change buffers that are offloaded {where}; use "
                "enable_model_cpu_offload() instead of sequential or group offload of buffers"
            )
        self._needs_sigma = any("sigma" in own for module in self._modules for _, own in schedules_of(module))
        self._before = [module.hyperparameters() for module in self._modules]
        self._watched = []
        scheduler = pipeline.scheduler
        if getattr(scheduler, "timesteps", None) is not None:
            self._set(scheduler, 0)
        # No callback comes before the first call of the model. A pipeline that may begin late asks itself where.
        self._watch(scheduler, "set_timesteps", lambda _: self._set(scheduler, 0))
        if hasattr(pipeline, "get_timesteps"):
            self._watch(
                pipeline,
                "get_timesteps",
                lambda found: self._set(scheduler, len(scheduler.timesteps) - len(found[-2])),
            )

    def __call__(self, pipeline, step, timestep, tensors):
        """Set the values of the call after the one at `timestep`; returns `tensors`, as diffusers wants."""
        scheduler = pipeline.scheduler
        count = len(scheduler.timesteps)
        # Fewer where the run begins late, from an image of some strength, or ends early, with denoising_end.
        run = getattr(pipeline, "num_timesteps", None) or count
        index = getattr(scheduler, "step_index", None)  # of the next call
        if index is None:
            index = index_of(scheduler, timestep, count - run + step, step) + 1
        if step + 1 < run and index < count:
            self._set(scheduler, index)
        else:
            self.restore()
        return self._then(pipeline, step, timestep, tensors) if self._then else tensors

    def restore(self) -> None:
        """Put back the hyperparameters that the modules had before."""
        for module, values in zip(self._modules, self._before, strict=True):
            module.set_hyperparameters(values)
        for holder, name in self._watched:
            vars(holder).pop(name, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()

    def _watch(self, holder, name, then):
        """Have then(result) called after each call of a method."""
        method = getattr(type(holder), name)

        @functools.wraps(method)
        def watched(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            if self is holder:  # not a copy of it
                then(result)
            return result

        setattr(holder, name, types.MethodType(watched, holder))
        self._watched.append((holder, name))

    def _set(self, scheduler, index):
        step, steps = step_at(scheduler, index)
        sigma = sigma_at(scheduler, index) if self._needs_sigma else None
        for module, before in zip(self._modules, self._before, strict=True):
            for name, schedule in schedules_of(module):
                before = {**before, **step_values(schedule, name, step, steps, sigma)}
            module.set_hyperparameters(before)


def schedules_of(module: nn.Module) -> list[tuple[str, dict[str, list]]]:
    """[(operator or addition, its schedule)] of a module, where it has any."""
    own = [(getattr(module, "pladis_operator", ""), getattr(module, "pladis_schedule", None))]
    own += getattr(module, "pladis_additions", {}).items()  # copies of older code have none
    return [(name, schedule) for name, schedule in own if schedule]


def index_of(scheduler: "SchedulerMixin", timestep: float | Tensor, *counted: int) -> int:
    """Where among a scheduler's timesteps the model's call at `timestep` stands, for a scheduler that does not tell.

    counted: where it may be by count, the likeliest first: which it is of several equal ones, or if there is none.
    """
    timestep = float(timestep.flatten()[0] if hasattr(timestep, "flatten") else timestep)
    places = [index for index, value in enumerate(scheduler.timesteps.tolist()) if value == timestep]
    return next((index for index in counted if index in places), (places or counted)[0])


def step_at(scheduler: "SchedulerMixin", index: int) -> tuple[int, int]:
    """(step from 0, how many were asked for) of the model's call at an index of a scheduler's timesteps."""
    calls, order = len(scheduler.timesteps), getattr(scheduler, "order", 1)
    asked: Any = getattr(scheduler, "num_inference_steps", None)
    if order > 1:
        return index // order, -(-calls // order)  # the last step is of first order
    if hasattr(scheduler, "prk_timesteps"):  # PNDM: four calls for each of its first three steps, or two for the first
        four = len(scheduler.prk_timesteps)
        return (index // 4 if index < four else max(index - max(four * 3 // 4, 1), 0)), asked
    return index, asked if asked == calls - 1 else calls  # SCM's last timestep is the end, not a call


def sigma_at(scheduler: "SchedulerMixin", index: int) -> float:
    """The noise level at an index of a scheduler's timesteps, noise over signal: of its sigmas, else of its alphas."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    between = getattr(scheduler, "order", 1) == 2 and index % 2 and timesteps[index] != timesteps[index + 1]
    if sigmas is not None and len(sigmas) >= len(timesteps) and not between:
        return float(sigmas[index])
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} tells no noise level; use a window of steps or fraction instead")
    # KDPM2's second calls lie between two sigmas, at a timestep that is no whole number.
    alphas, timestep = scheduler.alphas_cumprod, float(timesteps[index])
    low, part = int(timestep), timestep % 1
    level = _sigma_of_alpha(float(alphas[low]))
    return level * (_sigma_of_alpha(float(alphas[low + 1])) / level) ** part if part else level


def _sigma_of_alpha(alpha_cumprod):
    return math.sqrt(max(0.0, 1.0 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0.0 else math.inf
