"""Where a schedule and a guidance act: by the noise that the model is given, in any part of a run, by any scheduler.

What is expected is read off the timesteps that reach the model, by the formula of the training's noise.
"""

import diffusers
import numpy as np
import pytest
import torch

import surgery
from surgery.guidance.attaching import driver_of

from ..tiny import tiny_sdxl

STEPS, WINDOW = 8, [0.7, 20.0]
ONCE, TWICE = list(range(STEPS)), sorted([*range(STEPS), *range(STEPS - 1)])
SCHEDULERS = {  # the step that each call of a whole run belongs to
    "EulerDiscrete": ONCE,
    "DDIM": ONCE,
    "LCM": ONCE,
    "DPMSolverMultistep": ONCE,
    "PNDM": [0, *ONCE],
    "HeunDiscrete": TWICE,
    "KDPM2Discrete": TWICE,
}
PARTS = {
    "whole": {},
    "denoising_end": {"denoising_end": 0.6},
    "denoising_start": {"denoising_start": 0.4},
    "a middle": {"denoising_start": 0.3, "denoising_end": 0.7},
    "strength": {"strength": 0.5},
}


@pytest.fixture(scope="module")
def tiny():
    """(the parts of a tiny SDXL on a schedule, whose scale tells the step; the arguments of a call)."""
    pipeline, arguments = tiny_sdxl(blocks=1)
    schedule = {"sigma": WINDOW, "scale": [float(step + 1) for step in range(STEPS)]}
    surgery.patch(pipeline, scale=50.0, schedule=schedule)
    arguments |= {"num_inference_steps": STEPS, "output_type": "latent", "height": 32, "width": 32}
    return pipeline.components, arguments


@pytest.fixture
def run(tiny, scheduler, part):
    """(a pipeline, the arguments for a part of a run)."""
    (parts, arguments), part = tiny, PARTS[part]
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    settings |= {"skip_prk_steps": True} if scheduler == "PNDM" else {}
    scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(parts["scheduler"].config, **settings)
    late = part.keys() & {"denoising_start", "strength"}
    pipeline_class = diffusers.StableDiffusionXLImg2ImgPipeline if late else diffusers.StableDiffusionXLPipeline
    pipeline = pipeline_class(**{**parts, "scheduler": scheduler}, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if late:
        arguments = {key: value for key, value in arguments.items() if key not in ("height", "width")}
        arguments["image"] = torch.zeros(1, 4, 16, 16)
    return pipeline, {**arguments, **part, "generator": torch.Generator().manual_seed(0)}


def calls_of(pipeline, arguments, seen):
    """[(timestep, seen(rows of the batch))] of every call of the model in a run."""
    found = []

    def look(_module, args, named):
        given = dict(zip(("sample", "timestep"), args, strict=False)) | named
        found.append((float(given["timestep"]), seen(given["sample"].shape[0])))

    handle = pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        pipeline(**arguments)
    finally:
        handle.remove()
    return found


def is_inside(timestep):
    """Whether the noise of training at a timestep lies in WINDOW; between two, on a line in its logarithm."""
    alphas = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    level = np.exp(np.interp(timestep, np.arange(1000), np.log((1 - alphas) / alphas) / 2))
    return WINDOW[0] <= level <= WINDOW[1]


def steps_of(scheduler, calls, timesteps):
    """The step of each call of a run. timesteps: the calls', a stretch of the scheduler's."""
    whole = scheduler.timesteps.tolist()
    (first,) = [at for at in range(len(whole)) if whole[at : at + len(timesteps)] == timesteps]
    return calls[first : first + len(timesteps)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedule_and_guidance_go_by_the_noise_and_by_the_steps_that_were_asked_for(run, scheduler, monkeypatch):
    pipeline, arguments = run
    module = next(module for module in pipeline.unet.modules() if "pladis_scale" in module._buffers)
    surgery.guide(pipeline, "tsg", sigma=WINDOW, steps=[3, 5])
    method, seen = driver_of(pipeline).method, []
    weakened = type(method).weakened
    monkeypatch.setattr(type(method), "weakened", lambda own, step: seen.append(step) or weakened(own, step))
    with pipeline.unet.scheduled(pipeline) as callback:
        arguments["callback_on_step_end"] = callback
        calls = calls_of(pipeline, arguments, lambda rows: (rows, float(module.pladis_scale)))
    assert float(module.pladis_scale) == 50.0
    assert not {"set_timesteps", "get_timesteps"} & {*vars(pipeline), *vars(pipeline.scheduler)}
    ordinary = [(timestep, scale) for timestep, (rows, scale) in calls if rows == 2]
    steps = steps_of(pipeline.scheduler, SCHEDULERS[scheduler], [timestep for timestep, _ in ordinary])
    pairs = [(step, timestep) for step, (timestep, _) in zip(steps, ordinary, strict=True)]
    scales = [step + 1 if is_inside(timestep) else 0 for step, timestep in pairs]
    assert [scale for _, scale in ordinary] == scales and len(set(scales)) > 2

    guided = [(step, timestep) for step, timestep in pairs if 3 <= step < 5 and is_inside(timestep)]
    assert [timestep for timestep, (rows, _) in calls if rows == 1] == [timestep for _, timestep in guided]
    found = [(step.index, step.level) for step in seen]
    assert found == [(step, timestep / 1000) for step, timestep in guided] and 0 < len(guided) < len(pairs)
