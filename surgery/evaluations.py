"""How often a recipe evaluates its denoiser at each step, for one image."""

# These take guidance_scale as an input, and run CFG only for a negative prompt with a true_cfg_scale above 1.
_EMBEDDED = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "HunyuanVideoTransformer3DModel",
    "QwenImageTransformer2DModel",
)


def evaluations_per_step(model_class, pipeline_class, sampling, guidance=None):
    """Evaluations of the denoiser for one image at a step in which guidance acts.

    sampling, guidance: a recipe's, the latter None for CFG. What the sampling does not say is the pipeline's default,
    which guides wherever there is CFG.
    """
    if model_class in _EMBEDDED and pipeline_class != "Flux2KleinPipeline":
        weight = sampling.true_cfg_scale if sampling.negative_prompt is not None else None
        is_guided = weight is not None and weight > 1
    else:
        weight = sampling.guidance_scale
        is_guided = weight is None or weight > 1
    return guidance.evaluations(is_guided) if guidance is not None else 1 + is_guided
