"""The schedulers that carry latents to noise and back: diffusers' DDIM ones, at a pipeline's own noise levels."""

from surgery.errors import UnsupportedModelError

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_SPACINGS = ("leading", "trailing")  # that both schedulers know


def ddim_schedulers(pipeline):
    """(DDIMInverseScheduler, DDIMScheduler) from the config of the pipeline's scheduler (arXiv 2010.02502, eq. 12).

    A spacing that the inverse one does not know becomes "leading", which is DDIM's own.
    Raises UnsupportedModelError for flow matching, and for a scheduler without alphas_cumprod.
    """
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    scheduler = pipeline.scheduler
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = (
        name.startswith("FlowMatch") or config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type"))
    )
    if is_flow or not hasattr(scheduler, "alphas_cumprod"):
        reason = "is made for flow matching" if is_flow else "has no alphas_cumprod"
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} cannot be inverted: its scheduler {name} {reason}, and DDIM inversion is for "
            "diffusion models, whose noise levels are alphas_cumprod; take one of those, such as SDXL"
        )
    if (prediction := config.get("prediction_type", "epsilon")) not in _PREDICTIONS:
        raise UnsupportedModelError(f"DDIM inversion knows no prediction_type {prediction}, which {name} has")
    # Without this key: diffusers would put DDIM's defaults in the place of the scheduler's own, such as LCM's betas.
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    spacing = config.get("timestep_spacing")
    # Clipping is for pixels: latents have no bounds, and a config that says nothing of it would get DDIM's default.
    given = {"clip_sample": False, "timestep_spacing": spacing if spacing in _SPACINGS else "leading"}
    return DDIMInverseScheduler.from_config(config, **given), DDIMScheduler.from_config(
        config, **given, thresholding=False
    )
