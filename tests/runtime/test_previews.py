"""Previews: where a first-order solver's line ends, which for a model that knows the image is the image itself."""

from types import SimpleNamespace

import pytest
import torch

from surgery.runtime.previews import Previews


class Identity:
    """A VAE whose latents are the image."""

    config = SimpleNamespace(scaling_factor=2.0, shift_factor=0.5)
    dtype = torch.float32

    def decode(self, latents, return_dict):
        return (latents,)


def run(scheduler, clean, start=0, steps=8, previews=3):
    """The previews of a run whose model predicts noise, or velocity, from the clean latents that it knows."""
    import diffusers

    flow = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    torch.manual_seed(0)
    noise = torch.randn_like(clean)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if flow:
        sigma = scheduler.sigmas[start]
        latents = (1 - sigma) * clean + sigma * noise
    else:
        latents = scheduler.add_noise(clean, noise, timesteps[:1])
    shown = []
    processor = SimpleNamespace(postprocess=lambda images, output_type: list(images))
    pipeline = SimpleNamespace(vae=Identity(), scheduler=scheduler, image_processor=processor)
    made = Previews(pipeline, [previews, 0], len(timesteps), lambda *preview: shown.append(preview))
    for step, timestep in enumerate(timesteps):
        # Along this line from noise to image both are the same at every step.
        predicted = noise - clean if flow else noise
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        made(step, timestep, latents)
    return shown


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ],
)
def test_a_preview_is_what_the_model_predicts_now_whatever_the_scheduler(name, config, start):
    import diffusers

    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    shown = run(getattr(diffusers, name)(**config), clean, start)
    assert [(at, number) for at, number, _ in shown] == [(0, 0), (0, 1), (0, 2)]
    image = clean[0] / 2.0 + 0.5
    for _, number, preview in shown[0 if start == 0 else 1 :]:
        assert (preview - image).abs().max() < 2e-3, number


def test_latents_that_are_no_grid_have_no_previews():
    shown = []
    pipeline = SimpleNamespace(vae=Identity(), scheduler=None, image_processor=None)
    made = Previews(pipeline, [3], 4, lambda *preview: shown.append(preview))
    for step in range(4):
        made(step, 500 - step, torch.zeros(1, 64, 16))
    assert not shown
