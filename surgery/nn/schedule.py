"""Hyperparameters that change from one denoising step to the next, as a pipeline's `callback_on_step_end`.

A schedule is plain data beside an operation, {"steps": [5, 20]} and the like:

    steps     [first, end]   the operator acts from step `first` up to, not including, step `end` (null: to the last)
    fraction  [from, to]     the same as parts of the run: step i of n lies in it if from <= i/n < to
    sigma     [low, high]    the operator acts while the noise level of the step lies in [low, high]
    <name>    [v0, v1, ...]  values of a hyperparameter: one for each step, or stretched evenly over any number of steps

A step must lie in every window that is named; outside, attention is dense. Values are written into the modules'
buffers between two calls of the model, so a compiled graph stays whole and is not compiled again.
"""

import copy
import math

from .operators import LARGEST, OPERATORS, RANGES, is_in_range, off_values

WINDOWS = ("steps", "fraction", "sigma")


def schedule_problems(schedule, operator):
    """What is wrong with a schedule for an operator: [(key or None, message)]; empty if nothing is."""
    if not isinstance(schedule, dict) or not schedule:
        return [(None, f"must name {', '.join(WINDOWS)} or a hyperparameter, with a list each")]
    problems = []
    for key, values in schedule.items():
        if key not in WINDOWS and key not in OPERATORS[operator]:
            known = ", ".join((*WINDOWS, *OPERATORS[operator]))
            problems.append((key, f"is no window and no hyperparameter of {operator}; there are {known}"))
        elif not isinstance(values, (list, tuple)) or not values:
            problems.append((key, f"must be a list, not {values!r}"))
        elif key in WINDOWS:
            problems += [(key, message) for message in window_problems(key, values)]
        else:
            wrong = [value for value in values if not is_in_range(key, value)]
            problems += [(key, f"must {RANGES[key][2]}, not {value!r}") for value in wrong[:1]]
    return problems


def stored_schedule(schedule):
    """A copy of a schedule as a config holds it: lists, and the largest number in place of infinity."""
    return {
        key: [LARGEST if value is not None and value > LARGEST else value for value in values]
        for key, values in schedule.items()
    }


def window_problems(key, values):
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


def step_values(schedule, operator, step, steps, sigma=None):
    """The hyperparameters that a schedule sets at `step` (from 0) of `steps`: {name: float}; others stay as they are.

    sigma: the step's noise level; needed where the schedule has a window of it.
    """
    if not is_inside(schedule, step, steps, sigma):
        return off_values(operator)
    lists = {name: values for name, values in schedule.items() if name not in WINDOWS}
    return {name: float(values[step * len(values) // steps]) for name, values in lists.items()}


def is_inside(windows, step, steps, sigma=None):
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
    """Carries out the schedules of a model's modules in one run of its pipeline, as `callback_on_step_end`.

        with StepSchedule(pipe, pipe.unet, steps=25) as callback:
            pipe(prompt, num_inference_steps=25, callback_on_step_end=callback)

    The first step's values are set when it is made. After the last step, or on leaving the block, every buffer is as it
    was. steps, timesteps: the run's own, from which the first step's noise level follows; without them it is taken to
    be the scheduler's largest. Needed only for a window of sigma. then: another callback_on_step_end to call after it.
    Raises ValueError where no module has a schedule, the buffers are offloaded to the meta device, or a window of sigma
    meets a scheduler that tells no noise level.
    """

    def __init__(self, pipeline, model, steps=None, then=None, timesteps=None):
        self._modules = [module for module in model.modules() if getattr(module, "pladis_schedule", None)]
        self._then = then
        if not self._modules:
            raise ValueError("no module of this model has a schedule")
        if any(module.pladis_alpha.is_meta for module in self._modules):
            raise ValueError(
                "a schedule cannot change buffers that are offloaded to the meta device; use "
                "enable_model_cpu_offload() instead of sequential or group offload of buffers"
            )
        self._needs_sigma = any("sigma" in module.pladis_schedule for module in self._modules)
        sigma = _first_sigma(pipeline.scheduler, steps, timesteps) if self._needs_sigma else None
        self._before = [module.hyperparameters() for module in self._modules]
        self._set(0, steps or len(timesteps or [0]), sigma)

    def __call__(self, pipeline, step, timestep, tensors):
        """Set the values of the step after `step`; returns `tensors`, as diffusers wants."""
        timesteps = len(pipeline.scheduler.timesteps)
        # A run that starts late, from an image of some strength, has fewer steps than the scheduler.
        steps = getattr(pipeline, "num_timesteps", None) or timesteps
        if step + 1 < steps:
            sigma = sigma_at(pipeline.scheduler, timesteps - steps + step + 1) if self._needs_sigma else None
            self._set(step + 1, steps, sigma)
        else:
            self.restore()
        return self._then(pipeline, step, timestep, tensors) if self._then else tensors

    def restore(self):
        """Put back the hyperparameters that the modules had before."""
        for module, values in zip(self._modules, self._before, strict=True):
            module.set_hyperparameters(values)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.restore()

    def _set(self, step, steps, sigma):
        for module, before in zip(self._modules, self._before, strict=True):
            changed = step_values(module.pladis_schedule, module.pladis_operator, step, steps, sigma)
            module.set_hyperparameters({**before, **changed})


def _first_sigma(scheduler, steps, timesteps):
    trial = copy.deepcopy(scheduler)
    try:
        if timesteps is not None:
            trial.set_timesteps(timesteps=list(timesteps))
        elif steps is not None:
            trial.set_timesteps(steps)
        else:
            return _largest_sigma(scheduler)
    except (ValueError, TypeError):  # wants what only the pipeline knows, such as a flow's shift
        return _largest_sigma(scheduler)
    return sigma_at(trial, 0)


def _largest_sigma(scheduler):
    if hasattr(scheduler, "alphas_cumprod"):
        return _sigma_of_alpha(float(scheduler.alphas_cumprod[-1]))
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) == 0:
        raise ValueError(
            f"{type(scheduler).__name__} tells no noise level before its timesteps are set; give steps=, or use a "
            "window of steps or fraction instead"
        )
    return float(max(sigmas))


def sigma_at(scheduler, step):
    """The noise level at a step, noise over signal: of the sigmas where the scheduler has them, else of its alphas."""
    sigmas = getattr(scheduler, "sigmas", None)
    timesteps = scheduler.timesteps
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        return float(sigmas[step])
    if hasattr(scheduler, "alphas_cumprod"):
        return _sigma_of_alpha(float(scheduler.alphas_cumprod[int(timesteps[step])]))
    raise ValueError(f"{type(scheduler).__name__} tells no noise level; use a window of steps or fraction instead")


def _sigma_of_alpha(alpha_cumprod):
    return math.sqrt(max(0.0, 1.0 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0.0 else math.inf
