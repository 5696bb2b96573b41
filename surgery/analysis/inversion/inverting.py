"""DDIM inversion and reconstruction of images by each attention operator, and how near to the images that comes.

GAG, arXiv 2603.02531, Appendix I, scores it to see which operator keeps more of an image. The model is called by the
pipeline itself, from given latents to latents, once with diffusers' DDIMInverseScheduler and once with DDIMScheduler.
"""

import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgery.compat import encoded_mean, execution_device, own_config
from surgery.console import progress_bar, settings_text
from surgery.errors import InputError, SurgeryError, UnsupportedModelError
from surgery.guidance.attaching import driver_of
from surgery.models.patching import denoiser, switching
from surgery.recipe.metric_names import FIDELITY_METRICS
from surgery.recipe.schema import sampling_problems
from surgery.runtime.draw import calling_back
from surgery.validate.metrics.info import Info
from surgery.validate.scoring import prepare_scorers
from surgery.validate.statistics import paired

from .pictures import ROUND_TRIP, check_images, fitted_image, one_each
from .sides import DENSE, sides_of

if TYPE_CHECKING:
    from diffusers import DDIMInverseScheduler, DDIMScheduler
    from PIL.Image import Image

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_SPACINGS = ("leading", "trailing")  # that both schedulers know


def ddim_schedulers(pipeline: Any) -> "tuple[DDIMInverseScheduler, DDIMScheduler]":
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
    config = own_config(config)
    spacing = config.get("timestep_spacing")
    # Clipping is for pixels: latents have no bounds, and a config that says nothing of it would get DDIM's default.
    given = {"clip_sample": False, "timestep_spacing": spacing if spacing in _SPACINGS else "leading"}
    # not typed: with return_unused_kwargs, which is not given, they would be pairs
    inverse: Any = DDIMInverseScheduler.from_config(config, **given)
    forward: Any = DDIMScheduler.from_config(config, **given, thresholding=False)
    return inverse, forward


def encode(pipeline: Any, images: "list[Image]") -> Tensor:
    """Latents (n, channels, height / f, width / f) of n PIL images: the posterior's mean, scaled as the denoiser's are.

    The images must have the size that is wanted, a multiple of the autoencoder's factor f.
    """
    with _precise(pipeline.vae) as vae, torch.no_grad():
        pixels = pipeline.image_processor.preprocess(images).to(execution_device(pipeline), vae.dtype)
        latents = encoded_mean(vae.encode(pixels))
        mean, scale = _normalisation(vae, latents)
        return (latents - mean) * scale


def decode(pipeline: Any, latents: Tensor) -> "list[Image]":
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
def _precise(vae: Any) -> Iterator[Any]:
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


INVERTED_BY = ("same", "dense")
DEFAULTS = {"operators": (DENSE, "sparse", "pladis", "gag"), "inverted_by": "same", "metrics": ("ssim", "psnr")}
# What papers chose, as arguments of `invert`. "gag": GAG, Appendix I (Table 7, Fig. 6), there of SDXL on 200 images and
# captions of MS-COCO's validation set: one latent for all sides, by dense attention and without guidance, and 50 steps
# back by dense, sparse (alpha 1.5) and GAG (zeta 0, eta 15), which are the operators' defaults.
PRESETS = {
    "gag": {
        "operators": (DENSE, "sparse", "gag"),
        "inverted_by": DENSE,
        "metrics": ("ssim", "lpips"),
        "steps": 50,
        "guidance_scale": 1.0,
    }
}
TARGETS = ("image", "round_trip")  # what a reconstruction is compared with


@dataclass(frozen=True)
class Mean:
    """A metric over all images: its mean, the difference from dense and that one's 95% interval (low, high).

    The difference is None for dense itself and for the round trip, the interval also where there is but one image.
    """

    mean: float
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Reconstruction:
    """The reconstructions of one operator. setting: its hyperparameters in words.

    values: {"image" or "round_trip": {metric: float64 array (n,)}}, of every image; scores: {the same: {metric: Mean}}.
    images: PIL images, of those that were kept.
    """

    setting: str
    values: dict[str, dict[str, np.ndarray]]
    scores: dict[str, dict[str, Mean]]
    images: "list[Image]"


@dataclass(frozen=True)
class Inversion:
    """The sides by name, dense first; the images themselves, those that were kept, and all prompts.

    round_trip: the images encoded and decoded, which no reconstruction from latents can be expected to surpass.
    metrics: {name: Info}. settings: steps, guidance_scale, height, width, inverted_by, timestep_spacing.
    """

    prompts: list[str]
    images: "list[Image]"
    round_trip: Reconstruction
    sides: dict[str, Reconstruction]
    metrics: dict[str, Info]
    settings: dict[str, Any]

    @property
    def rows(self) -> dict[str, Reconstruction]:
        """{name: Reconstruction} of the round trip and the sides."""
        return {ROUND_TRIP: self.round_trip, **self.sides}


def invert(
    pipeline: Any,
    images: "str | Path | Iterable[str | Path | Image]",
    prompts: str | Iterable[str],
    *,
    operators: Iterable[str] = DEFAULTS["operators"],
    steps: int = 50,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    inverted_by: str = "same",
    metrics: Sequence[str] = ("ssim", "psnr"),
    checkpoints: Mapping[str, str] | None = None,
    batch: int = 1,
    keep: int = 16,
) -> Inversion:
    """The Inversion of images by a pipeline: encoded, carried to noise at guidance 1, and back by each operator.

    images: paths or PIL images, resized and cropped to height x width pixels, the model's own size unless given.
    prompts: a caption for all of them, or one for each. operators: "dense", which is always there, and any of
    surgery/nn/operators.py; a side is the pipeline's own operation where that has the operator, else the operator with
    its defaults. The pipeline is afterwards what it was.
    steps: of either way. guidance_scale: of the way back. inverted_by: "same", each side's own operator carries the
    image to noise, too; "dense": dense attention does for all of them, since the paper starts them from one latent.
    metrics: of ssim, psnr, lpips; checkpoints: {"metric.part": path} on this machine. batch: images at once. keep: of
    how many images the pictures are kept in the result.
    Raises InputError for files, captions, operators, metrics or settings that do not fit, UnsupportedModelError for
    models without surgery and for those that are not sampled by diffusion (flow matching), SurgeryError where a
    metric's checkpoint cannot be fetched or the latents overflow.
    """
    images = [images] if isinstance(images, (str, Path)) else list(images)
    if not images:
        raise InputError("there is no image to invert")
    prompts = one_each(prompts, len(images))
    schedulers = ddim_schedulers(pipeline)
    settings = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    _check(pipeline, schedulers, settings, inverted_by, batch)
    check_images(images)
    sides = sides_of(pipeline, tuple(operators))
    judges = _loaded(metrics, pipeline, checkpoints)
    size = settings["height"], settings["width"] = _size(pipeline, height, width)
    inverse: Any = schedulers[0]
    settings |= {"inverted_by": inverted_by, "timestep_spacing": inverse.config.timestep_spacing}
    pipeline.set_progress_bar_config(disable=True)

    values = {name: {target: {metric: [] for metric in judges} for target in TARGETS} for name in sides}
    values[ROUND_TRIP] = {"image": {metric: [] for metric in judges}}
    kept = {name: [] for name in ("image", *values)}
    passes = len(sides) + (1 if inverted_by == DENSE else len(sides))
    total = -(-len(images) // batch) * passes * steps
    with progress_bar("inverting", total, "steps") as advance, switching(pipeline) as switch:
        for start in range(0, len(images), batch):
            some = [fitted_image(image, *size) for image in images[start : start + batch]]
            texts = prompts[start : start + batch]
            made = _reconstructions(pipeline, some, texts, sides, schedulers, settings, switch, lambda: advance(1))
            targets = {"image": some, "round_trip": made[ROUND_TRIP]}
            for name, pictures in made.items():
                for target, found in values[name].items():
                    for name_of_metric, metric in judges.items():
                        found[name_of_metric] += metric.compare(pictures, targets[target]).tolist()
            for name, pictures in {"image": some, **made}.items():
                kept[name] += pictures[: max(0, keep - len(kept[name]))]
    made = {
        name: _reconstruction(name, found, values[DENSE], sides.get(name), kept[name]) for name, found in values.items()
    }
    round_trip = made.pop(ROUND_TRIP)
    infos = {name: metric.info for name, metric in judges.items()}
    return Inversion(prompts, kept["image"], round_trip, made, infos, settings)


def carry(
    pipeline: Any,
    scheduler: Any,
    latents: Tensor,
    prompts: Iterable[str],
    steps: int,
    guidance_scale: float = 1.0,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Latents (n, channels, height, width) after all steps of a DDIM scheduler, run by the pipeline on n prompts.

    on_step: called after each step. The pipeline has its own scheduler again afterwards.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    height, width = (side * pipeline.vae_scale_factor for side in latents.shape[-2:])
    arguments = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    if "use_resolution_binning" in accepted:  # PixArt would take another size than the latents have
        arguments["use_resolution_binning"] = False

    if on_step is not None:

        def on_step_end(_pipeline, _step, _timestep, tensors):
            on_step()
            return tensors

        arguments |= calling_back(pipeline, on_step_end)
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        model: Any = denoiser(pipeline)
        latents = latents.to(model.dtype)
        return pipeline(prompt=list(prompts), latents=latents, output_type="latent", **arguments).images
    finally:
        pipeline.scheduler = own


def _reconstructions(pipeline, images, prompts, sides, schedulers, settings, switch, on_step):
    """{"VAE round trip" or side: [PIL image]} of images of one size."""

    inverse, forward = schedulers
    steps, guidance_scale = settings["steps"], settings["guidance_scale"]
    latents, noise = encode(pipeline, images), None
    made = {ROUND_TRIP: decode(pipeline, latents)}
    for name, operations in sides.items():
        switch(operations)
        if noise is None or settings["inverted_by"] == "same":
            noise = carry(pipeline, inverse, latents, prompts, steps, on_step=on_step)
            _check_finite(noise, name)
        back = carry(pipeline, forward, noise, prompts, steps, guidance_scale, on_step)
        _check_finite(back, name)
        made[name] = decode(pipeline, back)
    return made


def _check_finite(latents, name):
    if not latents.isfinite().all():
        raise SurgeryError(
            f"the latents of {name} overflow; take a larger dtype, smaller hyperparameters, or leave the side out"
        )


def _reconstruction(name, values, of_dense, operations, images):
    values = {target: {metric: np.array(found) for metric, found in of.items()} for target, of in values.items()}
    scores = {}
    for target, of in values.items():
        scores[target] = {}
        for metric, found in of.items():
            if name in (DENSE, ROUND_TRIP):
                scores[target][metric] = Mean(float(found.mean()))
                continue
            compared = paired(of_dense[target][metric], found, np.arange(len(found)))
            interval = compared.interval if len(found) > 1 else None
            scores[target][metric] = Mean(compared.patched, compared.difference, interval)
    settings = dict.fromkeys(settings_text(operation) for operation in operations or ())
    return Reconstruction("; ".join(settings), values, scores, images)


def _loaded(names, pipeline, checkpoints):
    """{name: metric}, loaded, so that what one lacks is told before the work."""
    if not names or len(set(names)) != len(names) or not set(names) <= set(FIDELITY_METRICS):
        raise InputError(
            f"metrics must be of {', '.join(FIDELITY_METRICS)}, each once, not {', '.join(names) or 'none'}"
        )
    if importlib.util.find_spec("scipy") is None:
        raise InputError("the intervals need scipy: pip install 'pladis-surgery[validate]'")
    device = execution_device(pipeline)
    device = str(device) if device.type == "cuda" else "cpu"  # MPS has no float64, in which they compute
    return {scorer.info.name: scorer.metric for scorer in prepare_scorers(list(names), device, checkpoints)}


def _size(pipeline, height, width):
    """(height, width) in pixels, the pipeline's own where None."""
    model: Any = denoiser(pipeline)
    side = model.config.get("sample_size")
    own_height, own_width = side if isinstance(side, (list, tuple)) else (side, side)
    sizes = []
    for name, given, own in (("height", height, own_height), ("width", width, own_width)):
        if given is None and own is None:
            raise InputError(f"the model's config does not say its images' size; give {name}")
        sizes.append(given if given is not None else own * pipeline.vae_scale_factor)
    return sizes


def _check(pipeline, schedulers, settings, inverted_by, batch):
    """Raise InputError for settings out of range, and for a pipeline that does not go from latents to images."""
    if problems := sampling_problems(settings):
        raise InputError("\n  ".join(problems))
    most = schedulers[0].config.num_train_timesteps
    if settings["steps"] > most:
        raise InputError(f"steps must be at most {most}, not {settings['steps']}")
    if inverted_by not in INVERTED_BY:
        raise InputError(f"inverted_by must be one of {', '.join(INVERTED_BY)}, not {inverted_by!r}")
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    if driver_of(pipeline) is not None:
        raise InputError("the pipeline is guided, and the way to noise must not be; surgery.unguide it first")
    accepted = inspect.signature(type(pipeline).__call__).parameters
    lacking = [name for name in ("prompt", "latents", "guidance_scale", "output_type") if name not in accepted]
    if lacking or "num_frames" in accepted or getattr(pipeline, "vae", None) is None:
        why = f"it takes no {', '.join(lacking)}" if lacking else "it makes no images from latents"
        raise InputError(f"{type(pipeline).__name__} cannot be inverted: {why}; give a text-to-image pipeline")
