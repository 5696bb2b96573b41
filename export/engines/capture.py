"""Real inputs of a pipeline's components, one component in memory at a time.

The pipeline is run several times, each time with one kind of component whole and the others hollow: on the meta device,
giving back what they gave when they were whole. So the largest component, not the sum, is what is held.
"""

import inspect
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from surgery.engines.calls import parameter_names, take_apart, take_result_apart

PROMPT = "three red apples to the left of a blue ceramic bowl, a wooden table, morning light"
# Most pipelines pad every text to one length; where it follows the prompt (Qwen-Image) these are its ends.
PROMPTS = {"shortest": "", "longest": " ".join([PROMPT] * 64)}
STEPS = 2  # of denoising: one call at pure noise, one amid
# The `sampling` that a denoiser's inputs depend on; height and width are the profile's.
_CAPTURED_WITH = ("guidance_scale", "true_cfg_scale", "num_frames", "max_sequence_length", "negative_prompt")


@dataclass
class Call:
    """A call of a module, taken apart, and what it returned."""

    tensors: dict
    constants: dict
    template: dict
    results: dict
    output: str


@dataclass
class Recorded:
    """Calls of one module by corner, {"usual": [Call], "low": ..., ...}: the profile's, and those of PROMPTS."""

    method: str = "forward"
    calls: dict[str, list[Call]] = field(default_factory=dict)

    @property
    def first(self):
        """The first call of the usual size."""
        return self.calls["usual"][0]

    @property
    def first_calls(self):
        """{corner: its first call}"""
        return {corner: calls[0] for corner, calls in self.calls.items()}


class Stop(Exception):
    """Enough was seen of a run."""


def _stop_after_the_last_step(pipeline, step, timestep, tensors):
    """A callback_on_step_end: some pipelines (FLUX.2) need the VAE's tensors even for latents, and it is hollow."""
    if step + 1 >= STEPS:
        raise Stop
    return tensors


def hollow(module, device):
    """A module without its weights, in place: on the meta device, but telling `device` as where it is."""
    kind = type(module)
    module.to("meta")
    inside = {"device": property(lambda self: device), "__module__": kind.__module__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), inside)
    return module


def run_until_stopped(pipeline, size, sampling, decode=False, guided=True, prompt=PROMPT):
    """Draw as `sampling` has it, in STEPS steps or until a `recorded` with a limit has enough.

    size: (images, height, width). decode: on to the images, not the latents alone. guided: False draws without
    guidance, whose batch is half as large. prompt: of every image.
    """
    images, height, width = size
    known = {key: value for key, value in sampling.items() if key in _CAPTURED_WITH and value is not None}
    if "negative_prompt" in known:
        known["negative_prompt"] = [known["negative_prompt"]] * images
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if not guided:
        known |= {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if name in accepted}
    if not decode and "callback_on_step_end" in accepted:
        known["callback_on_step_end"] = _stop_after_the_last_step
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(images)]
    pipeline.set_progress_bar_config(disable=True)
    try:
        with suppress(Stop):
            pipeline(
                prompt=[prompt] * images,
                height=height,
                width=width,
                num_inference_steps=STEPS,
                generator=generators,
                output_type="pt" if decode else "latent",
                **known,
            )
    finally:
        # what a pipeline leaves behind when it is stopped
        pipeline.maybe_free_model_hooks()


@contextmanager
def stand_in(module, method, function):
    """While it lasts, `function` is called in place of a module's method."""
    before = module.__dict__.get(method)
    setattr(module, method, function)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[method]
        else:
            setattr(module, method, before)


@contextmanager
def recorded(module, method="forward", limit=None):
    """Yield a list to which each call of a module's method is added as a Call; `limit` calls end the run."""
    whole, names = getattr(module, method), parameter_names(module, method)
    calls = []

    def record(*args, **kwargs):
        tensors, constants, template = take_apart(names, args, kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        has_choice = "return_dict" in names
        result = whole(*args, **{**kwargs, "return_dict": True}) if has_choice else whole(*args, **kwargs)
        results, output = take_result_apart(result)
        kept = [{name: tensor.detach().clone() for name, tensor in group.items()} for group in (tensors, results)]
        calls.append(Call(kept[0], constants, template, kept[1], output))
        if limit and len(calls) == limit:
            raise Stop
        return tuple(result.values()) if has_choice and given.get("return_dict") is False else result

    with stand_in(module, method, record):
        yield calls


def replayed(module, results):
    """Have a hollow module give back `results`, one after the other, while it lasts."""
    left = iter(results)
    return stand_in(module, "forward", lambda *args, **kwargs: next(left))


@contextmanager
def results_of(module):
    """Yield a list to which what each call of a module returns is added."""
    whole, seen = module.forward, []

    def keep(*args, **kwargs):
        seen.append(whole(*args, **kwargs))
        return seen[-1]

    with stand_in(module, "forward", keep):
        yield seen
