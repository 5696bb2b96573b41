"""A size that a later component's engine cannot take is refused before the first step, not after the last."""

from surgery.errors import InputError


def refuse_other_sizes(denoiser, pipeline, engines):
    """Have the denoiser's first call raise InputError where the size is outside another component's engine's profile.

    engines: {component: Engine}.
    """
    later = [engine for component, engine in engines.items() if component == "vae"]
    scale = getattr(pipeline, "vae_scale_factor", None)
    if not later or not scale:
        return

    def check(module, args, kwargs):
        latents = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if latents is None or latents.ndim != 4:
            return
        height, width = (side * scale for side in latents.shape[-2:])
        for engine in later:
            # guidance doubles the denoiser's batch, so that the number of images is not known here
            if problem := engine.profile.problem(engine.profile.images.low, height, width):
                raise InputError(
                    f"the engine {engine.key} of the {engine.component} was not built for this size: {problem}. Build "
                    "one that is (`surgery export --shapes ...`) or load without it"
                )

    denoiser.register_forward_pre_hook(check, with_kwargs=True)
