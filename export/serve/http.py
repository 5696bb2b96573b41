"""The routes: OpenAI's paths and error bodies over a Gateway."""

import asyncio
import ipaddress
import json
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .request import MAX_BYTES, ImagesRequest, Refusal, VideosRequest

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import Headers

    from .gateway import Gateway

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s\[\]:/?#@\\]+)(?::[0-9]{1,5})?")


class Guard:
    """An ASGI application before another: HTTP requests that `wrong_sender` finds are refused here.

    find_hosts(): the names beside an address and localhost that the server goes by, "*" for any. refused(status): told
    of each refusal.
    """

    def __init__(
        self, app: Callable, find_hosts: Callable[[], tuple[str, ...]], refused: Callable[[int], None]
    ) -> None:
        self.app, self.find_hosts, self.refused = app, find_hosts, refused

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Called by the server, as ASGI has it."""
        from starlette.datastructures import Headers
        from starlette.responses import JSONResponse

        app = self.app
        if scope["type"] == "http" and (refusal := wrong_sender(Headers(scope=scope), self.find_hosts())):
            self.refused(refusal.status)
            app = JSONResponse(refusal.body(), refusal.status)
        await app(scope, receive, send)


def wrong_sender(headers: "Headers", hosts: tuple[str, ...]) -> Refusal | None:
    """The Refusal for a request by its Host and Origin, or None. headers: starlette's; hosts: as Guard's."""
    told = headers.getlist("host")
    found = _HOST.fullmatch(told[0]) if len(told) == 1 else None
    if found is None:
        return Refusal(400, "the request must have one Host header", "invalid_host")
    name = found.group(1).lower()
    if not ("*" in hosts or name in ("localhost", socket.gethostname().lower(), *hosts) or _is_address(name)):
        text = f"{name[:100]} is no name of this server; start it with --allow-host for another"
        return Refusal(403, text, "forbidden_host")
    for origin in headers.getlist("origin"):
        if urlsplit(origin).netloc.lower() != told[0].lower():
            return Refusal(403, "requests of other origins' pages are refused", "forbidden_origin")
    return None


def _is_address(name):
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


BODY_SECONDS = 10.0  # for a request to be there in full


def http_app(find_gateway: "Callable[[], Gateway]") -> "FastAPI":
    """The FastAPI application over the Gateway that `find_gateway()` returns, which is called in its event loop."""
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    # Its pages of documentation would fetch scripts from elsewhere; /openapi.json says the same. A redirect to a path
    # without its last slash would lead to wherever the Host header says.
    app = FastAPI(title="surgery serve", docs_url=None, redoc_url=None, redirect_slashes=False)

    def count(status):
        find_gateway().refused(status)

    app.add_middleware(Guard, find_hosts=lambda: find_gateway().limits.hosts, refused=count)

    def taking(kind):
        schema = {"content": {"application/json": {"schema": kind.model_json_schema()}}, "required": True}
        return {"requestBody": schema}

    @app.post("/v1/images/generations", openapi_extra=taking(ImagesRequest))
    async def generations(request: Request):
        body = await _body(request)
        answer = await find_gateway().images(body, lambda: _gone(request))
        content = await asyncio.to_thread(json.dumps, answer)  # megabytes of text
        return Response(content, media_type="application/json")

    @app.post("/v1/videos/generations", openapi_extra=taking(VideosRequest))
    async def videos(request: Request):
        body = await _body(request)
        content, kind, headers = await find_gateway().video(body, lambda: _gone(request))
        return Response(content, media_type=kind, headers=headers)

    @app.get("/v1/models")
    async def models():
        return find_gateway().models()

    @app.get("/health")
    async def health():
        status, body = find_gateway().health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics():
        content, kind = find_gateway().metrics()
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
