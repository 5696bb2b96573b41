"""What clients are answered, in OpenAI's form."""

import base64
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from surgery.recipe.guidance_scale import is_range, scale_of

from .request import ImageResult, Job

if TYPE_CHECKING:
    from .checking import Limits, ServedModel

_STREAMED = {"generations": "image_generation", "edits": "image_edit", "variations": "image_variation"}


def images_answer(
    served: "ServedModel", job: Job, drawn: Sequence[ImageResult], keep: Callable[[bytes, str], str]
) -> dict[str, Any]:
    """The body for images. keep(content, media type): the address at which an image is kept."""
    key, sampling = job.key, job.key.sampling()
    form = job.requests[0].format
    data = []
    for request, result in zip(job.requests, drawn, strict=True):
        if getattr(job.asked, "response_format", None) == "url":
            image = {"url": keep(base64.b64decode(result.image or ""), f"image/{form}")}
        else:
            image = {"b64_json": result.image}
        scale = {"guidance_scale": scale_of(sampling, request.seed)} if is_range(sampling) else {}
        data.append(image | {"seed": request.seed} | scale | ({"flagged": True} if result.flagged else {}))
    guidance = sampling.get("guidance")
    return {
        "created": int(time.time()),
        "data": data,
        **_settings(job, drawn[0]),
        "usage": _usage(job, drawn),
        "model": served.names()[0],
        "artifact_hash": served.artifact_hash,
        "steps": len(key.timesteps or ()) or key.steps,
        "guidance_scale": sampling.get("guidance_scale"),
        "pladis": dict(key.hyperparameters),
        **({"guidance": guidance} if guidance else {}),
        **({"scheduler": key.scheduler} if key.scheduler else {}),
        **({"lora": [{"name": name, "scale": scale} for name, scale in key.loras]} if key.loras else {}),
        **({"warnings": list(told)} if (told := warnings_of(job, drawn)) else {}),
    }


def preview_event(kind: str, job: Job, at: int, number: int, result: ImageResult) -> str:
    """A server-sent event with an image of the way there. at: which of the images; number: of this one's, from 0."""
    name = f"{_STREAMED[kind]}.partial_image"
    told = {"partial_image_index": number, "image_index": at, "b64_json": result.image}
    return _event(name, told | {"created_at": int(time.time())} | _settings(job, result))


def last_events(kind: str, job: Job, drawn: Sequence[ImageResult]) -> list[str]:
    """A server-sent event for each image that is done."""
    name = f"{_STREAMED[kind]}.completed"
    events = []
    for at, (request, result) in enumerate(zip(job.requests, drawn, strict=True)):
        told = {"image_index": at, "b64_json": result.image, "seed": request.seed, "created_at": int(time.time())}
        told |= {"warnings": list(warnings_of(job, [result]))} if warnings_of(job, [result]) else {}
        events.append(_event(name, told | _settings(job, result) | {"usage": _usage(job, [result])}))
    return events


def error_event(body: dict[str, Any]) -> str:
    """A server-sent event for what went wrong after the first one was sent."""
    return _event("error", {"type": "error", **body})


def _event(name, told):
    return f"event: {name}\ndata: {json.dumps({'type': name, **told})}\n\n"


def _settings(job, result):
    asked = job.asked
    identifier = asked.safety_identifier or asked.user
    return {
        "size": result.size,
        "output_format": job.requests[0].format,
        "quality": getattr(asked, "quality", None) or "auto",
        "background": "opaque",
        **({"safety_identifier": identifier} if identifier else {}),
    }


def _usage(job, drawn):
    """Of text what the model reads of it, for each image; of images the positions of their latents."""
    text = sum(result.tokens for result in drawn)
    made = sum(result.positions for result in drawn)
    given = made if job.key.given else 0
    return {
        "input_tokens": text + given,
        "input_tokens_details": {"text_tokens": text, "image_tokens": given},
        "output_tokens": made,
        "total_tokens": text + given + made,
    }


def warnings_of(job: Job, drawn: Sequence[ImageResult]) -> tuple[str, ...]:
    """What a client should know of what it asked for and did not get."""
    cut, read = max((result.cut, result.tokens) for result in drawn)
    told = (f"the model reads {read} tokens of the prompt; the last {cut} were cut off",) if cut else ()
    return (*job.warnings, *told)


def model_entry(served: "ServedModel", limits: "Limits", name: str) -> dict[str, Any]:
    """A model in OpenAI's form, with what a request may set; name: one of those that it goes by."""
    fixed = served.scheduled()
    free = {name: value for name, value in served.hyperparameters().items() if name not in fixed}
    sizes: dict[str, Any] = {"multiple_of": 8, "max_pixels": limits.max_pixels}
    if served.profile is not None:
        width, height = served.profile.width, served.profile.height
        sizes |= {"width": [width.low, width.high], "height": [height.low, height.high]}
    own = {"default": f"{served.width}x{served.height}"} if served.width and served.height else {}
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "pladis-surgery",
        "artifact_hash": served.artifact_hash,
        "pladis": free,
        "sizes": own | sizes,
        "schedulers": list(served.schedulers),
        "loras": list(served.loras),
    }
