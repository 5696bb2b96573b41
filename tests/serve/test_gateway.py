"""The gateway over HTTP on loopback, with replicas that are no processes: every answer that a client can get."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import Any

import pytest

from surgery.export.serve.checking import Limits
from surgery.export.serve.front import Front
from surgery.export.serve.gateway import Gateway
from surgery.export.serve.http import http_app
from surgery.export.serve.request import ImageResult

from .test_request import SERVED

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


class Replica:
    """Draws as long as `held` is set, and then whatever `result` is."""

    def __init__(self):
        self.held, self.begun, self.stopped, self.alive = False, 0, 0, 1
        self.front: Any = None  # which `running` makes over it
        self.result = lambda request: ImageResult(image=f"{request.prompt} {request.seed}", size="64x64")

    async def send(self, key, requests, show):
        self.begun += 1
        try:
            while self.held:
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        return [self.result(request) for request in requests]

    async def count(self):
        return self.alive


@contextmanager
def running(replica, served=SERVED, access=None, further=(), spans=None, **limits):
    """(the base URL, the Gateway, its event loop) of a server in a thread. further: ServedModels beside it."""
    limits = Limits(**{"batch_wait": 0.0, "max_batch": 1, "queue": 2, "timeout": 20.0, **limits})
    gateway = Gateway(served, limits, 1, replica.send, replica.count, spans=spans)
    others = [Gateway(other, limits, 1, replica.send, replica.count, metrics=gateway.metrics) for other in further]
    front = replica.front = Front([gateway, *others], gateway.metrics, access, spans)
    app, loops = http_app(lambda: front), []

    async def serve(scope, receive, send):
        if not loops:
            loops.append(asyncio.get_running_loop())
            await front.start()
            await asyncio.sleep(0)
        await app(scope, receive, send)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(serve, lifespan="off", log_level="critical", proxy_headers=False))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            call(url, "/health")
            yield url, gateway, loops[0]
        finally:
            replica.held = False
            server.should_exit = True
            thread.join()


def call(url, path="/v1/images/generations", timeout=30, headers=None, **asked):
    """(status, body, headers) of a POST, or of a GET where nothing is asked."""
    data = json.dumps(asked).encode() if asked else None
    headers = {"Content-Type": "application/json", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=timeout) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@contextmanager
def waiting(url, *requests):
    """The answers, once they are there, of requests that are sent meanwhile."""
    answers = [None] * len(requests)

    def ask(at):
        answers[at] = call(url, **requests[at])

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(requests))]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join()


def until(condition, seconds=60):
    """Wait for a condition; AssertionError where it does not come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_answer_is_openais_with_the_seed_and_the_artifact():
    with running(Replica()) as (url, _, _):
        status, body, _ = call(url, prompt="a star", n=2, seed=5, pladis={"scale": 2}, steps=3)
        body = json.loads(body)
        assert status == 200 and abs(body.pop("created") - time.time()) < 60
        assert body == {
            "data": [{"b64_json": "a star 5", "seed": 5}, {"b64_json": "a star 6", "seed": 6}],
            "model": "shapes-pladis",
            "artifact_hash": "f" * 64,
            "size": "64x64",
            "output_format": "png",
            "quality": "auto",
            "background": "opaque",
            "usage": {
                "input_tokens": 0,
                "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
                "output_tokens": 0,
                "total_tokens": 0,
            },
            "steps": 3,
            "guidance_scale": 4.0,
            "pladis": {"scale": 2.0},
        }
        (model,) = json.loads(call(url, "/v1/models")[1])["data"]
        assert model["id"] == "shapes-pladis" and model["pladis"]["alpha"] == [1.5]
        assert model["loras"] == ["sketch", "pixel"]
        drawn = json.loads(call(url, prompt="a", lora="sketch")[1])
        assert drawn["lora"] == [{"name": "sketch", "scale": 1.0}]


def test_a_wrong_request_a_wrong_path_and_a_long_body_are_answered_in_openais_form():
    with running(Replica()) as (url, _, _):
        for path, asked, status, code in (
            ("/v1/images/generations", {"promt": "a"}, 400, "invalid_value"),
            ("/v1/images/elsewhere", {"prompt": "a"}, 404, "not_found"),
            ("/v1/images/edits", {"prompt": "a"}, 415, "unsupported_media_type"),
            ("/health", {"prompt": "a"}, 405, "invalid_request"),
            ("/v1/images/generations", {"prompt": "a" * 1_100_000}, 413, "too_large"),
        ):
            answered, body, _ = call(url, path, **asked)
            error = json.loads(body)["error"]
            assert (answered, error["code"]) == (status, code) and error["message"], path
        counted = call(url, "/metrics")[1]
        assert all(b'surgery_requests_total{status="%d"} 1.0' % status in counted for status in (400, 404, 405, 413))


def test_a_full_queue_refuses_at_once_and_takes_the_next_when_there_is_room():
    replica = Replica()
    with running(replica) as (url, gateway, _):
        replica.held = True
        with waiting(url, {"prompt": "a"}, {"prompt": "b"}) as answers:
            until(lambda: gateway.open_requests == 2)
            begun = time.monotonic()
            status, body, headers = call(url, prompt="c")
            assert status == 429 and json.loads(body)["error"]["type"] == "rate_limit_error"
            assert int(headers["Retry-After"]) >= 1 and time.monotonic() - begun < 5
            assert b"surgery_requests_in_flight 2.0" in call(url, "/metrics")[1]
            replica.held = False
        assert [answer[0] for answer in answers] == [200, 200]
        assert call(url, prompt="c")[0] == 200


def test_what_takes_too_long_is_given_up_by_the_server_and_the_replica():
    replica = Replica()
    with running(replica, timeout=0.3) as (url, gateway, _):
        replica.held = True
        with waiting(url, {"prompt": "a"}, {"prompt": "b"}) as answers:
            pass
        assert [answer[0] for answer in answers] == [504, 504]
        until(lambda: replica.stopped == replica.begun)
        assert gateway.open_requests == 0
        replica.held = False
        assert call(url, prompt="c")[0] == 200


def test_a_client_that_leaves_makes_room():
    replica = Replica()
    with running(replica) as (url, gateway, _):
        replica.held = True
        for _ in range(3):
            with pytest.raises(TimeoutError):
                call(url, prompt="a", timeout=0.2)
        until(lambda: gateway.open_requests == 0 and replica.begun == replica.stopped)
        assert replica.begun > 0


def test_what_does_not_fit_or_fails_is_said_so_and_the_next_request_is_served():
    replica = Replica()
    with running(replica) as (url, _, _):
        good = replica.result
        for kind, status in (("memory", 507), ("failed", 500), ("refused", 400)):
            replica.result = lambda request, kind=kind: ImageResult(problem="too bad", kind=kind)
            answered, body, _ = call(url, prompt="a")
            assert answered == status and "too bad" in json.loads(body)["error"]["message"]
        replica.result = good
        assert call(url, prompt="a")[0] == 200


def test_health_tells_whether_a_replica_is_up():
    replica = Replica()
    replica.alive = 0
    with running(replica) as (url, _, _):
        status, body, _ = call(url, "/health")
        assert status == 503 and json.loads(body) == {"status": "starting", "replicas": 0, "of": 1}
        replica.alive = 1
        until(lambda: call(url, "/health")[0] == 200)
        replica.alive = 0
        until(lambda: json.loads(call(url, "/health")[1])["status"] == "down")


def test_draining_refuses_what_is_new_and_finishes_what_was_accepted():
    replica = Replica()
    with running(replica) as (url, gateway, loop):
        replica.held = True
        with waiting(url, {"prompt": "a"}) as answers:
            until(lambda: gateway.open_requests == 1)
            left = asyncio.run_coroutine_threadsafe(gateway.drain(20), loop)
            until(lambda: call(url, "/health")[0] == 503)
            status, _, headers = call(url, prompt="b")
            assert status == 503 and headers["Connection"] == "close"
            assert not left.done()
            replica.held = False
        assert answers[0][0] == 200 and left.result(20) == 0
        assert asyncio.run_coroutine_threadsafe(gateway.drain(0), loop).result(20) == 0
