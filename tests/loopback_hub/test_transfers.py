"""The Hub of the tests, asked by the real huggingface_hub: files that come and go, whole, damaged or in parts."""

import hashlib
import os
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub import snapshot_download as hub_snapshot
from huggingface_hub.errors import (
    HfHubHTTPError,
)

from . import KINDS, WRITE_TOKEN, Fault, environment
from .sample_files import REPO, push, safetensors


@pytest.mark.parametrize("redirects", [False, True])
def test_downloads_arrive_whole_or_in_ranges(hub, api, tmp_path, redirects):
    hub.redirects = redirects
    data = safetensors(os.urandom(400_000))
    hub.create("owner/base")
    hub.commit_as_other("owner/base", {"unet/w.safetensors": data, "big.json": b" " * 5000})
    metadata = api.parse_safetensors_file_metadata("owner/base", "unet/w.safetensors")
    assert metadata.tensors["w"].shape == [400_000] and hub.sent_bytes() < 110_000
    folder = hub_snapshot(
        "owner/base",
        cache_dir=tmp_path,
        endpoint=hub.url,
        token=WRITE_TOKEN,
        allow_patterns=["*.safetensors", "*.json"],
    )
    assert Path(folder, "unet/w.safetensors").read_bytes() == data
    assert set(hub.fetched()) == {"unet/w.safetensors", "big.json"}
    assert any(path.startswith("/cdn/") for _, path in hub.requests) is redirects
    url, client = f"{hub.url}/owner/base/resolve/main/unet/w.safetensors", httpx2.Client(follow_redirects=True)
    for wanted, expected in (("5-9", data[5:10]), ("400000-", data[400000:]), ("-7", data[-7:])):
        response = client.get(url, headers={"Range": f"bytes={wanted}"})
        assert (response.status_code, response.content) == (206, expected)
        assert response.headers["Content-Range"].endswith(f"/{len(data)}")
    assert client.get(url, headers={"Range": "bytes=9000000-"}).status_code == 416
    hub.corrupted.add("unet/w.safetensors")
    assert client.get(url).content[:-1] == data[:-1] and client.get(url).content != data


@pytest.mark.parametrize("kind", KINDS)
def test_downloads_survive_or_report_each_fault(hub, api, tmp_path, kind, monkeypatch):
    data = os.urandom(2_500_000)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what the client loses when it is cut off
    hub.create("owner/base")
    hub.commit_as_other("owner/base", {"w.bin": data})
    hub.fault = Fault(1, kind, method="GET")

    def download():
        """The file's place in the cache."""
        return Path(api.hf_hub_download("owner/base", "w.bin", cache_dir=tmp_path))

    try:
        found = download().read_bytes()
    except (HfHubHTTPError, httpx2.TransportError):
        assert kind in ("500", "503", "lost500", "reset")
        found = download().read_bytes()
    assert hub.fault_hits == 1
    changed = [a ^ b for a, b in zip(found, data, strict=True) if a != b]
    assert changed == ([1] if kind == "flip" else [])
    if kind == "cut":  # the rest was asked for, not the whole again
        assert hub.sent_bytes() < 2_700_000


@pytest.mark.parametrize("kind", KINDS)
def test_uploads_meet_each_fault_with_or_without_effect(hub, api, kind):
    api.create_repo(REPO)
    data = os.urandom(200_000)
    hub.fault = Fault(1, kind, method="PUT")
    push(api, {"w.bin": data})  # the client tries large files again by itself
    assert hub.fault_hits == 1 and hub.read(REPO, "w.bin") == data
    hub.fault = Fault(1, kind, path="/commit/")
    acts = kind in ("lost", "lost500", "cut", "flip")
    try:
        push(api, {"a.txt": b"1"})
        assert kind == "flip"
    except (HfHubHTTPError, httpx2.TransportError):
        assert kind != "flip"  # and a commit it does not try again
    assert ("a.txt" in hub.tree(REPO)) is acts and hub.fault_hits == 2
    push(api, {"a.txt": b"1"})
    assert len(hub.commits(REPO)) == 3


def test_faults_count_from_when_they_are_set_and_may_last(hub, api):
    api.create_repo(REPO)
    hub.fault = Fault(2, "503", times=2)
    seen = [httpx2.get(f"{hub.url}/api/models/{REPO}").status_code for _ in range(5)]
    assert seen == [200, 503, 503, 200, 200] and hub.fault_hits == 2
    with pytest.raises(ValueError, match="unknown fault"):
        Fault(1, "explode")


def test_large_files_may_be_sent_in_parts(hub, api):
    api.create_repo(REPO)
    hub.multipart_size = 100_000
    data = os.urandom(250_000)
    hub.fault = Fault(2, "reset", method="PUT")
    push(api, {"w.bin": data, "small.bin": data[:1000]})
    assert hub.read(REPO, "w.bin") == data and hub.fault_hits == 1
    assert [entry.received_bytes for entry in hub.log if entry.path.endswith("/3")] == [50_000]


def test_what_arrives_damaged_is_refused(hub, api):
    api.create_repo(REPO)
    response = httpx2.put(f"{hub.url}/lfs/{REPO}/{'0' * 64}", content=b"something")
    assert response.status_code == 400 and not hub.repositories[REPO].objects


def test_a_connection_stays_usable_after_errors_and_chunked_bodies(hub, api):
    api.create_repo(REPO)
    data = os.urandom(300_000)
    oid = hashlib.sha256(data).hexdigest()
    with httpx2.Client() as client:
        for _ in range(2):
            assert client.post(f"{hub.url}/nothing", content=b"x" * 5000).status_code == 404
            chunked = client.put(f"{hub.url}/lfs/{REPO}/{oid}", content=iter([data[:7], data[7:]]))
            assert chunked.status_code == 200 and chunked.request.headers["Transfer-Encoding"] == "chunked"
            assert client.head(f"{hub.url}/{REPO}/resolve/main/.gitattributes").status_code == 200
            expecting = client.put(f"{hub.url}/lfs/{REPO}/{oid}", content=data, headers={"Expect": "100-continue"})
            assert expecting.status_code == 200
    assert hub.received_bytes() > 1_200_000


def test_the_real_xet_client_sends_to_and_reads_from_a_folder(hub, run, tmp_path):
    hub.xet_downloads = True
    hub.create(REPO)
    code = (
        "from pathlib import Path\n"
        "from huggingface_hub import CommitOperationCopy, HfApi\n"
        "api = HfApi()\n"
        "api.upload_file(path_or_fileobj=b'x' * 300_000, path_in_repo='w.bin', repo_id='me/model')\n"
        "api.create_repo('me/copy')\n"
        "copy = CommitOperationCopy('w.bin', 'c.bin', src_repo_id='me/model', src_repo_type='model')\n"
        "api.create_commit('me/copy', [copy], commit_message='copy')\n"
        "print(api.whoami()['name'], Path(api.hf_hub_download('me/copy', 'c.bin')).stat().st_size)\n"
    )
    variables = {**environment(hub, tmp_path / "home", WRITE_TOKEN), "HF_HUB_DISABLE_XET": "0"}
    assert run(python=code, env=variables, check=0).stdout.strip() == "me 300000"
    entry = hub.tree(REPO)["w.bin"]
    assert entry.sha256 == hashlib.sha256(b"x" * 300_000).hexdigest() and not entry.has_bytes
    assert not [path for method, path in hub.requests if method == "PUT" or (method == "GET" and "/resolve/" in path)]
