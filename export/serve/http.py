"""The routes: OpenAI's paths and error bodies over a Front."""

import asyncio
import base64
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from surgery.runtime.video import MEDIA_TYPES

from .answers import error_event, images_answer, last_events, preview_event, warnings_of
from .fields import EditsRequest, ImagesRequest, VariationsRequest, VideosRequest
from .guard import Guard
from .refusal import Refusal
from .request import MAX_BYTES, MAX_FORM_BYTES, read_request
from .store import PATH as FILES
from .uploads import read_form

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .front import Front

BODY_SECONDS, FORM_SECONDS = 10.0, 60.0  # for a request to be there in full
_READ_ON = 4  # times the most that a body may have
_FORM = "multipart/form-data"
_KINDS = {"generations": ImagesRequest, "edits": EditsRequest, "variations": VariationsRequest}


def http_app(find_front: "Callable[[], Front]", told_before: bool = False) -> "FastAPI":
    """The FastAPI application over the Front that `find_front()` returns, which is called in its event loop.

    told_before: as the Guard has it.
    """
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    # Its pages of documentation would fetch scripts from elsewhere; /openapi.json says the same. A redirect to a path
    # without its last slash would lead to wherever the Host header says.
    app = FastAPI(title="surgery serve", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Guard, find_front=find_front, told_before=told_before)

    def taking(kind, media_type):
        return {"requestBody": {"content": {media_type: {"schema": kind.model_json_schema()}}, "required": True}}

    def image_route(kind):
        media_type = "application/json" if kind == "generations" else _FORM

        @app.post(f"/v1/images/{kind}", name=kind, openapi_extra=taking(_KINDS[kind], media_type))
        async def images(request: Request):
            return await _images(find_front(), request, kind, media_type)

    for kind in _KINDS:
        image_route(kind)

    @app.post("/v1/videos/generations", openapi_extra=taking(VideosRequest, "application/json"))
    async def videos(request: Request):
        async with _job(find_front(), request, "generations", "application/json", is_video=True) as (gateway, job):
            (result,) = await gateway.draw(job, lambda: _gone(request))
        key, (asked,) = job.key, job.requests
        told = {"Seed": asked.seed, "Size": result.size, "Frames": result.frames, "Fps": f"{result.fps:g}"}
        told |= {"Steps": len(key.timesteps or ()) or key.steps, "Artifact-Hash": gateway.served.artifact_hash}
        headers = {f"X-Surgery-{name}": str(value) for name, value in told.items() if value is not None}
        content = await asyncio.to_thread(base64.b64decode, result.image or "")
        return Response(content, media_type=MEDIA_TYPES[asked.format], headers=headers | _warned(job, [result]))

    @app.get(f"{FILES}{{name}}")
    async def kept(name: str, expires: str = "", signature: str = ""):
        content, media_type = find_front().store.get(name, expires, signature)
        return Response(content, media_type=media_type, headers={"Cache-Control": "private"})

    @app.get("/v1/models")
    async def models():
        return find_front().models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return find_front().model(name)

    @app.post("/v1/models/{name:path}/reload")
    async def reload(name: str, request: Request):
        front = find_front()
        front.access.check_admin(request.headers)
        return await front.reload(name)

    @app.get("/live")
    async def live():
        return {"status": "ok"}

    @app.get("/health")
    async def health():
        status, body = find_front().health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics():
        content, kind = find_front().metrics_text()
        return Response(content, media_type=kind)

    @app.exception_handler(Refusal)
    async def refused(_request, refusal):
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(request, error):
        text = f"{request.method} {request.url.path}: {error.detail.lower()}"
        refusal = Refusal(error.status_code, text, "not_found" if error.status_code == 404 else "invalid_request")
        return JSONResponse(refusal.body(), refusal.status, error.headers)

    @app.exception_handler(Exception)
    async def failed(_request, _error):
        return JSONResponse(Refusal(500, "the server failed; its log says why", "internal_error").body(), 500)

    return app


async def _images(front, request, kind, media_type):
    from fastapi import Response

    async with _job(front, request, kind, media_type, is_video=False) as (gateway, job):
        if getattr(job.asked, "stream", None):
            return await _streamed(gateway, job, request, kind)
        drawn = await gateway.draw(job, lambda: _gone(request))

    def keep(content, media_type):
        return f"{request.url.scheme}://{request.headers['host']}{front.store.put(content, media_type)}"

    answer = images_answer(gateway.served, job, drawn, keep)
    content = await asyncio.to_thread(json.dumps, answer)  # megabytes of text
    return Response(content, media_type="application/json", headers=_warned(job, drawn))


@asynccontextmanager
async def _job(front, request, kind, media_type, is_video):
    """(the Gateway of the model that a request means, its Job); the replicas stay while this lasts."""
    content_type = request.headers.get("content-type", "")
    body: Any = await _body(request, content_type, media_type)
    if media_type == _FORM:
        body = await asyncio.to_thread(read_form, body, content_type)
        named = body.fields.get("model")
    else:
        named = _named(body) if len(front.gateways) > 1 else None
    with front.using(named, is_video) as gateway:
        job = await asyncio.to_thread(read_request, body, gateway.served, gateway.limits, kind)
        told = {"model": gateway.served.names()[0], "n": len(job.requests), "seed": job.requests[0].seed}
        request.scope["surgery"] |= {**told, "prompt": job.asked.prompt}
        yield gateway, job


def _named(body):
    try:
        return json.loads(body).get("model")
    except (ValueError, AttributeError, RecursionError):
        return None  # which is told when the body is read


async def _streamed(gateway, job, request, kind):
    """Previews as server-sent events, then the images. What goes wrong before the first one is an answer of its own."""
    from starlette.responses import StreamingResponse

    begun = asyncio.Event()
    events = gateway.stream(job, lambda: _gone_before(request, begun))
    first = await anext(events)
    begun.set()  # from here on the response looks for the client

    async def written():
        try:
            event = first
            while not isinstance(event, list):
                yield preview_event(kind, job, *event)
                event = await anext(events)
            for text in last_events(kind, job, event):
                yield text
        except Refusal as refusal:
            yield error_event(refusal.body())
        finally:
            await events.aclose()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(written(), media_type="text/event-stream", headers=headers)


def _warned(job, drawn):
    """The header that says what clients should know, in one line of ASCII, whatever they named a field."""
    text = "; ".join(warnings_of(job, drawn))
    return {"X-Surgery-Warning": text.encode("unicode_escape").decode()[:1000]} if text else {}


async def _body(request, content_type, media_type):
    """The body as bytes; a Refusal where it is too long, too slow to come, or of another type.

    What is too long is read on to its end, and forgotten: a client that is answered while it still sends is told that
    the connection was reset, and not why.
    """
    from starlette.requests import ClientDisconnect

    if content_type.partition(";")[0].strip().lower() != media_type:  # others a web page may send without asking
        raise Refusal(415, f"the Content-Type must be {media_type}", "unsupported_media_type")
    if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise Refusal(415, f"the body must be as it is, not in {encoding[:40]}", "unsupported_media_type")
    most, seconds = (MAX_FORM_BYTES, FORM_SECONDS) if media_type == _FORM else (MAX_BYTES, BODY_SECONDS)
    body, length = bytearray(), 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                length += len(chunk)
                if length <= most:
                    body += chunk
                elif length > _READ_ON * most:
                    break
    except TimeoutError:
        if length <= most:
            text = f"the request was not there in full after {seconds:g} s"
            raise Refusal(408, text, "request_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise Refusal(499, "the client closed the connection", "client_gone") from None
    if length > most:
        text = f"the body must have at most {most} bytes"
        raise Refusal(413, text, "too_large", headers={"Connection": "close"})
    return bytes(body)


async def _gone(request):
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _gone_before(request, begun):
    """As _gone until `begun` is set; after that it has no end."""
    leaving, beginning = asyncio.ensure_future(_gone(request)), asyncio.ensure_future(begun.wait())
    try:
        await asyncio.wait((leaving, beginning), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            return
    finally:
        leaving.cancel()
        beginning.cancel()
    await asyncio.Future()
