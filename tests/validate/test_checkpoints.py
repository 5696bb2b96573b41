"""Checkpoints of metrics: fetched at their commit and once, given by hand; what is said where they are not there."""

import http.server
import threading

import pytest

from surgery.errors import InputError, SurgeryError
from surgery.validate.checkpoints import fetch_checkpoints
from surgery.validate.metrics.info import HubFiles, Info, WebFile

from ..loopback_hub import hub_server
from ..publish.conftest import use_hub  # noqa: F401 a fixture

DATA = b"weights"


def info_of(source):
    return Info("clip_score", "CLIPScore", "score", True, "tests", {"model": source})


def head_of(hub):
    repository = hub.repositories["owner/model"]
    repository.refresh()
    return repository.find("main").oid


@pytest.fixture
def hub(use_hub, tmp_path):  # noqa: F811
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(DATA)
    (folder / "config.json").write_text("{}")
    (folder / "other.bin").write_bytes(b"not wanted")
    with hub_server() as server:
        server.create("owner/model", folder)
        use_hub(server)
        yield server


def test_the_files_of_a_commit_are_fetched_once(hub):
    commit = head_of(hub)
    info = info_of(HubFiles("owner/model", ("*.json", "model.safetensors"), commit))
    found = fetch_checkpoints(info)["model"]
    assert found.identity == f"owner/model@{commit}"
    assert sorted(path.name for path in found.path.iterdir()) == ["config.json", "model.safetensors"]
    before = len(hub.requests)
    assert fetch_checkpoints(info)["model"] == found and len(hub.requests) == before


def test_without_a_pin_the_newest_commit_is_taken_and_named(hub):
    found = fetch_checkpoints(info_of(HubFiles("owner/model", ("model.safetensors",))))["model"]
    assert found.identity == f"owner/model@{head_of(hub)}"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (HubFiles("owner/nothing", ("x",)), r"owner/nothing cannot be fetched: .*--checkpoint clip_score\.model=PATH"),
        (HubFiles("owner/model", ("model.safetensors", "gone.json")), r"has no gone\.json; or give the files"),
    ],
)
def test_what_is_not_there_is_named_with_the_way_round_it(hub, source, match):
    with pytest.raises(SurgeryError, match=match):
        fetch_checkpoints(info_of(source))


def test_offline_without_a_copy(hub, use_hub):  # noqa: F811
    use_hub(hub, home="empty", offline=True)
    with pytest.raises(SurgeryError, match="owner/model cannot be fetched"):
        fetch_checkpoints(info_of(HubFiles("owner/model", ("x",))))
    with pytest.raises(SurgeryError, match="not in the cache"):
        fetch_checkpoints(info_of(WebFile("http://127.0.0.1:1/x.pth", "")))


@pytest.fixture
def web(hub):
    """The address of a file on a web server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/weights.pth" else 404)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/weights.pth"
    server.shutdown()


def test_a_file_of_the_web_is_checked_and_kept(web):
    import hashlib

    digest = hashlib.sha256(DATA).hexdigest()
    found = fetch_checkpoints(info_of(WebFile(web, digest)))["model"]
    assert found.path.read_bytes() == DATA and found.identity == f"weights.pth sha256 {digest[:12]}"
    found.path.write_bytes(b"damaged on disk")
    with pytest.raises(SurgeryError, match="is damaged"):
        fetch_checkpoints(info_of(WebFile(web, digest)))
    assert fetch_checkpoints(info_of(WebFile(web, digest)))["model"].path.read_bytes() == DATA


def test_a_file_of_the_web_that_is_another_or_not_there(web):
    with pytest.raises(SurgeryError, match=r"weights\.pth cannot be fetched: .*invalid hash"):
        fetch_checkpoints(info_of(WebFile(web, "0" * 64)))
    with pytest.raises(SurgeryError, match=r"gone\.pth cannot be fetched: .*404"):
        fetch_checkpoints(info_of(WebFile(web.replace("weights", "gone"), "0" * 64)))


def test_given_by_hand(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(DATA)
    hub, web = HubFiles("owner/model", ("model.safetensors",)), WebFile("https://host/x.pth", "0" * 64)
    folder = fetch_checkpoints(info_of(hub), {"model": tmp_path})["model"]
    file = fetch_checkpoints(info_of(web), {"model": tmp_path / "model.safetensors"})["model"]
    assert "model.safetensors" in folder.identity and str(tmp_path) not in folder.identity + file.identity
    for source, path, match in (
        (hub, tmp_path / "gone", "there is no folder"),
        (web, tmp_path / "gone", "there is no file"),
        (HubFiles("owner/model", ("x.bin",)), tmp_path, r"holds none of x\.bin"),
    ):
        with pytest.raises(InputError, match=match):
            fetch_checkpoints(info_of(source), {"model": path})
