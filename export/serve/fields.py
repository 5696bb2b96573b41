"""The fields of a request's body: OpenAI's of images, what it does not have, and how mistakes in them are told."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from surgery.errors import nearest
from surgery.runtime.worker import ImageFormat, VideoFormat

from .refusal import Refusal

MAX_STEPS = 1000
MAX_PARTIAL = 3  # images before the last, as OpenAI has it
_TOLD = 10  # mistakes and warnings, the nearest spelling of each: a megabyte of fields has a hundred thousand

Text = Annotated[str, Field(max_length=32_000)]


class Strict(BaseModel):
    """Fields of which none may be left unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class LoraChoice(Strict):
    """A LoRA of the server's list, and how much of it."""

    name: str
    scale: Annotated[float, Field(ge=-10, le=10)] = 1.0


def _choices(value):
    """A LoRA's name, or name and scale, or a list of either, as a list of the latter."""
    listed = value if isinstance(value, list) else [value]
    return [{"name": one} if isinstance(one, str) else one for one in listed]


class DrawingRequest(Strict):
    """What images and videos have in common."""

    prompt: Annotated[Text, Field(min_length=1)]
    negative_prompt: Text | None = None
    size: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    guidance: str | dict[str, Any] | None = None
    scheduler: str | None = None
    lora: Annotated[list[LoraChoice], BeforeValidator(_choices)] | None = None
    model: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    pladis: dict[str, float] | None = None


class ImagesRequest(DrawingRequest):
    """OpenAI's request for images, and what it does not have: negative_prompt, seed, steps, guidance, pladis ..."""

    n: Annotated[int, Field(ge=1, le=10)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: ImageFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    moderation: Literal["low", "auto"] | None = None
    style: Literal["vivid", "natural"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL)] | None = None


class EditsRequest(ImagesRequest):
    """A request for images drawn from one that is uploaded, `image`; where there is a `mask`, in its clear part alone.

    strength: in (0, 1], how much of the image is drawn anew.
    """

    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    input_fidelity: Literal["high", "low"] | None = None


class VariationsRequest(EditsRequest):
    """The same without a prompt."""

    prompt: Text = ""


class VideosRequest(DrawingRequest):
    """A request for one video."""

    num_frames: Annotated[int, Field(ge=1)] | None = None
    fps: Annotated[int, Field(ge=1, le=240)] | None = None
    output_format: VideoFormat | None = None


# What OpenAI's models have a use for and these do not.
_WITHOUT_EFFECT = ("quality", "style", "moderation", "input_fidelity")

_Kind = TypeVar("_Kind", bound=DrawingRequest)


def read_fields(given: Mapping[str, Any] | bytes, kind: type[_Kind], strict: bool) -> tuple[_Kind, list[str]]:
    """(a request, warnings) of a JSON body, or of a form's fields, in which numbers are text.

    A field that is not known is a warning, or if `strict` a mistake. Raises Refusal with all mistakes.
    """
    forms = not isinstance(given, bytes)
    try:
        try:
            asked = _validated(given, kind, forms)
            unknown = []
        except ValidationError as error:
            unknown = [one for one in error.errors(include_url=False) if _is_unknown(one)]
            if strict or not unknown or len(unknown) < error.error_count():
                raise
            names = {one["loc"][0] for one in unknown}
            asked = _validated(_without(given, names), kind, forms)
    except ValidationError as error:
        raise refusal_of(error, kind) from None
    warnings = [f"{_message(one, kind, '')}; it was ignored" for one in unknown[:_TOLD]]
    if more := len(unknown[_TOLD:]):
        warnings.append(f"{more} more fields that are not known were ignored")
    for name in _WITHOUT_EFFECT:
        if getattr(asked, name, None) not in (None, "auto"):
            warnings.append(f"{name} has no effect here")
    return asked, warnings


def _is_unknown(problem):
    return problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1


def _validated(given, kind, forms):
    return kind.model_validate(given, strict=False) if forms else kind.model_validate_json(given)


def _without(given, names):
    import json

    if isinstance(given, bytes):
        return json.dumps({key: value for key, value in json.loads(given).items() if key not in names}).encode()
    return {key: value for key, value in given.items() if key not in names}


def refusal_of(error: ValidationError, part: type[BaseModel], prefix: str = "") -> Refusal:
    """The Refusal for all that pydantic found; the first names the parameter."""
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON: {found[0]['msg']}", "invalid_json")
    messages = [_message(problem, part, prefix) for problem in found[:_TOLD]]
    if more := len(found[_TOLD:]):
        messages.append(f"and {more} more mistakes")
    where = ".".join(map(str, found[0]["loc"]))
    return Refusal(400, "; ".join(messages), "invalid_value", f"{prefix}{where}" if where else None)


def _message(problem, part, prefix):
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known_fields = (part if _is_unknown(problem) else LoraChoice).model_fields
        near = nearest(str(problem["loc"][-1]), known_fields, cutoff=0.6)
        known = f"did you mean {prefix}{near}?" if near else f"there are {', '.join(known_fields)}"
        return f"there is no {prefix}{where[:60]} here; {known}"
    text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    given = problem["input"]
    short = isinstance(given, (int, float)) or (isinstance(given, str) and len(given) < 40)
    return f"{prefix}{where or 'the body'}: {text}{f', not {given!r}' if short else ''}"
