"""The server as a test sees it: repositories, switches, what was asked, and the helpers of another party."""

import os
import shutil
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

from .access import DEFAULT_TOKENS
from .entries import Entry
from .repository import Repository
from .wire import serve


class Repositories(dict):
    """OWNER/NAME to Repository; a folder that is assigned becomes a repository that follows it."""

    def __init__(self, server):
        super().__init__()
        self._server = server

    def __setitem__(self, name, value):
        if not isinstance(value, Repository):
            value = Repository(name, Path(value), declared=self._server.declared_sha256)
        super().__setitem__(name, value)


class HubServer:
    """A Hub on loopback.

    Switches: `redirects` (large files are sent by another host), `xet_downloads`, `accept_xet`, `multipart_size`,
    `page_size`, `region` (of repositories made through the API). `gated` names repositories of which not even a
    listing is given; `access` has the (repository, user) pairs that accepted terms. `fault`, `faults`, `corrupted`
    make it misbehave; `before(method, path)` is called before each request is answered.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.folder = tempfile.mkdtemp(prefix="hub-server-")
        self.declared_sha256, self.cards = {}, {}
        self.repositories = Repositories(self)
        self.tokens = {token: dict(record) for token, record in DEFAULT_TOKENS.items()}
        self.gated, self.access, self.corrupted, self.faults = set(), set(), set(), {}
        self.requests, self.log, self.authorizations, self.errors = [], [], set(), []
        self.redirects = self.xet_downloads = self.accept_xet = False
        self.multipart_size, self.page_size, self.region = None, 1000, "us"
        self.before, self._fault, self.fault_hits = None, None, 0
        self.http = serve(self)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.other_host = f"http://localhost:{self.http.server_port}"

    @property
    def fault(self):
        """The Fault that is waiting or striking; requests are counted from when it was set."""
        return self._fault

    @fault.setter
    def fault(self, fault):
        with self.lock:
            if fault is not None:
                fault.seen = 0
            self._fault = fault

    def arrived(self, entry):
        """Record a request; the kind of fault that it meets, or None."""
        with self.lock:
            self.requests.append((entry.method, entry.path))
            self.log.append(entry)
            kind = self._fault.strikes(entry.method, entry.path) if self._fault else None
            self.fault_hits += kind is not None
            return kind

    def fetched(self):
        """The file paths that were downloaded, without the repository's name."""
        paths = []
        for method, path in list(self.requests):
            if method == "GET" and "/resolve/" in path:
                paths.append(path.split("/resolve/")[1].removeprefix("refs/pr/").split("/", 1)[1])
            elif method == "GET" and path.startswith("/cdn/"):
                paths.append(path.split("/", 5)[5])
        return paths

    def received_bytes(self):
        """The bytes of all request bodies since the log was reset."""
        return sum(entry.received_bytes for entry in list(self.log))

    def sent_bytes(self):
        """The bytes of all response bodies since the log was reset."""
        return sum(entry.sent_bytes for entry in list(self.log))

    def reset_log(self):
        """Forget the requests so far."""
        with self.lock:
            self.log.clear()
            self.requests.clear()

    def create(self, name, folder=None, *, private=False, gated=False, xet=True, card=None, region="us"):
        """Make a repository: from a folder, or with .gitattributes only, as the Hub does.

        datasets/OWNER/NAME is a data set, of which files can be downloaded and nothing else; spaces/OWNER/NAME a Space,
        which nothing runs.
        """
        with self.lock:
            folder = None if folder is None else Path(folder)
            made = Repository(name, folder, private, gated, xet, card, region, declared=self.declared_sha256)
            if folder is None:
                made.start()
            self.repositories[name] = made
            return made

    def _repository(self, name):
        """The repository, up to date with its folder."""
        repository = self.repositories[name]
        repository.refresh()
        return repository

    def commit_as_other(self, name, files, message="Change by somebody else", branch="main"):
        """Commit {path: bytes, or None to delete} directly, not over HTTP; returns the commit's oid."""
        with self.lock:
            repository = self._repository(name)
            head = repository.find(branch)
            tree = dict(head.tree)
            for path, data in files.items():
                tree.pop(path, None)
                if data is not None:
                    tree[path] = Entry.of_bytes(path, data, repository.xet)
            commit = repository.add_commit(head.oid, message, "", "other", tree)
            repository.move(branch, commit.oid)
            return commit.oid

    def tree(self, name, revision="main"):
        """{path: Entry} of a revision."""
        with self.lock:
            return dict(self._repository(name).find(revision).tree)

    def read(self, name, path, revision="main"):
        """The bytes of a file."""
        return self.tree(name, revision)[path].read()

    def commits(self, name, revision="main"):
        """The commits of a revision, newest first."""
        with self.lock:
            repository = self._repository(name)
            return list(repository.history(repository.find(revision)))


@contextmanager
def hub_server():
    """A running HubServer; its `environment(folder)` points huggingface_hub at it. Its own errors fail the test."""
    server = HubServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
        assert not server.errors, "\n".join(server.errors)
    finally:
        server.http.shutdown()
        server.http.server_close()
        shutil.rmtree(server.folder, ignore_errors=True)


def environment(server, home, token=None):
    """Environment variables that make a process use the server, with its own empty cache and no token but this."""
    variables = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    if token is not None:
        variables["HF_TOKEN"] = token
    elif "HF_TOKEN" in os.environ:
        variables["HF_TOKEN"] = ""
    return variables
