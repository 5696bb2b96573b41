"""What clients send by mistake or in a hurry: an answer in words that say whose fault it is, and nothing is lost."""

import asyncio
import json
import shutil
import socket
from dataclasses import replace

import pytest

from surgery.export.serve.access import Access
from surgery.export.serve.front import Front
from surgery.export.serve.gateway import Gateway
from surgery.export.serve.guard import Guard
from surgery.export.serve.refusal import Refusal
from surgery.export.serve.request import read_request
from surgery.export.serve.uploads import Form, read_form

from .test_gateway import Replica, call, running, until
from .test_guard import counted
from .test_openai import png
from .test_request import LIMITS, SERVED

PATH = "/v1/images/generations"
LAST = "Host: localhost\r\nConnection: close\r\n"


def raw(url, head, body=b"", waits=True):
    """(status, head, body) of the answer to what is sent as it is; None where the client does not wait for one."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(head.encode("latin-1") + b"\r\n" + body)
        answer = b""
        while waits and (chunk := client.recv(1 << 16)):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head[9:12]), head.decode("latin-1"), body) if waits else None


def post(body, path=PATH, kind="application/json", more=""):
    """The head and the body of a POST."""
    return f"POST {path} HTTP/1.1\r\n{LAST}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}", body


def test_a_load_balancer_may_ask_by_head(tmp_path):
    log = tmp_path / "log"
    with running(Replica(), access=Access(log=str(log))) as (url, _, _):
        for path, status in (("/health", 200), ("/v1/models/shapes%2Dpladis", 200), ("/v1/models/x", 404)):
            answered, head, body = raw(url, f"HEAD {path} HTTP/1.1\r\n{LAST}")
            assert answered == status and not body and "content-type: application/json" in head
        assert raw(url, f"HEAD {PATH} HTTP/1.1\r\n{LAST}")[0] == 405
        until(lambda: log.read_text().count('"HEAD"') == 4)


def test_an_origin_that_is_no_address_is_another_origin():
    with running(Replica()) as (url, _, _):
        for origin in ("http://[", "http://]x", "\xff"):
            status, _, body = raw(url, *post(b'{"prompt": "a"}', more=f"Origin: {origin}\r\n"))
            assert status == 403 and b'"forbidden_origin"' in body


def test_a_body_that_is_compressed_is_refused_by_its_encoding():
    with running(Replica()) as (url, _, _):
        status, _, body = raw(url, *post(b"\x1f\x8b", more="Content-Encoding: gzip\r\n"))
        assert status == 415 and b"not in gzip" in body


def test_who_sends_too_much_is_told_so_and_not_reset():
    megabyte = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    head = f"POST {PATH} HTTP/1.1\r\n{LAST}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    with running(Replica()) as (url, _, _):
        status, head, body = raw(url, head, megabyte * 40 + b"0\r\n\r\n")
        assert status == 413 and "connection: close" in head and b"at most 1048576 bytes" in body
        assert raw(url, *post(b"a" * 3_000_000))[0] == 413


def test_a_client_that_leaves_while_it_sends_is_no_fault_of_the_server():
    with running(Replica()) as (url, gateway, _):
        head, _ = post(b"a" * 100)
        raw(url, head, b"{", waits=False)
        until(lambda: counted(url, 499) == 1)
        assert counted(url, 500) == 0 and gateway.open_requests == 0


def test_a_log_that_cannot_be_written_any_more_is_told_once_and_stops_nothing(tmp_path, capfd):
    folder = tmp_path / "logs"
    folder.mkdir()
    with running(Replica(), access=Access(log=str(folder / "log"))) as (url, _, _):
        assert call(url, prompt="a")[0] == 200
        until((folder / "log").exists)
        shutil.rmtree(folder)
        assert [call(url, prompt="a")[0] for _ in range(3)] == [200] * 3
        folder.mkdir()
        assert call(url, prompt="a", n=1)[0] == 200
        until((folder / "log").exists)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "--access-log" in line]
    assert "cannot be written: No such file" in line


def test_where_each_request_has_a_number_already_it_is_not_told_twice():
    replica = Replica()
    with running(replica) as (_, _, loop):

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        def told(number, told_before):
            """The numbers in the answer to a request that has this one."""
            guard, got = Guard(app, lambda: replica.front, told_before), []
            headers = [(b"host", b"localhost"), *([(b"x-request-id", number)] if number else [])]
            scope = {"type": "http", "method": "GET", "path": "/live", "scheme": "http", "headers": headers}

            async def send(message):
                got.extend(value for name, value in message["headers"] if name == b"x-request-id")

            asyncio.run_coroutine_threadsafe(guard(scope, None, send), loop).result(20)
            return got

        assert told(b"mine-1", False) == [b"mine-1"] and told(b"mine-1", True) == []
        assert told(b"no good", True)[0].startswith(b"req_") and told(None, True)[0].startswith(b"req_")


@pytest.mark.parametrize("place", ["the body", "pladis", "a form"])
def test_of_many_mistakes_some_are_told_and_the_others_counted(place):
    many = {f"pr{at}": "1" for at in range(5000)}
    body = {
        "the body": json.dumps({"prompt": 5, **many}).encode(),
        "pladis": json.dumps({"prompt": "a", "pladis": dict.fromkeys(many, 1)}).encode(),
        "a form": Form({"n": "two", **many}, {"image": png()}),
    }[place]
    with pytest.raises(Refusal, match=r"and \d+ more mistakes$") as caught:
        read_request(body, SERVED, LIMITS, "edits" if place == "a form" else "generations")
    assert len(caught.value.message) < 5000


def test_of_many_fields_that_are_not_known_some_are_told():
    body = json.dumps({"prompt": "a", **dict.fromkeys(map(str, range(5000)), 1)}).encode()
    *some, last = read_request(body, SERVED, replace(LIMITS, strict=False)).warnings
    assert len(some) == 10 and last == "4990 more fields that are not known were ignored"


@pytest.mark.parametrize(
    "names", [("prompt", "prompt[x]"), ("prompt[x]", "prompt"), ("image", "image[0]"), ("n[a]", "n[]")]
)
def test_a_field_of_a_form_is_one_text_or_one_object(names):
    parts = "".join(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\na\r\n' for name in names)
    with pytest.raises(Refusal, match="is given twice"):
        read_form(f"{parts}--x--".encode(), "multipart/form-data; boundary=x")


def test_a_strength_that_leaves_no_step_is_told_before_anything_is_drawn():
    with pytest.raises(Refusal, match="strength of 0.05 leaves none of 4 steps") as caught:
        read_request(Form({"prompt": "a", "strength": "0.05", "steps": "4"}, {"image": png()}), SERVED, LIMITS, "edits")
    assert caught.value.param == "strength"


def test_it_is_up_once_each_model_has_a_replica():
    async def found():
        replicas = Replica(), Replica()
        replicas[1].alive = 0
        gateways = [Gateway(SERVED, LIMITS, 1, replica.send, replica.count) for replica in replicas]
        front = Front(gateways, gateways[0].metrics)
        await front.start()
        waiting = asyncio.ensure_future(front.up())
        done, _ = await asyncio.wait((waiting,), timeout=0.2)
        replicas[1].alive = 1
        await asyncio.wait_for(waiting, 20)
        for gateway in gateways:
            gateway.stop()
        return done, front.health()[0]

    assert asyncio.run(found()) == (set(), 200)
