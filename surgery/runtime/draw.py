"""Images or videos of a pipeline, and base and patched ones side by side for the same prompts and seeds."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.console import progress_bar
from surgery.errors import InputError
from surgery.guidance import guided
from surgery.models.anatomy import record_of
from surgery.models.negative import told_in
from surgery.models.patching import denoiser, denoisers, patched_modules, unpatch
from surgery.models.videos import draws_videos, frame_rate
from surgery.recipe.guidance_scale import is_range, scale_of
from surgery.recipe.schema import USUAL_STEPS

from .modular import called, is_modular, settings_of
from .video import Video

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Job = tuple[str, int]  # (prompt, seed)

# A recipe's or manifest's `sampling` keys -> the arguments of a diffusers pipeline.
_ARGUMENTS = {"steps": "num_inference_steps"}


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Mapping[str, Any] | None = None,
    label: str = "generating",
    keep: "Callable[[str, int, Image | Video], object] | None" = None,
    on_step: Callable[[], object] | None = None,
) -> "dict[Job, Image | Video]":
    """{(prompt, seed): PIL image or Video}: every prompt with every seed, drawn one at a time.

    sampling, on_step: as in `draw`. keep: called with (prompt, seed, what was drawn) as soon as that is done.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawn = {}
    with progress_bar(label, number_of_steps(sampling) * len(jobs), "steps") as advance:

        def on_each_step() -> None:
            advance(1)
            if on_step is not None:
                on_step()

        for job in jobs:
            drawn[job] = draw(pipeline, [job], sampling, on_each_step)[0]
            if keep is not None:
                keep(*job, drawn[job])
    return drawn


def draw(
    pipeline: Any,
    jobs: Sequence[Job],
    sampling: Mapping[str, Any] | None = None,
    on_step: Callable[[], object] | None = None,
    on_latents: "Callable[[int, Any, torch.Tensor], object] | None" = None,
) -> list[Any]:
    """PIL images of (prompt, seed) pairs, drawn as one batch; each pair's latents come from its seed, on the CPU.

    Of a pipeline that draws videos they are `Video`s, `num_frames` and `fps` being among the settings.
    sampling: as a recipe's, with its guidance under "guidance"; what is left out is the pipeline's default. Where its
    guidance_scale is a range each image has its own (`scale_of`): in one batch where the pipeline runs CFG in one,
    whose output is then computed here, as diffusers' pipelines take one number; else the images are drawn singly. Where
    the denoiser has schedules they are carried out, and its hyperparameters are as before afterwards. on_step: called
    after each denoising step of the batch; on_latents: with its number, its timestep and the latents, where they are
    drawn as one. An image that the pipeline's safety checker blackened has `info["flagged"]`.
    Raises InputError for settings that the pipeline does not have, or numbers out of range.
    """
    sampling = sampling or {}
    scales = [scale_of(sampling, seed) for _, seed in jobs] if is_range(sampling) else None
    if (scales is not None and not _takes_scales(pipeline)) or (len(jobs) > 1 and is_modular(pipeline)):
        return _drawn_singly(pipeline, jobs, sampling, scales, on_step)
    arguments = {_ARGUMENTS.get(key, key): value for key, value in sampling.items() if value is not None}
    guidance = arguments.pop("guidance", None)

    def on_step_end(_pipeline, step, timestep, tensors):
        if on_step is not None:
            on_step()
        if on_latents is not None and "latents" in tensors:
            on_latents(step, timestep, tensors["latents"])
        return tensors

    with told_in(pipeline, arguments):
        return _drawn(pipeline, jobs, sampling, arguments, guidance, scales, on_step_end)


def _drawn(pipeline, jobs, sampling, arguments, guidance, scales, on_step_end):
    import torch

    if scales is not None:
        guidance, arguments["guidance_scale"] = guidance or "cfg", max(scales)
    if "timesteps" in arguments:
        arguments.pop("num_inference_steps", None)
    _refuse_unknown(pipeline, arguments)
    is_video = draws_videos(type(pipeline))
    if is_video:
        arguments |= {"output_type": "pil", **_rate_argument(pipeline, arguments.pop("fps", None))}
    if isinstance(arguments.get("negative_prompt"), str) and not is_modular(pipeline):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(jobs)
    steps = number_of_steps(sampling)
    for _, seed in jobs:
        if not -(2**63) <= seed < 2**63:
            raise InputError(f"a seed must fit 64 bits, not {seed}")
    if steps > pipeline.scheduler.config.get("num_train_timesteps", steps):
        raise InputError(f"steps must be at most {pipeline.scheduler.config.num_train_timesteps}, not {steps}")
    pipeline.set_progress_bar_config(disable=True)

    prompts = [prompt for prompt, _ in jobs]
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    with (
        guided(pipeline, guidance, scales),
        _carried_out(pipeline, steps, arguments.get("timesteps"), on_step_end) as callback,
    ):
        if is_modular(pipeline):
            kind = "videos" if is_video else "images"
            drawn = _drawn_by_blocks(pipeline, prompts[0], generators[0], arguments, callback, kind)
            fps = frame_rate(type(pipeline), sampling)
            return [Video(list(one), fps) for one in drawn] if is_video else drawn
        result = pipeline(prompt=prompts, generator=generators, **calling_back(pipeline, callback), **arguments)
    if is_video:
        fps = frame_rate(type(pipeline), sampling)
        return [Video(list(frames), fps) for frames in result.frames]
    flagged = getattr(result, "nsfw_content_detected", None) or [False] * len(jobs)
    for image, is_flagged in zip(result.images, flagged, strict=True):
        if is_flagged:
            image.info["flagged"] = True
    return list(result.images)


def _drawn_by_blocks(pipeline, prompt, generator, arguments, callback, kind):
    with called(pipeline, arguments, callback) as given:
        drawn = pipeline(prompt=prompt, generator=generator, output=kind, **given)
    if drawn is None or not len(drawn):
        raise InputError(f"{type(pipeline).__name__} draws no {kind} from a prompt")
    return list(drawn)


def _rate_argument(pipeline, fps):
    """The rate as an argument, for a model that is told it."""
    accepted = (
        settings_of(pipeline, {}) if is_modular(pipeline) else inspect.signature(type(pipeline).__call__).parameters
    )
    return {"frame_rate": fps} if fps is not None and "frame_rate" in accepted else {}


def _takes_scales(pipeline):
    """Whether a batch may hold images of several scales: where CFG is computed from one call's two halves."""
    model = denoiser(pipeline)
    backbone = record_of(model)
    if backbone is None or not backbone.batches_cfg or backbone.embeds_guidance:
        return False
    return getattr(model.config, "time_cond_proj_dim", None) is None  # a distilled UNet, which takes the scale itself


def _drawn_singly(pipeline, jobs, sampling, scales, on_step):
    calls = 0

    def of_all() -> None:
        nonlocal calls
        calls += 1
        if on_step is not None and calls % len(jobs) == 0:
            on_step()

    images = []
    for at, job in enumerate(jobs):
        negative = sampling.get("negative_prompt")
        own = {"negative_prompt": negative[at]} if isinstance(negative, list) else {}
        own |= {} if scales is None else {"guidance_scale": scales[at]}
        images += draw(pipeline, [job], {**sampling, **own}, of_all)
    return images


def calling_back(pipeline: Any, callback: Callable[..., Any]) -> dict[str, Any]:
    """The argument that has a pipeline call back after each step; PixArt's have but diffusers' older one."""
    if "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters:
        return {"callback_on_step_end": callback}
    return {"callback": lambda step, timestep, latents: callback(pipeline, step, timestep, {"latents": latents})}


def number_of_steps(sampling: Mapping[str, Any] | None) -> int:
    """How many denoising steps sampling settings ask for; diffusers' own default where they say nothing."""
    sampling = sampling or {}
    return len(sampling.get("timesteps") or ()) or sampling.get("steps") or USUAL_STEPS


def base_and_patched(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Mapping[str, Any] | None = None,
    keep: "Callable[[str, str, int, Image | Video], object] | None" = None,
) -> "tuple[dict[Job, Image | Video], dict[Job, Image | Video]]":
    """(base, patched) as `generate` gives them, from one patched pipeline, which is unpatched after.

    keep: as `generate`'s, with "base" or "patched" before the other arguments.
    """
    if not patched_modules(pipeline):
        raise InputError("the pipeline is not patched, so there is no other side to show")

    keepers = {side: keep and partial(keep, side) for side in ("base", "patched")}
    patched = generate(pipeline, prompts, seeds, sampling, "patched", keepers["patched"])
    unpatch(pipeline)
    return generate(pipeline, prompts, seeds, base_sampling(pipeline, sampling), "base", keepers["base"]), patched


def base_sampling(pipeline: Any, sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sampling settings without what the patched side alone has a place for: a negative prompt in attention."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    own = is_modular(pipeline) or "negative_prompt" in accepted
    return {key: value for key, value in (sampling or {}).items() if own or key != "negative_prompt"}


@contextmanager
def _carried_out(pipeline, steps, timesteps, on_step_end) -> Iterator[Callable]:
    """The callback_on_step_end that carries out the denoiser's schedules before `on_step_end`; that alone if none."""
    from surgery.nn.schedule import schedules_of

    if not any(schedules_of(module) for module in patched_modules(pipeline).values()):
        yield on_step_end
        return
    first = next(model for model in denoisers(pipeline).values() if patched_modules(model))
    try:
        schedule = first.scheduled(pipeline, steps, on_step_end, timesteps)
    except ValueError as error:
        raise InputError(f"the schedule cannot be carried out: {error}") from error
    with schedule as callback:
        yield callback


def _refuse_unknown(pipeline, arguments):
    name, accepted = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    accepted = settings_of(pipeline, arguments) if is_modular(pipeline) else accepted
    unknown = [key for key in arguments if key not in accepted]
    if draws_videos(type(pipeline)):
        unknown = [key for key in unknown if key != "fps"]
    elif of_videos := [key for key in ("num_frames", "fps") if key in arguments]:
        raise InputError(f"{name} draws images, not videos; leave {' and '.join(of_videos)} out")
    if unknown:
        raise InputError(f"{name} has no setting {', '.join(unknown)}")
