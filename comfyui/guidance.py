"""Methods of guidance that need no more than CFG's two outputs, in the place of ComfyUI's CFG."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .combining import frequency_decoupled, low_frequencies, mambo_g, momentum, sliding_mode

_BEGINS = "pladis_surgery_guidance"
# (C, U, w, what is kept of the steps before) -> (the guided output, what is kept)
Combination = Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor | None]]


def guide(model: Any, name: str, sigma_low: float, sigma_high: float, **settings: float) -> tuple[Any, str]:
    """(a clone of a ModelPatcher that is guided by a method of COMBINATIONS, in words); outside the window by CFG."""
    model = model.clone()
    replaced = "sampler_cfg_function" in model.model_options
    wraps = hasattr(model, "add_wrapper_with_key")
    guidance = Guidance(lambda *step: COMBINATIONS[name](*step, **settings), (sigma_low, sigma_high), not wraps)
    model.set_model_sampler_cfg_function(guidance, disable_cfg1_optimization=name != "momentum")
    if wraps:
        model.remove_wrappers_with_key("outer_sample", _BEGINS)
        model.add_wrapper_with_key("outer_sample", _BEGINS, guidance.sample)
    what = f"{name}, {', '.join(f'{key} {value:g}' for key, value in settings.items())}"
    return model, what + ("; the guidance of a node before it is REPLACED: a model has one" if replaced else "")


class Guidance:
    """A `sampler_cfg_function` of ComfyUI's: what it returns is subtracted from the latents.

    by_sigma: whether a run begins where the noise level rises, as nothing else tells of it.
    """

    def __init__(self, combine: Combination, window: tuple[float, float], by_sigma: bool) -> None:
        self.combine, self.window, self.by_sigma = combine, window, by_sigma
        self.kept, self.last = None, 0.0

    def __deepcopy__(
        self, memo: Any
    ) -> "Guidance":  # a clone of the model has this one, which its wrapper tells of runs
        return self

    def sample(self, executor: Any, *arguments: Any, **more: Any) -> Any:
        """A run begins: nothing is kept of the one before."""
        self.kept = None
        return executor(*arguments, **more)

    def __call__(self, args: dict[str, Any]) -> Tensor:
        latents, sigma, scale = args["input"], args["sigma"], args["cond_scale"]
        level = float(sigma.max())
        if self.by_sigma and level > self.last:
            self.kept = None
        self.last = level
        low, high = self.window
        if not low <= level <= high:
            return args["uncond"] + scale * (args["cond"] - args["uncond"])
        # denoised = offset + slope * the model's own output, whatever it predicts
        sampling = args["model"].model_sampling
        offset = sampling.calculate_denoised(sigma, latents.new_zeros(latents.shape), latents)
        slope = sampling.calculate_denoised(sigma, latents.new_ones(latents.shape), latents) - offset
        pred_cond, pred_uncond = ((args[f"{side}_denoised"] - offset) / slope for side in ("cond", "uncond"))
        guided, self.kept = self.combine(pred_cond, pred_uncond, scale, self.kept)
        return latents - (offset + slope * guided)


def _low(prediction):
    """Low frequencies of (batch, channels, [frames,] height, width), each frame by itself."""
    planes = prediction.transpose(1, 2).flatten(0, 1) if prediction.ndim == 5 else prediction
    found = low_frequencies(planes.float()).to(prediction.dtype)
    return found.unflatten(0, (-1, prediction.shape[2])).transpose(1, 2) if prediction.ndim == 5 else found


def _momentum(pred_cond, pred_uncond, guidance_scale, kept, scale, decay):
    without = guidance_scale == 1  # where ComfyUI evaluates nothing without the prompt
    guided = pred_cond if without else pred_uncond + guidance_scale * (pred_cond - pred_uncond)
    return momentum(guided, kept, scale, decay)


COMBINATIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "fdg": lambda c, u, w, kept, high: (frequency_decoupled(c, u, w, high, _low), None),
    "mambo-g": lambda c, u, w, kept, alpha: (mambo_g(c, u, w, alpha), None),
    "momentum": _momentum,
    "smc-cfg": lambda c, u, w, kept, rate, gain: sliding_mode(c, u, w, kept, rate, gain),
}
