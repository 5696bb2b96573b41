"""A Hub server on loopback: repositories are folders; it lists and serves them as the Hub does.

Only what the project reads: model info, and files by HEAD and GET. `faults` makes it misbehave.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" * 6 + "c0ff"


class HubServer:
    """`repositories` maps OWNER/NAME to a folder; `requests` records (method, path)."""

    def __init__(self):
        self.repositories, self.cards, self.requests = {}, {}, []
        self.gated, self.corrupted, self.faults = set(), set(), {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def fetched(self):
        """The file paths that were downloaded, without the repository's name."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for how, path in self.requests
            if how == "GET" and "/resolve/" in path
        ]

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                path = unquote(urlparse(self.path).path)
                server.requests.append((self.command, path))
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    tree = len(parts) > 4 and parts[4] == "tree"
                    return self.listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", tree)
                if len(parts) > 4 and parts[2] == "resolve":
                    return self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
                return self.error(404, "EntryNotFound")

            def known(self, repo, revision):
                if repo not in server.repositories:
                    self.error(401, "RepoNotFound")
                elif revision not in ("main", COMMIT):
                    self.error(404, "RevisionNotFound")
                else:
                    return server.repositories[repo]

            def listing(self, repo, revision, tree):
                if repo in server.gated:
                    return self.error(403, "GatedRepo")
                folder = self.known(repo, revision)
                if folder is None:
                    return None
                siblings, entries = [], []
                for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                    data, name = path.read_bytes(), path.relative_to(folder).as_posix()
                    digest, lfs = hashlib.sha256(data).hexdigest(), path.suffix in (".safetensors", ".bin")
                    size = {"size": len(data), "pointerSize": 130}
                    sibling = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
                    siblings.append({**sibling, **({"lfs": {"sha256": digest, **size}} if lfs else {})})
                    entry = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    entries.append({**entry, **({"lfs": {"oid": digest, **size}} if lfs else {})})
                card = server.cards.get(repo, {})
                info = {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": [], "private": False}
                return self.send(
                    200, json.dumps(entries if tree else info).encode(), {"Content-Type": "application/json"}
                )

            def file(self, repo, revision, name, body):
                folder = self.known(repo, revision)
                if folder is None:
                    return None
                if repo in server.gated:
                    return self.error(403, "GatedRepo")
                path = Path(folder, name)
                if not path.is_file():
                    return self.error(404, "EntryNotFound")
                if body and server.faults.get(name, 0) > 0:
                    server.faults[name] -= 1
                    return self.error(500, "Internal")
                data = path.read_bytes()
                digest = hashlib.sha256(data).hexdigest()
                if name in server.corrupted:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
                return self.send(200, data, headers, body)

            def error(self, status, code):
                self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

            def send(self, status, data, headers, body=True):
                self.send_response(status)
                for key, value in {**headers, "Content-Length": len(data)}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if body and self.command != "HEAD":
                    self.wfile.write(data)

        return Handler


@contextmanager
def hub_server():
    """A running HubServer; its `environment(folder)` points huggingface_hub at it."""
    server = HubServer()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def environment(server, home):
    """Environment variables that make a process use the server, with its own empty cache and no token."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
