"""The routes: OpenAI's paths and error bodies over a Front."""

import asyncio
import json

from .guard import Guard
from .refusal import Refusal
from .request import MAX_BYTES, ImagesRequest

BODY_SECONDS = 10.0  # for a request to be there in full


def http_app(find_front):
    """The FastAPI application over the Front that `find_front()` returns, which is called in its event loop."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    # Its pages of documentation would fetch scripts from elsewhere; /openapi.json says the same. A redirect to a path
    # without its last slash would lead to wherever the Host header says.
    app = FastAPI(title="surgery serve", docs_url=None, redoc_url=None, redirect_slashes=False)

    def count(status):
        find_front().refused(status)

    app.add_middleware(Guard, find_hosts=lambda: find_front().limits.hosts, refused=count)
    schema = {"content": {"application/json": {"schema": ImagesRequest.model_json_schema()}}, "required": True}

    @app.post("/v1/images/generations", openapi_extra={"requestBody": schema})
    async def generations(request: Request):
        body = await _body(request)
        answer = await find_front().images(body, lambda: _gone(request))
        content = await asyncio.to_thread(json.dumps, answer)  # megabytes of text
        return Response(content, media_type="application/json")

    @app.get("/v1/models")
    async def models():
        return find_front().models()

    @app.get("/health")
    async def health():
        status, body = find_front().health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics():
        content, kind = find_front().metrics()
        return Response(content, media_type=kind)

    @app.exception_handler(Refusal)
    async def refused(_request, refusal):
        count(refusal.status)
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def no_such_route(request, error):
        text = f"{request.method} {request.url.path}: {error.detail.lower()}"
        refusal = Refusal(error.status_code, text, "not_found" if error.status_code == 404 else "invalid_request")
        count(refusal.status)
        return JSONResponse(refusal.body(), refusal.status, error.headers)

    @app.exception_handler(Exception)
    async def failed(_request, _error):
        count(500)
        return JSONResponse(Refusal(500, "the server failed; its log says why", "internal_error").body(), 500)

    return app


async def _body(request):
    """The body as bytes; a Refusal as soon as it is too long, or too slow to come, and for what is not called JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # any other a web page may send without asking
        raise Refusal(415, "the Content-Type must be application/json", "unsupported_media_type")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BYTES:
                    text = f"the body must have at most {MAX_BYTES} bytes"
                    raise Refusal(413, text, "too_large", headers={"Connection": "close"})
    except TimeoutError:
        text = f"the request was not there in full after {BODY_SECONDS:g} s"
        raise Refusal(408, text, "request_timeout", headers={"Connection": "close"}) from None
    return bytes(body)


async def _gone(request):
    """Ends when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
