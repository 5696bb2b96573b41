"""POST /v1/images/generations and /v1/videos/generations: what a request may say, and what is to be drawn for it."""

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from surgery.errors import nearest
from surgery.recipe.guidance_scale import is_range
from surgery.recipe.schema import OPERATORS
from surgery.runtime.worker import ImageFormat, ImageRequest, VideoFormat

if TYPE_CHECKING:
    from .checking import Limits, ServedModel


class Refusal(Exception):
    """An answer other than 200: its status, and what the client is told."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = "invalid_request_error" if 400 <= self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class BatchKey:
    """All that the images or videos of one batch have in common; None is the pipeline's own default.

    guidance_scale: (from, to) where each image's seed draws its own, as a recipe's range has it.
    negatives: whether they have negative prompts, since some pipelines take an empty one for something else than none.
    hyperparameters: of the attention operator, (name, value) pairs in order of name.
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

    def sampling(self) -> dict[str, Any]:
        """The settings as `surgery.runtime.draw.draw` takes them."""
        names = ("steps", "guidance_scale", "width", "height", "num_frames", "fps")
        values = {name: getattr(self, name) for name in names}
        if isinstance(self.guidance_scale, tuple):
            values["guidance_scale"] = {"uniform": list(self.guidance_scale)}
        values["timesteps"] = None if self.timesteps is None else list(self.timesteps)
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ImageResult:
    """An image or video file as base64 text, or why there is none: `problem` in words, of a kind.

    frames, fps: of a video. kind: "memory" (one image alone does not fit), "refused" (the pipeline has no such
    setting), "failed".
    """

    image: str | None = None
    size: str | None = None  # "512x768", width first
    flagged: bool = False  # blackened by the pipeline's safety checker
    problem: str | None = None
    kind: Literal["memory", "refused", "failed"] | None = None
    frames: int | None = None
    fps: float | None = None


MAX_BYTES = 64 * 1024  # of a request's body: two texts of 4,000 characters and some numbers
MAX_STEPS = 1000
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

Text = Annotated[str, Field(max_length=4000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class _DrawingRequest(_Strict):
    prompt: Annotated[Text, Field(min_length=1)]
    negative_prompt: Text | None = None
    size: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    model: str | None = None
    user: str | None = None
    pladis: dict[str, float] | None = None


class ImagesRequest(_DrawingRequest):
    """OpenAI's request for images, and four things it does not have: seed, steps, guidance_scale, pladis."""

    n: Annotated[int, Field(ge=1)] | None = None
    response_format: str | None = None
    output_format: ImageFormat | None = None


class VideosRequest(_DrawingRequest):
    """A request for one video."""

    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1, le=240)] | None = None
    output_format: VideoFormat | None = None


def read_request(body: bytes, served: "ServedModel", limits: "Limits") -> tuple[BatchKey, list[ImageRequest]]:
    """(the BatchKey, the ImageRequests) that a request's body (bytes) asks of a ServedModel; a Refusal says why not.

    The body is a VideosRequest where the model draws videos, else an ImagesRequest.
    """
    kind = VideosRequest if served.is_video else ImagesRequest
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error, kind) from None
    if not asked.prompt.strip():
        raise _wrong("prompt", "must not be blank")
    if asked.model not in (None, served.name):
        text = f"there is no model {asked.model[:100]!r} here, but {served.name}"
        raise Refusal(404, text, "model_not_found", "model")
    count, form, frames = _images(asked, limits) if isinstance(asked, ImagesRequest) else _video(asked, served, limits)
    width, height = _size(asked.size, served, limits)
    key = BatchKey(
        steps=asked.steps or served.sampling.get("steps"),
        timesteps=None if asked.steps else _tuple(served.sampling.get("timesteps")),
        guidance_scale=_first(asked.guidance_scale, recorded_scale(served.sampling)),
        width=width,
        height=height,
        negatives=asked.negative_prompt is not None,
        hyperparameters=_hyperparameters(asked.pladis, served),
        **frames,
    )
    seed = asked.seed if asked.seed is not None else secrets.randbelow(2**32)
    if seed + count > 2**63:
        raise _wrong("seed", f"must leave room for {count} images below 2^63")
    return key, [ImageRequest(asked.prompt, seed + index, asked.negative_prompt, form) for index in range(count)]


def recorded_scale(sampling: Mapping[str, Any]) -> float | tuple[float, float] | None:
    """The guidance_scale that a manifest records, as a BatchKey has it."""
    if not is_range(sampling):
        return sampling.get("guidance_scale")
    low, high = sampling["guidance_scale"]["uniform"]
    return low, high


def _images(asked, limits):
    """(how many, their format, no settings of frames) of an ImagesRequest."""
    if asked.response_format not in (None, "b64_json"):
        reason = 'must be "b64_json": images are not kept, so there is no url to give'
        raise _wrong("response_format", reason if asked.response_format == "url" else 'must be "b64_json"')
    count = asked.n or 1
    if count > limits.max_images:
        raise _wrong("n", f"must be at most {limits.max_images} here, not {count}")
    return count, asked.output_format or "png", {}


def _video(asked, served, limits):
    """(1, its format, the settings of its frames) of a VideosRequest."""
    if asked.num_frames is not None and asked.num_frames > (limits.max_frames or math.inf):
        raise _wrong("num_frames", f"must be at most {limits.max_frames} here, not {asked.num_frames}")
    names = ("num_frames", "fps")
    frames = {name: _first(getattr(asked, name), served.sampling.get(name)) for name in names}
    return 1, asked.output_format or "mp4", frames


def _size(text, served, limits):
    if text in (None, "auto"):
        return served.width, served.height
    found = _SIZE.fullmatch(text)
    if not found:
        raise _wrong("size", f'must be written "{served.width or 512}x{served.height or 512}", not {text[:40]!r}')
    width, height = map(int, found.groups())
    if width % 8 or height % 8:
        raise _wrong("size", f"must be multiples of 8, not {text}")
    if limits.max_pixels is not None and width * height > limits.max_pixels:
        raise _wrong("size", f"must have at most {limits.max_pixels} pixels here, not {width * height} ({text})")
    return width, height


def _hyperparameters(asked, served):
    if asked is None:
        return ()
    if not served.operations:
        raise _wrong("pladis", f"has nothing to set: {served.name} is not patched")
    for name in sorted(served.scheduled().intersection(asked)):
        raise _wrong(f"pladis.{name}", "follows the schedule of the model's recipe, so a request cannot set it")
    # The fields are the recipe's own, so their ranges are too.
    own = OPERATORS[served.operations[0]["operator"]].model_fields
    fields: dict[str, Any] = {name: (own[name].rebuild_annotation() | None, None) for name in served.hyperparameters()}
    part = create_model("Hyperparameters", __base__=_Strict, **fields)
    try:
        checked = part.model_validate(asked)
    except ValidationError as error:
        raise _refusal(error, part, "pladis.") from None
    for name, value in checked.model_dump(exclude_none=True).items():
        low, high = _bounds(name, served)
        if not low <= value <= high:
            raise _wrong(f"pladis.{name}", f"must lie in [{low:g}, {high:g}] here, not {value:g}")
    return tuple(sorted((name, value) for name, value in checked.model_dump().items() if value is not None))


def _bounds(name, served):
    """(lowest, highest) that all operators of a model bear; what the model was built with is allowed."""
    own = served.hyperparameters()[name]
    bounds = [BOUNDS.get(operation["operator"], {}).get(name, (-math.inf, math.inf)) for operation in served.operations]
    lows, highs = zip(*bounds, strict=True)
    return min(max(lows), *own), max(min(highs), *own)


def _refusal(error, part, prefix=""):
    """The Refusal for all that pydantic found; the first names the parameter."""
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {found[0]['msg']}", "invalid_json")
    messages = [_message(problem, part, prefix) for problem in found]
    where = ".".join(map(str, found[0]["loc"]))
    return Refusal(400, "; ".join(messages), "invalid_value", f"{prefix}{where}" if where else None)


def _message(problem, part, prefix):
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        near = nearest(where, part.model_fields, cutoff=0.6)
        known = f"did you mean {prefix}{near}?" if near else f"there are {', '.join(part.model_fields)}"
        return f"there is no {prefix}{where[:60]} here; {known}"
    text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    given = problem["input"]
    short = isinstance(given, (int, float)) or (isinstance(given, str) and len(given) < 40)
    return f"{prefix}{where or 'the body'}: {text}{f', not {given!r}' if short else ''}"


def _wrong(param, reason):
    return Refusal(400, f"{param} {reason}", "invalid_value", param)


def _first(*values):
    return next((value for value in values if value is not None), None)


def _tuple(values):
    return tuple(values) if values else None
