"""Images of a pipeline, and base and patched images side by side for the same prompts and seeds."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.guidance import guided
from surgery.models.anatomy import record_of
from surgery.models.patching import denoiser, patched_modules, unpatch
from surgery.recipe.guidance_scale import is_range, scale_of

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

# A recipe's or manifest's `sampling` keys -> the arguments of a diffusers pipeline.
_ARGUMENTS = {"steps": "num_inference_steps"}

Images = dict[tuple[str, int], "Image.Image"]  # by (prompt, seed)


def generate(
    pipeline: Any,
    prompts: Iterable[str],
    seeds: Sequence[int],
    sampling: Mapping[str, Any] | None = None,
    label: str = "generating",
) -> Images:
    """{(prompt, seed): PIL image}: every prompt with every seed, drawn one at a time. sampling: as in `draw`."""
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = {}
    with progress_bar(label, number_of_steps(sampling) * len(jobs), "steps") as advance:
        for job in jobs:
            images[job] = draw(pipeline, [job], sampling, lambda: advance(1))[0]
    return images


def draw(
    pipeline: Any,
    jobs: Sequence[tuple[str, int]],
    sampling: Mapping[str, Any] | None = None,
    on_step: Callable[[], object] | None = None,
) -> "list[Image.Image]":
    """PIL images of (prompt, seed) pairs, drawn as one batch; each pair's latents come from its seed, on the CPU.

    sampling: as a recipe's, with its guidance under "guidance"; what is left out is the pipeline's default. Where its
    guidance_scale is a range each image has its own (`scale_of`): in one batch where the pipeline runs CFG in one,
    whose output is then computed here, as diffusers' pipelines take one number; else the images are drawn singly. Where
    the denoiser has schedules they are carried out, and its hyperparameters are as before afterwards. on_step: called
    after each denoising step of the batch. An image that the pipeline's safety checker blackened has `info["flagged"]`.
    Raises InputError for settings that the pipeline does not have, or numbers out of range.
    """
    import torch

    sampling = sampling or {}
    scales = [scale_of(sampling, seed) for _, seed in jobs] if is_range(sampling) else None
    if scales is not None and not _takes_scales(pipeline):
        return _drawn_singly(pipeline, jobs, sampling, scales, on_step)
    arguments = {_ARGUMENTS.get(key, key): value for key, value in sampling.items() if value is not None}
    guidance = arguments.pop("guidance", None)
    if scales is not None:
        guidance, arguments["guidance_scale"] = guidance or "cfg", max(scales)
    if "timesteps" in arguments:
        arguments.pop("num_inference_steps", None)
    _refuse_unknown(pipeline, arguments)
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(jobs)
    steps = number_of_steps(sampling)
    for _, seed in jobs:
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"a seed must fit 64 bits, not {seed}")
    if steps > pipeline.scheduler.config.get("num_train_timesteps", steps):
        raise InputError(f"steps must be at most {pipeline.scheduler.config.num_train_timesteps}, not {steps}")
    pipeline.set_progress_bar_config(disable=True)

    def on_step_end(_pipeline, _step, _timestep, tensors):
        if on_step is not None:
            on_step()
        return tensors

    prompts = [prompt for prompt, _ in jobs]
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    with (
        guided(pipeline, guidance, arguments, scales),
        _carried_out(pipeline, steps, arguments.get("timesteps"), on_step_end) as callback,
    ):
        result = pipeline(prompt=prompts, generator=generators, **calling_back(pipeline, callback), **arguments)
    flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(jobs)
    for image, is_flagged in zip(result.images, flagged, strict=True):
        if is_flagged:
            image.info["flagged"] = True
    return list(result.images)


def _takes_scales(pipeline):
    """Whether a batch may hold images of several scales: where CFG is computed from one call's two halves."""
    model = denoiser(pipeline)
    backbone = record_of(model)
    if backbone is None or not backbone.batches_cfg or backbone.embeds_guidance:
        return False
    return getattr(model.config, "time_cond_proj_dim", None) is None  # a distilled UNet, which takes the scale itself


def _drawn_singly(pipeline, jobs, sampling, scales, on_step):
    calls = 0

    def of_all():
        nonlocal calls
        calls += 1
        if on_step is not None and calls % len(jobs) == 0:
            on_step()

    images = []
    for at, (job, scale) in enumerate(zip(jobs, scales, strict=True)):
        negative = sampling.get("negative_prompt")
        own = {"negative_prompt": [negative[at]]} if isinstance(negative, list) else {}
        images += draw(pipeline, [job], {**sampling, **own, "guidance_scale": scale}, of_all)
    return images


def calling_back(pipeline: Any, callback: Callable[..., Any]) -> dict[str, Any]:
    """The argument that has a pipeline call back after each step; PixArt's have but diffusers' older one."""
    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        return {"callback_on_step_end": callback}
    return {"callback": lambda step, timestep, latents: callback(pipeline, step, timestep, {"latents": latents})}


def number_of_steps(sampling: Mapping[str, Any] | None) -> int:
    """How many denoising steps sampling settings ask for; diffusers' own default where they say nothing."""
    sampling = sampling or {}
    return len(sampling.get("timesteps") or ()) or sampling.get("steps") or 50


def base_and_patched(
    pipeline: Any, prompts: Iterable[str], seeds: Sequence[int], sampling: Mapping[str, Any] | None = None
) -> tuple[Images, Images]:
    """(base images, patched images) as `generate` gives them, from one patched pipeline, which is unpatched after."""
    if not patched_modules(denoiser(pipeline)):
        raise InputError("the pipeline is not patched, so there is no other side to show")
    patched = generate(pipeline, prompts, seeds, sampling, "patched")
    unpatch(pipeline)
    return generate(pipeline, prompts, seeds, sampling, "base"), patched


def picture(
    columns: Mapping[str, Images], prompts: Sequence[str], seeds: Sequence[int], smallest: int = 160
) -> "Image.Image":
    """One PIL image: a row per prompt, and for each seed the images of every column beside each other, labelled.

    columns: {label: {(prompt, seed): image}}. Images under `smallest` pixels are enlarged without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = next(iter(next(iter(columns.values())).values())).size
    zoom = max(1, -(-smallest // min(width, height)))
    width, height = width * zoom, height * zoom
    text, gap, group_gap = max(14, width // 12), 4, 20
    font = ImageFont.load_default(text)
    group = len(columns) * (width + gap) + group_gap
    row = 2 * text + height + group_gap + 10
    sheet = Image.new("RGB", (group_gap + len(seeds) * group, group_gap + len(prompts) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for line, prompt in enumerate(prompts):
        top = group_gap + line * row
        draw.text((group_gap, top), fitted(draw, prompt, font, sheet.width - 2 * group_gap), "black", font)
        for position, seed in enumerate(seeds):
            for column, (label, images) in enumerate(columns.items()):
                left = group_gap + position * group + column * (width + gap)
                draw.text((left, top + text + 3), fitted(draw, f"{label}, seed {seed}", font, width), "dimgray", font)
                image = images[prompt, seed].convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                sheet.paste(image, (left, top + 2 * text + 8))
    return sheet


@contextmanager
def _carried_out(pipeline, steps, timesteps, on_step_end):
    """The callback_on_step_end that carries out the denoiser's schedules before `on_step_end`; that alone if none."""
    model = denoiser(pipeline)
    if not any(getattr(module, "pladis_schedule", None) for module in patched_modules(model).values()):
        yield on_step_end
        return
    try:
        schedule = model.scheduled(pipeline, steps, on_step_end, timesteps)
    except ValueError as error:
        raise InputError(f"the schedule cannot be carried out: {error}") from error
    with schedule as callback:
        yield callback


def fitted(draw: "ImageDraw.ImageDraw", text: str, font: Any, width: float) -> str:
    """The text in one line, cut short with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    while len(text) > 1 and draw.textlength(text, font) > width:
        text = text[:-2].rstrip() + "…"
    return text


def _refuse_unknown(pipeline, arguments):
    accepted = inspect.signature(type(pipeline).__call__).parameters
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        raise InputError(f"{type(pipeline).__name__} has no setting {', '.join(unknown)}")
    if "num_frames" in accepted:
        raise InputError(
            f"{type(pipeline).__name__} makes videos, and this draws images; load it with surgery.load and call it"
        )
