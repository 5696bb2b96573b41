"""Images as a pipeline's latents, and latents as images."""

from contextlib import contextmanager

import torch


def encode(pipeline, images):
    """Latents (n, channels, height / f, width / f) of n PIL images: the posterior's mean, scaled as the denoiser's are.

    The images must have the size that is wanted, a multiple of the autoencoder's factor f.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

    with _precise(pipeline.vae) as vae, torch.no_grad():
        pixels = pipeline.image_processor.preprocess(images).to(pipeline._execution_device, vae.dtype)
        latents = retrieve_latents(vae.encode(pixels), sample_mode="argmax")  # a Gaussian's mode is its mean
        mean, scale = _normalisation(vae, latents)
        return (latents - mean) * scale


def decode(pipeline, latents):
    """[PIL image] of latents as `encode` gives them."""
    with _precise(pipeline.vae) as vae, torch.no_grad():
        latents = latents.to(vae.dtype)
        mean, scale = _normalisation(vae, latents)
        pixels = vae.decode(latents / scale + mean, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels, output_type="pil")


def _normalisation(vae, latents):
    """(mean, scale): the denoiser's latents are (those of the autoencoder - mean) * scale."""
    config = vae.config
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    scale = config.get("scaling_factor") or 1.0
    if mean is None or deviation is None:
        return config.get("shift_factor") or 0.0, scale
    mean, deviation = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))  # per channel
    return mean, scale / deviation


@contextmanager
def _precise(vae):
    """The autoencoder, in float32 within the block where float16 would overflow, as SDXL's does."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and vae.config.get("force_upcast")
    if upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if upcast:
            vae.to(dtype)
