"""HTTP/1.1 of the server: requests are read to their end, answers streamed, everything recorded, faults applied."""

import hashlib
import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from . import routes
from .access import identify
from .entries import CHUNK
from .errors import HubError
from .faults import close_abruptly, flip_bit

REFUSALS = {"500": (500, {}), "503": (503, {}), "429": (429, {"Retry-After": "0"})}


@dataclass
class LogEntry:
    """One request: what was asked, how many bytes of body came and went, the status (0: no answer)."""

    method: str
    path: str
    query: dict
    received_bytes: int = 0
    sent_bytes: int = 0
    status: int = 0


class Upload:
    """The body of a PUT, kept in a file of `folder` with its sha256; never in memory as a whole."""

    def __init__(self, folder, chunks):
        self.size, digest = 0, hashlib.sha256()
        handle, self.path = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                self.size += len(chunk)
        self.sha256 = digest.hexdigest()

    def discard(self):
        """Remove the file, if nobody moved it to its place."""
        if os.path.exists(self.path):
            os.unlink(self.path)


class Request:
    """What a handler sees: method, raw path, query, headers, `body` or `upload`, and who asks (`identity`)."""

    def __init__(self, method, target, headers):
        parts = urlsplit(target)
        self.method, self.raw_path, self.headers = method, parts.path, headers
        self.path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body, self.upload, self.identity = b"", None, None

    def flag(self, name):
        """Whether a query parameter is set and true."""
        return self.query.get(name, ["0"])[-1].lower() in ("1", "true")

    def json(self):
        """The body as JSON; a body that is none is a bad request."""
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"Invalid JSON: {error}") from None


class QuietServer(ThreadingHTTPServer):
    """Clients that go away are no news; they are part of the tests."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Report only what is not a lost connection."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Reads one request after the other from a connection and answers them; `hub` is the HubServer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub = None

    def log_message(self, *_):
        """Nothing on stderr: `hub.log` has it."""

    def handle_any(self):
        """Answer one request of any method."""
        request = Request(self.command, self.path, self.headers)
        entry = LogEntry(request.method, request.path, request.query)
        fault = self.hub.arrived(entry)
        self._read(request, entry)
        try:
            if fault in ("drop", "reset"):
                return close_abruptly(self, reset=fault == "reset")
            if fault in REFUSALS:
                status, headers = REFUSALS[fault]
                response = HubError(status, "Internal Error - we are working on it", **headers).response()
            else:
                response = self._act(request)
        finally:
            if request.upload is not None:
                request.upload.discard()
        has_body = request.method == "GET" and response.size > 0
        if fault == "lost" or (fault == "cut" and not has_body):
            return close_abruptly(self, reset=False)
        if fault == "lost500":
            response = HubError(500, "Internal Error - we are working on it").response()
        return self._send(response, entry, fault if has_body else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any  # noqa: N815

    def _act(self, request):
        """What the routes answer; an error of the server itself is recorded in `hub.errors`."""
        try:
            if self.hub.before is not None:
                self.hub.before(request.method, request.path)
            with self.hub.lock:
                request.identity = identify(self.hub, request)
                return routes.dispatch(self.hub, request)
        except HubError as error:
            return error.response()
        except Exception:
            self.hub.errors.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            return HubError(500, "the test server failed: see server.errors").response()

    def _read(self, request, entry):
        """The whole body: into a file for uploads, else into memory."""
        chunks = self._body_chunks(entry)
        if request.method == "PUT":
            request.upload = Upload(self.hub.folder, chunks)
        else:
            request.body = b"".join(chunks)

    def _body_chunks(self, entry):
        """The body as it arrives, by its length or in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._exactly(length, entry)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            yield from self._exactly(int(self.headers.get("Content-Length") or 0), entry)

    def _exactly(self, length, entry):
        """`length` bytes of the body; a client that stops early is a lost connection."""
        while length:
            chunk = self.rfile.read(min(CHUNK, length))
            if not chunk:
                raise ConnectionError("the client went away in the middle of its request")
            entry.received_bytes += len(chunk)
            length -= len(chunk)
            yield chunk

    def _send(self, response, entry, fault):
        """Send the headers and, but for HEAD, the body; cut it or change a bit as the fault says."""
        entry.status = response.status
        self.send_response(response.status)
        for key, value in {"X-Request-Id": f"test-{id(entry):x}", **response.headers}.items():
            self.send_header(key, str(value))
        if response.status != 204:
            self.send_header("Content-Length", str(response.size))
        self.end_headers()
        if self.command == "HEAD":
            return None
        left = response.size // 2 if fault == "cut" else response.size
        chunks = iter([response.body]) if response.chunks is None else response.chunks
        for chunk in flip_bit(chunks, response.size // 2) if fault == "flip" else chunks:
            entry.sent_bytes += len(chunk[:left])
            self.wfile.write(chunk[:left])
            left -= len(chunk[:left])
            if not left:
                break
        return close_abruptly(self, reset=False) if fault == "cut" else None


def serve(hub, host="127.0.0.1"):
    """An HTTP server for the HubServer, on a free port; not yet running."""
    return QuietServer((host, 0), type("BoundHandler", (Handler,), {"hub": hub}))
