"""The ASGI application before the routes: refusals by headers, CORS, a request's number, and a line of the log."""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from .access import as_forwarded
from .refusal import Refusal
from .tracing import Spans

if TYPE_CHECKING:
    from .front import Front

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_EXPOSED = "X-Request-Id, X-Surgery-Warning, Retry-After, retry-after-ms"
_CLIENT_LEFT = 499  # as nginx has it


class Guard:
    """Calls `app` with what may pass, and counts and logs every answer, whoever made it.

    find_front(): the Front, in its event loop.
    """

    def __init__(self, app: Callable, find_front: "Callable[[], Front]") -> None:
        self.app, self.find_front = app, find_front

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Called by the server, as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers, MutableHeaders

        front = self.find_front()
        access = front.access
        scope = as_forwarded(scope, access)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        told = {"request_id": given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"}
        scope["surgery"] = told  # to which the routes add
        begun, status = time.monotonic(), None
        origin = headers.get("origin")

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                added["X-Request-Id"] = told["request_id"]
                if origin and access.allows_origin(origin):
                    added["Access-Control-Allow-Origin"] = origin
                    added["Access-Control-Expose-Headers"] = _EXPOSED
                    added.add_vary_header("Origin")
            await send(message)

        spans = front.spans if scope["path"].startswith("/v1/") else Spans()  # no probes
        with spans.request(headers, told) as span:
            try:
                await _passed(self.app, scope, headers, access)(scope, receive, answer)
            except asyncio.CancelledError:
                status = status or _CLIENT_LEFT
                raise
            finally:
                status = status or 500
                if not access.log_prompts:
                    told.pop("prompt", None)
                spans.end_request(span, scope, status, told)
                front.metrics.requests.labels(str(status)).inc()
                if access.log:
                    line = _line(scope, status, time.monotonic() - begun, told)
                    await asyncio.to_thread(_add, access.log, line)


def _passed(app, scope, headers, access):
    """The ASGI application for a request: `app`, a refusal, or the answer to a browser's question beforehand."""
    from starlette.responses import JSONResponse, Response

    asks = headers.get("access-control-request-method")
    if scope["method"] == "OPTIONS" and asks and access.allows_origin(headers.get("origin", "")):
        allowed = headers.get("access-control-request-headers", "authorization, content-type")
        return Response(
            status_code=204,
            headers={
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": allowed,
                "Access-Control-Max-Age": "600",
            },
        )
    refusal: Refusal | None = access.refusal(scope["path"], headers)
    return app if refusal is None else JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _line(scope, status, seconds, told):
    client = scope.get("client")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
        **told,
    }
    return json.dumps(record, ensure_ascii=False)


def _add(path, line):
    with open(path, "a", encoding="utf-8") as log:
        log.write(line + "\n")
