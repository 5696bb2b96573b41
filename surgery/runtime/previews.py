"""What a run has drawn so far: an estimate of the finished image after some of the steps, through the VAE."""

from collections.abc import Callable
from typing import Any

import torch

_LEAST = 1e-3  # of the clean image's share in the latents, below which nothing can be told of it


class Previews:
    """Decodes some images of a batch after some steps; `on_latents` of `surgery.runtime.draw.draw`.

    wanted: how many of each image of the batch. show: called with (the image's place in the batch, how many came
    before, a PIL image). The estimate prolongs the last step's line to where there is no noise, which is the model's
    own prediction for a first-order solver of an ODE (DDIM, Euler, flow matching) and near it for others. Pipelines
    whose latents are no (batch, channels, height, width), and VAEs that need float32 in a float16 model, have none.
    """

    def __init__(self, pipeline: Any, wanted: list[int], steps: int, show: Callable[[int, int, Any], object]) -> None:
        self._pipeline, self._wanted, self._show = pipeline, wanted, show
        # evenly over the steps, the last one being the image itself
        self._at = [{round((k + 1) * steps / (count + 1)) - 1 for k in range(count)} for count in wanted]
        self._sent = [0] * len(wanted)
        self._before = None

    def __call__(self, step: int, timestep: Any, latents: torch.Tensor) -> None:
        """After a step, of which 0 is the first; timestep: its number or tensor; latents: as drawn, of any shape."""
        before, self._before = self._before, latents
        which = [at for at, steps in enumerate(self._at) if step in steps]
        if not which or latents.ndim != 4 or len(latents) != len(self._wanted) or not _decodes(self._pipeline):
            return
        clean = _estimate(self._pipeline.scheduler, timestep, before, latents)
        if clean is None:
            return
        images = _decoded(self._pipeline, clean[which])
        for at, image in zip(which, images, strict=True):
            self._show(at, self._sent[at], image)
            self._sent[at] += 1


def _decodes(pipeline):
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(pipeline, "image_processor"):
        return False
    return not (getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16)


def _estimate(scheduler, timestep, before, latents):
    """The latents without noise; None after the last step, which has none."""
    timesteps = scheduler.timesteps
    at = int((timesteps.double() - float(timestep)).abs().argmin())  # a run from an image begins amid them
    if at + 1 >= len(timesteps):
        return None
    first, second = _noise(scheduler, at), _noise(scheduler, at + 1)
    if first is None or second is None or before is None or first[0] < _LEAST:
        return latents
    (scale_before, sigma_before), (scale, sigma) = first, second
    before, now = before.float() / scale_before, latents.float() / scale
    return (
        (now + (now - before) * sigma / (sigma_before - sigma)).to(latents.dtype) if sigma_before > sigma else latents
    )


def _noise(scheduler, at):
    """(scale, sigma) before a step: latents are scale (clean + sigma noise), in which a solver's line is straight."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        kept = getattr(scheduler, "alphas_cumprod", None)
        if kept is None:
            return None
        kept = float(kept[int(scheduler.timesteps[at])])
        return kept**0.5, ((1 - kept) / kept) ** 0.5 if kept > 0 else float("inf")
    sigma = float(sigmas[at])
    if hasattr(scheduler, "scale_model_input") and float(scheduler.init_noise_sigma) == 1.0:  # DPM-Solver, UniPC
        return (1 / (1 + sigma**2) ** 0.5, sigma)
    if not hasattr(scheduler, "scale_model_input"):  # flow matching: (1 - sigma) clean + sigma noise
        return (1 - sigma, sigma / (1 - sigma)) if sigma < 1 else None
    return 1.0, sigma


def _decoded(pipeline, latents):
    vae = pipeline.vae
    mean, spread = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    latents = latents / getattr(vae.config, "scaling_factor", 1.0)
    if mean is not None and spread is not None:
        mean, spread = (torch.tensor(each, device=latents.device, dtype=latents.dtype) for each in (mean, spread))
        latents = latents * spread.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    else:
        latents = latents + (getattr(vae.config, "shift_factor", None) or 0.0)
    with torch.no_grad():
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(images.detach(), output_type="pil")
