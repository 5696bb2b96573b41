"""The ASGI application before the routes: refusals by headers, CORS, a request's number, and a line of the log."""

import asyncio
import json
import re
import secrets
import sys
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

    find_front(): the Front, in its event loop. told_before: whether who calls this gives every request a number and
    adds it to the answer, as Ray Serve does; clients would read "number, number" where it is there twice.
    """

    def __init__(self, app: Callable, find_front: "Callable[[], Front]", told_before: bool = False) -> None:
        self.app, self.find_front, self.told_before = app, find_front, told_before
        self._is_logging = True

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
        # Load balancers ask by HEAD; who calls this leaves the body out then.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        begun, status = time.monotonic(), None
        origin = headers.get("origin")

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                if not (self.told_before and told["request_id"] == given):
                    added["X-Request-Id"] = told["request_id"]
                if origin and access.allows_origin(origin):
                    added["Access-Control-Allow-Origin"] = origin
                    added["Access-Control-Expose-Headers"] = _EXPOSED
                    added.add_vary_header("Origin")
            await send(message)

        spans = front.spans if scope["path"].startswith("/v1/") else Spans()  # no probes
        with spans.request(headers, told) as span:
            try:
                await _passed(self.app, asked, headers, access)(asked, receive, answer)
            except asyncio.CancelledError:
                status = status or _CLIENT_LEFT
                raise
            finally:
                status = status or 500
                if not access.log_prompts:
                    told.pop("prompt", None)
                spans.end_request(span, {**asked, "method": scope["method"]}, status, told)
                front.metrics.requests.labels(str(status)).inc()
                if access.log:
                    line = _line(scope, status, time.monotonic() - begun, told)
                    await asyncio.to_thread(self._add, access.log, line)

    def _add(self, path, line):
        """Add a line to the log; where that cannot be, say so once and go on."""
        try:
            with open(path, "a", encoding="utf-8") as log:
                log.write(line + "\n")
            self._is_logging = True
        except OSError as error:
            if self._is_logging:
                text = f"--access-log {path} cannot be written: {error.strerror}; requests are answered all the same"
                print(f"surgery serve: {text}", file=sys.stderr, flush=True)
            self._is_logging = False


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
