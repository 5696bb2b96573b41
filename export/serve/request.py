"""What a request asks to be drawn: its fields, a model's own settings where they say nothing, and their limits."""

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, create_model

from surgery.errors import nearest
from surgery.recipe.guidance_scale import is_range
from surgery.recipe.schema import OPERATORS, USUAL_STEPS
from surgery.runtime.worker import ImageRequest

from .fields import (
    DrawingRequest,
    EditsRequest,
    ImagesRequest,
    Strict,
    VariationsRequest,
    VideosRequest,
    read_fields,
    refusal_of,
)
from .refusal import Refusal, wrong
from .uploads import Form, image_size

if TYPE_CHECKING:
    from .checking import Limits, ServedModel


@dataclass(frozen=True)
class BatchKey:
    """All that the images or videos of one batch have in common; None is the pipeline's own default.

    guidance_scale: (from, to) where each image's seed draws its own, as a recipe's range has it.
    negatives: whether they have negative prompts, since some pipelines take an empty one for something else than none.
    hyperparameters: of the attention operator, (name, value) pairs in order of name; loras: likewise (name, scale).
    guidance: a method with its settings, as JSON. given: whether each is drawn from an image, and a mask.
    """

    steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float | tuple[float, float] | None = None
    width: int | None = None
    height: int | None = None
    negatives: bool = False
    hyperparameters: tuple[tuple[str, float], ...] = ()
    num_frames: int | None = None
    fps: int | None = None
    guidance: str | None = None
    scheduler: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    given: Literal["image", "mask"] | None = None
    strength: float | None = None

    def sampling(self) -> dict[str, Any]:
        """The settings as `surgery.runtime.draw.draw` takes them."""
        names = ("steps", "guidance_scale", "width", "height", "num_frames", "fps", "scheduler", "strength")
        values = {name: getattr(self, name) for name in names}
        if isinstance(self.guidance_scale, tuple):
            values["guidance_scale"] = {"uniform": list(self.guidance_scale)}
        values["guidance"] = self.guidance and json.loads(self.guidance)
        values["timesteps"] = None if self.timesteps is None else list(self.timesteps)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ImageResult:
    """An image or video file as base64 text, or why there is none: `problem` in words, of a kind.

    frames, fps: of a video. tokens: of the prompt, as the model reads it; cut: those that it leaves out; positions: of
    the latents. kind: "memory" (one image alone does not fit), "refused" (the pipeline has no such
    setting), "failed".
    """

    image: str | None = None
    size: str | None = None  # "512x768", width first
    flagged: bool = False  # blackened by the pipeline's safety checker
    problem: str | None = None
    kind: Literal["memory", "refused", "failed"] | None = None
    frames: int | None = None
    fps: float | None = None
    tokens: int = 0
    cut: int = 0
    positions: int = 0


@dataclass(frozen=True)
class Job:
    """A request that can be drawn: the images or videos, what they have in common, and what its client is told."""

    key: BatchKey
    requests: list[ImageRequest]
    asked: DrawingRequest
    warnings: tuple[str, ...] = ()


MAX_BYTES = 1 << 20  # of a request's body: two texts of 32,000 characters, as JSON may escape them
MAX_FORM_BYTES = 1 << 25  # with images
_UPLOADED_PIXELS = 1 << 25
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")

# Beyond these an operator draws noise or one colour, so a recipe may go there and a request may not: by operator. What
# is not named has the recipe's range.
_BOUNDS = {"scale": (-100.0, 100.0), "temperature": (0.01, 100.0), "sparse_temperature": (0.01, 100.0)}
BOUNDS = {
    "pladis": _BOUNDS,
    "sparse": _BOUNDS,
    # Its step is no longer than eta.
    "gag": {**_BOUNDS, "scale": (-1000.0, 1000.0), "zeta": (-100.0, 100.0), "parallel": (-100.0, 100.0)},
    "anderson": {**_BOUNDS, "scale_low": (-100.0, 100.0)},
    "anderson_least_squares": _BOUNDS,
    "anderson_history": _BOUNDS,
}

_KINDS = {"generations": ImagesRequest, "edits": EditsRequest, "variations": VariationsRequest}


def read_request(body: bytes | Form, served: "ServedModel", limits: "Limits", kind: str = "generations") -> Job:
    """The Job that a request's body, JSON or a form, asks of a ServedModel; a Refusal says why not.

    kind: "generations", which of a model of videos is a VideosRequest, "edits" or "variations".
    """
    fields, files = (body, {}) if isinstance(body, bytes) else (body.fields, body.files)
    asked, warnings = read_fields(fields, VideosRequest if served.is_video else _KINDS[kind], limits.strict)
    if not asked.prompt.strip() and kind != "variations":
        raise wrong("prompt", "must not be blank")
    if asked.model not in (None, "", *served.names()):
        raise no_such_model(asked.model, served.names())
    given, own = _given(files, kind)
    extra: dict[str, Any]
    count, extra, frames = _images(asked, limits) if isinstance(asked, ImagesRequest) else _video(asked, served, limits)
    width, height = _size(asked.size, served, limits, own)
    key = BatchKey(
        steps=asked.steps or served.sampling.get("steps"),
        timesteps=None if asked.steps or given else _tuple(served.sampling.get("timesteps")),
        guidance_scale=_first(asked.guidance_scale, recorded_scale(served.sampling)),
        width=width,
        height=height,
        negatives=asked.negative_prompt is not None,
        hyperparameters=_hyperparameters(asked.pladis, served),
        guidance=_guidance(asked.guidance),
        scheduler=_scheduler(asked.scheduler, served),
        loras=_loras(asked.lora, served),
        given=None if not given else "mask" if "mask" in given else "image",
        strength=(getattr(asked, "strength", None) or _STRENGTH[kind]) if given else None,
        **frames,
    )
    steps = key.steps or USUAL_STEPS
    if key.strength is not None and int(steps * key.strength) < 1:
        raise wrong("strength", f"of {key.strength:g} leaves none of {steps} steps; ask for more of one of them")
    seed = asked.seed if asked.seed is not None else secrets.randbelow(2**32)
    if seed + count > 2**63:
        raise wrong("seed", f"must leave room for {count} images below 2^63")
    first = ImageRequest(
        asked.prompt, seed, asked.negative_prompt, image=given.get("image"), mask=given.get("mask"), **extra
    )
    return Job(key, [replace(first, seed=seed + index) for index in range(count)], asked, tuple(warnings))


_STRENGTH = {"edits": 0.8, "variations": 0.6}


def no_such_model(name: str, names: "tuple[str, ...]") -> Refusal:
    """The Refusal of a model's name that is none of those served."""
    near = nearest(name, names, cutoff=0.6)
    hint = f"did you mean {near}?" if near else f"there is {', '.join(names)}"
    return Refusal(404, f"there is no model {name[:100]!r} here; {hint}", "model_not_found", "model")


def _given(files, kind):
    """({"image": bytes, "mask": bytes} of a form, the image's size or None); Refusal for what does not belong."""
    if kind == "generations":
        return {}, None
    if "image" not in files:
        raise wrong("image", "must be there, a file in a multipart/form-data body")
    sizes = {}
    for name, content in files.items():
        if name not in ("image", "mask") or (name == "mask" and kind == "variations"):
            raise wrong(name[:60], "is no file that is taken here")
        sizes[name] = image_size(content, name, _UPLOADED_PIXELS)
    if sizes.get("mask", sizes["image"]) != sizes["image"]:
        told = ["x".join(map(str, sizes[name])) for name in ("mask", "image")]
        raise wrong("mask", f"must have the image's size, {told[1]}, not {told[0]}")
    return dict(files), sizes["image"]


def _guidance(asked):
    """A method of guidance with its settings, as JSON; Refusal for one that is wrong, or that loads another model."""
    if asked is None:
        return None
    from surgery.guidance.methods import guidance_of

    try:
        values = guidance_of(asked).model_dump(mode="json")
    except ValueError as error:
        raise wrong("guidance", f"is no method: {str(error)[:300]}") from None
    if values.get("weak") is not None:
        raise wrong("guidance.weak", "names another model, which a request cannot have loaded")
    return json.dumps(values, sort_keys=True)


def _scheduler(asked, served):
    if asked is None or asked in served.schedulers:
        return asked
    near = nearest(asked, served.schedulers, cutoff=0.5)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(served.schedulers) or 'none'}"
    raise wrong("scheduler", f"{asked[:60]!r} does not fit {served.name}; {hint}")


def _loras(asked, served):
    """(name, scale) of each LoRA that is asked for and not by nothing, in order of name."""
    chosen = {}
    for one in asked or ():
        if one.name not in served.loras:
            near = nearest(one.name, served.loras, cutoff=0.5)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(served.loras) or 'none'}"
            raise wrong("lora", f"{one.name[:60]!r} is none of {served.name}'s; {hint}")
        if one.name in chosen:
            raise wrong("lora", f"{one.name!r} is given twice")
        chosen[one.name] = one.scale
    return tuple(sorted((name, scale) for name, scale in chosen.items() if scale))


def recorded_scale(sampling: Mapping[str, Any]) -> float | tuple[float, float] | None:
    """The guidance_scale that a manifest records, as a BatchKey has it."""
    if not is_range(sampling):
        return sampling.get("guidance_scale")
    low, high = sampling["guidance_scale"]["uniform"]
    return low, high


def _images(asked, limits):
    """(how many, what else each is asked for, no settings of frames) of an ImagesRequest."""
    if asked.background == "transparent":
        raise wrong("background", "must be opaque or auto: the model draws no transparency")
    form, compression = asked.output_format or "png", asked.output_compression
    if form == "png" and compression not in (None, 100):
        raise wrong("output_compression", "is of jpeg and webp; a png loses nothing")
    if asked.partial_images is not None and not asked.stream:
        raise wrong("partial_images", 'goes with "stream": true')
    if asked.stream and asked.response_format == "url":
        raise wrong("response_format", "must be b64_json in a stream")
    count = asked.n or 1
    if count > limits.max_images:
        raise wrong("n", f"must be at most {limits.max_images} here, not {count}")
    return count, {"format": form, "compression": compression, "previews": asked.partial_images or 0}, {}


def _video(asked, served, limits):
    """(1, what else it is asked for, the settings of its frames) of a VideosRequest."""
    if asked.num_frames is not None and asked.num_frames > (limits.max_frames or math.inf):
        raise wrong("num_frames", f"must be at most {limits.max_frames} here, not {asked.num_frames}")
    names = ("num_frames", "fps")
    frames = {name: _first(getattr(asked, name), served.sampling.get(name)) for name in names}
    return 1, {"format": asked.output_format or "mp4"}, frames


def _size(text, served, limits, own):
    """(width, height) as a request has it; own: of an uploaded image, whose shape is kept where no size is asked."""
    if text in (None, "", "auto"):
        return _fitting(own, served, limits) if own else (served.width, served.height)
    found = _SIZE.fullmatch(text)
    if not found:
        raise wrong("size", f'must be written "{served.width or 512}x{served.height or 512}", not {text[:40]!r}')
    width, height = map(int, found.groups())
    if width % 8 or height % 8:
        raise wrong("size", f"must be multiples of 8, not {text}")
    if limits.max_pixels is not None and width * height > limits.max_pixels:
        raise wrong("size", f"must have at most {limits.max_pixels} pixels here, not {width * height} ({text})")
    if served.profile and served.profile.problem(None, height, width):
        raise wrong("size", f"must be {served.sizes()} here, which the model was compiled for, not {text}")
    return width, height


def _fitting(own, served, limits):
    """An image's size in multiples of 8, made smaller where that is more than the limit; the model's own on engines."""
    if served.profile:
        return served.width, served.height
    smaller = min(1.0, math.sqrt((limits.max_pixels or math.inf) / (own[0] * own[1])))
    width, height = (max(8, int(side * smaller) // 8 * 8) for side in own)
    return width, height


def _hyperparameters(asked, served):
    if asked is None:
        return ()
    if not served.operations:
        raise wrong("pladis", f"has nothing to set: {served.name} is not patched")
    for name in sorted(served.scheduled().intersection(asked)):
        raise wrong(f"pladis.{name}", "follows the schedule of the model's recipe, so a request cannot set it")
    # The fields are the recipe's own, so their ranges are too.
    own = OPERATORS[served.operations[0]["operator"]].model_fields
    fields: dict[str, Any] = {name: (own[name].rebuild_annotation() | None, None) for name in served.hyperparameters()}
    part = create_model("Hyperparameters", __base__=Strict, **fields)
    try:
        checked = part.model_validate(asked)
    except ValidationError as error:
        raise refusal_of(error, part, "pladis.") from None
    for name, value in checked.model_dump(exclude_none=True).items():
        low, high = _bounds(name, served)
        if not low <= value <= high:
            raise wrong(f"pladis.{name}", f"must lie in [{low:g}, {high:g}] here, not {value:g}")
    return tuple(sorted((name, value) for name, value in checked.model_dump().items() if value is not None))


def _bounds(name, served):
    """(lowest, highest) that all operators of a model bear; what the model was built with is allowed."""
    own = served.hyperparameters()[name]
    bounds = [BOUNDS.get(operation["operator"], {}).get(name, (-math.inf, math.inf)) for operation in served.operations]
    lows, highs = zip(*bounds, strict=True)
    return min(max(lows), *own), max(min(highs), *own)


def _first(*values):
    return next((value for value in values if value is not None), None)


def _tuple(values):
    return tuple(values) if values else None
