"""Keys, pages of other origins, proxies, and the log: who may use a server, and what is kept of it."""

import hashlib
import json
import subprocess
import urllib.request

import pytest

from surgery.errors import InputError
from surgery.export.serve.access import Access, as_forwarded, read_keys
from surgery.export.serve.store import Store

from .test_gateway import Replica, call, running
from .test_guard import counted

KEY, OTHER = "k" * 32, "o" * 32


@pytest.fixture
def keys(tmp_path):
    """A file with two keys."""
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n{KEY}\n\n{OTHER}\n")
    return path


def test_each_key_of_the_file_opens_and_nothing_else_does(keys):
    with running(Replica(), access=Access(keys=read_keys(keys))) as (url, _, _):
        for key in (KEY, OTHER):
            assert call(url, headers={"Authorization": f"Bearer {key}"}, prompt="a")[0] == 200
        for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}):
            status, body, told = call(url, headers=headers, prompt="a")
            error = json.loads(body)["error"]
            assert status == 401 and error["type"] == "authentication_error" and told["WWW-Authenticate"] == "Bearer"
            assert KEY not in body.decode()
        assert call(url, "/metrics")[0] == call(url, "/v1/models")[0] == 401
        assert call(url, "/live")[0] == call(url, "/health")[0] == 200
        metrics = call(url, "/metrics", headers={"Authorization": f"Bearer {KEY}"})[1].decode()
        assert 'surgery_requests_total{status="401"} 5.0' in metrics and "surgery_process_resident_memory" in metrics


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        ("short\n", "16 characters"),
        ("a b" * 9, "no space"),
        ("k" * 20 + "\n" + "a\tb" * 9, "key 2 must .* no space"),
        ("k" * 20 + "\0", "16 characters of ASCII"),
    ],
)
def test_a_file_of_keys_that_is_of_no_use_is_told(tmp_path, content, words):
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"--api-key-file .*{words}"):
        read_keys(path)


def test_keys_are_read_as_editors_elsewhere_write_them_and_each_counts_once(tmp_path, capsys):
    path = tmp_path / "keys"
    path.write_bytes(f"\ufeff{KEY}\r\n{OTHER}\r\n{KEY}".encode())
    path.chmod(0o600)
    assert read_keys(path) == tuple(hashlib.sha256(key.encode()).digest() for key in (KEY, OTHER))
    assert not capsys.readouterr().err
    path.chmod(0o644)
    read_keys(path)
    assert "keys can be read by everyone on this machine; chmod 600" in capsys.readouterr().err


def test_a_page_of_an_allowed_origin_may_ask_and_read_and_another_may_not():
    page = {"Origin": "https://app.example"}
    asks = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with running(Replica(), access=Access(origins=("https://app.example",))) as (url, _, _):
        status, _, told = call(url, headers=page, prompt="a")
        assert status == 200 and told["Access-Control-Allow-Origin"] == "https://app.example"
        assert "Origin" in told["Vary"] and "Retry-After" in told["Access-Control-Expose-Headers"]
        request = urllib.request.Request(f"{url}/v1/images/generations", headers=asks, method="OPTIONS")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 204 and answer.headers["Access-Control-Allow-Headers"] == "authorization"
        status, _, told = call(url, headers={"Origin": "https://evil.example"}, prompt="a")
        assert status == 403 and "Access-Control-Allow-Origin" not in told


def test_a_proxys_word_is_taken_where_it_is_trusted_and_nobody_elses(tmp_path):
    log = tmp_path / "log"
    headers = {
        "X-Forwarded-For": "203.0.113.9, 198.51.100.4",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "images.example",
    }
    asked = {"prompt": "a", "response_format": "url"}
    for proxies, begin, client in (
        (("127.0.0.0/8",), "https://images.example/v1/images/files/", "198.51.100.4"),
        ((), "http://127.0.0.1:", "127.0.0.1"),
    ):
        access = Access(hosts=("images.example",), proxies=proxies, log=str(log))
        replica = Replica()
        whole = replica.result
        replica.result = lambda request, whole=whole: type(whole(request))(image="YQ==", size="64x64")
        with running(replica, access=access) as (url, _, _):
            body = json.loads(call(url, headers=headers, **asked)[1])
            assert body["data"][0]["url"].startswith(begin)
        assert json.loads(log.read_text().splitlines()[-1])["client"] == client


def test_of_several_proxies_the_last_that_is_not_trusted_is_the_client():
    access = Access(proxies=("10.0.0.0/8",))
    scope = {"client": ("10.0.0.1", 5), "headers": [(b"x-forwarded-for", b"1.2.3.4, 198.51.100.4, 10.0.0.7")]}
    assert as_forwarded(scope, access)["client"][0] == "198.51.100.4"
    outside = {**scope, "client": ("198.51.100.9", 5)}
    assert as_forwarded(outside, access) is outside


@pytest.mark.parametrize("prompts", [False, True])
def test_the_log_has_a_line_of_json_for_each_request_and_no_prompt_unless_asked(tmp_path, prompts):
    log = tmp_path / "log"
    with running(Replica(), access=Access(log=str(log), log_prompts=prompts)) as (url, _, _):
        told = call(url, headers={"X-Request-Id": "mine-1"}, prompt="a secret", seed=7)[2]
        assert told["X-Request-Id"] == "mine-1"
        assert call(url, headers={"X-Request-Id": "no good"}, prompt=" ")[2]["X-Request-Id"].startswith("req_")
        assert counted(url, 400) == 1
    lines = [json.loads(line) for line in log.read_text().splitlines() if '"POST"' in line]
    good, bad = sorted(lines, key=lambda line: line["request_id"] != "mine-1")  # which are written after the answer
    assert (good["request_id"], good["status"], good["seed"], good["model"]) == ("mine-1", 200, 7, "shapes-pladis")
    assert bad["status"] == 400 and ("secret" in log.read_text()) is prompts and good["seconds"] > 0


@pytest.mark.parametrize(
    ("access", "words"),
    [
        ({"origins": ("app.example",)}, "--cors-origin app.example: write it as https://app.example"),
        ({"proxies": ("proxy",)}, "--trust-proxy proxy: write an address"),
        ({"log_prompts": True}, "--log-prompts goes with --access-log or --otel"),
        ({"log": "/no/such/folder/log"}, "--access-log /no/such/folder/log cannot be written"),
    ],
)
def test_what_cannot_be_is_told_by_its_option(access, words):
    with pytest.raises(InputError, match=words):
        Access(**access).check()


def test_the_store_keeps_no_more_than_its_bytes_and_drops_the_oldest():
    now = [0.0]
    store = Store(10, 60, lambda: now[0])
    paths = [store.put(bytes(4), "image/png") for _ in range(3)]

    def get(path):
        name, _, query = path.removeprefix("/v1/images/files/").partition("?")
        return store.get(name, **dict(part.split("=") for part in query.split("&")))

    assert store.bytes == 8 and get(paths[2]) == (bytes(4), "image/png") == get(paths[1])
    for path, when in ((paths[0], 0), (paths[1], 61.5)):
        now[0] = when
        with pytest.raises(Exception, match="not kept any more"):
            get(path)
    assert store.bytes == 0
    with pytest.raises(Exception, match="more than are kept"):
        store.put(bytes(11), "image/png")


def test_curl_as_the_documentation_has_it_draws(keys):
    with running(Replica(), access=Access(keys=read_keys(keys))) as (url, _, _):
        command = ["curl", "-sf", f"{url}/v1/images/generations", "-H", f"Authorization: Bearer {KEY}"]
        done = subprocess.run([*command, "--json", '{"prompt": "a red circle", "seed": 7}'], capture_output=True)
        assert done.returncode == 0 and json.loads(done.stdout)["data"][0]["seed"] == 7
