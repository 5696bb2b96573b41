"""What a web page can have a browser send, and what never ends: refused, and counted."""

import socket

import pytest

from surgery.export.serve import http
from surgery.export.serve.access import Access, wrong_sender

from .test_gateway import Replica, call, running

starlette = pytest.importorskip("starlette.datastructures")
PATH = "/v1/images/generations"


def counted(url, status):
    """How many requests the metrics count with a status."""
    lines = call(url, "/metrics")[1].decode().splitlines()
    found = [line for line in lines if line.startswith(f'surgery_requests_total{{status="{status}"}}')]
    return sum(float(line.split()[-1]) for line in found)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "evil.example@127.0.0.1"}, 400),
        ({"Host": ""}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
    ],
)
def test_what_a_page_can_send_is_refused_and_counted_before_anything_is_drawn(headers, status):
    replica = Replica()
    with running(replica) as (url, _, _):
        answered, body, _ = call(url, headers=headers, prompt="a")
        assert answered == status and b'"error"' in body
        assert counted(url, status) == 1 and replica.begun == 0
        if status != 415:
            assert call(url, "/metrics", headers=headers)[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:8000"},
        {"Host": "[::1]:8000"},
        {"Host": "192.0.2.7"},
        {"Host": socket.gethostname().upper()},
        {"Host": "images.example", "Origin": "https://images.example"},
        {"Content-Type": "Application/JSON; charset=utf-8"},
    ],
)
def test_what_clients_send_is_answered(headers):
    with running(Replica(), hosts=("images.example",)) as (url, _, _):
        assert call(url, headers=headers, prompt="a")[0] == 200


def test_a_second_host_header_is_refused_and_any_name_may_be_allowed():
    twice = starlette.Headers(raw=[(b"host", b"localhost"), (b"host", b"evil.example")])
    any_name = Access(hosts=("*",))
    assert wrong_sender(twice, Access()).status == wrong_sender(starlette.Headers({}), any_name).status == 400
    assert wrong_sender(starlette.Headers({"host": "a.example"}), any_name) is None


def test_no_redirect_is_built_from_the_host():
    with running(Replica()) as (url, _, _):
        answered, _, headers = call(url, "/v1/models/", headers={"Host": "localhost"})
        assert answered == 404 and "Location" not in headers and counted(url, 404) == 1


@pytest.mark.parametrize("part", [b"", b'{"prompt": '])
def test_a_request_that_never_ends_is_ended(part, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.3)
    with running(Replica()) as (url, gateway, _):
        host, port = url.removeprefix("http://").split(":")
        head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=20) as half:
            half.sendall(head.encode() + part)
            answer = b""
            while chunk := half.recv(4096):  # until the server closes the connection
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 408") and b'"request_timeout"' in answer
        assert counted(url, 408) == 1 and gateway.open_requests == 0
