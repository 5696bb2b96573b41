"""A model that is loaded anew while it is used: who may ask for it, and whose replicas draw what."""

import asyncio
import json
import threading
import time
from dataclasses import replace

import pytest

from surgery.errors import InputError
from surgery.export.serve.access import Access, read_keys
from surgery.export.serve.gateway import Gateway

from .test_gateway import Replica, call, running, until, waiting
from .test_request import SERVED

KEY, ADMIN = "k" * 32, "a" * 32
NEW = replace(SERVED, artifact_hash="e" * 64)
PATH = "/v1/models/shapes-pladis/reload"


@pytest.fixture
def access(tmp_path):
    """A key for drawing and one for more."""
    made = {}
    for name, key in (("keys", KEY), ("admins", ADMIN)):
        (tmp_path / name).write_text(key)
        made[name] = read_keys(tmp_path / name)
    return Access(**made)


def post(url, path=PATH, key=ADMIN):
    """(status, body) of a POST without a body of its own."""
    status, body, _ = call(url, path, headers={"Authorization": f"Bearer {key}"}, ignored=1)
    return status, json.loads(body)


def within(loop, made):
    """What a coroutine returns in the server's loop."""
    return asyncio.run_coroutine_threadsafe(made, loop).result(20)


def test_only_an_administrator_may_ask_and_where_there_is_none_nobody(access):
    replica = Replica()
    with running(replica, access=access) as (url, _, _):
        status, body = post(url, key=KEY)
        assert status == 401 and "--admin-key-file" in body["error"]["message"]
        assert post(url, key="x" * 32)[0] == 401
        assert call(url, headers={"Authorization": f"Bearer {ADMIN}"}, prompt="a")[0] == 200
        status, body = post(url, "/v1/models/shapes-pladi/reload")
        assert status == 404 and "did you mean shapes-pladis?" in body["error"]["message"]
        replica.front.reloads.patience = 0.05
        for _ in range(2):
            status, body = post(url)  # in this server nobody looks for wishes
            assert status == 503 and body["error"]["code"] == "no_reload"
    with running(Replica()) as (url, _, _):
        assert post(url)[0] == 403


def test_a_key_that_is_in_both_files_is_refused(access):
    with pytest.raises(InputError, match="--admin-key-file is in --api-key-file too"):
        Access(keys=access.keys, admins=access.keys).check()


def test_what_was_accepted_is_drawn_by_the_old_replicas_and_the_rest_by_the_new(access):
    old, new = Replica(), Replica()
    new.result = lambda request: replace(Replica().result(request), image="new")
    key = {"headers": {"Authorization": f"Bearer {KEY}"}}
    with running(old, access=access) as (url, gateway, loop):
        front = old.front
        assert within(loop, front.reloads.next(0.01)) is None
        asked = {}
        asking = threading.Thread(target=lambda: asked.update(first=post(url)))
        asking.start()
        assert within(loop, front.reloads.next(20)) == within(loop, front.reloads.next(20)) == 0
        status, body = post(url)
        assert status == 409 and body["error"]["code"] == "reload_under_way"
        old.held = True
        with waiting(url, {"prompt": "a", **key}, {"prompt": "b", **key}) as answers:
            until(lambda: gateway.open_requests == 2)
            other = Gateway(NEW, gateway.limits, 1, new.send, new.count, metrics=gateway.metrics)
            within(loop, front.switch(0, other))
            assert front.left() >= 2
            body = json.loads(call(url, prompt="c", **key)[1])
            assert body["artifact_hash"] == NEW.artifact_hash and body["data"][0]["b64_json"] == "new"
            (listed,) = json.loads(call(url, "/v1/models", **key)[1])["data"]
            assert listed["artifact_hash"] == NEW.artifact_hash
            assert b"surgery_requests_in_flight 2.0" in call(url, "/metrics", **key)[1]
            assert call(url, "/health")[0] == 200
            old.held = False
        for answer in answers:
            body = json.loads(answer[1])
            assert answer[0] == 200 and body["artifact_hash"] == SERVED.artifact_hash
            assert body["data"][0]["b64_json"] != "new"
        until(lambda: front.left() == 0)
        loop.call_soon_threadsafe(front.reloads.tell, {"id": "shapes-pladis", "artifact_hash": NEW.artifact_hash})
        asking.join(20)
        assert within(loop, front.reloads.next(0.01)) is None
        assert asked["first"] == (200, {"id": "shapes-pladis", "artifact_hash": NEW.artifact_hash})


def test_a_model_that_is_refused_is_told_and_the_next_may_be_asked_for(access):
    replica = Replica()
    with running(replica, access=access) as (url, _, loop):
        reloads = replica.front.reloads
        for answer, status in (("it was altered", 422), ({"id": "x"}, 200)):
            within(loop, reloads.next(0.01))
            asked = {}
            asking = threading.Thread(target=lambda asked=asked: asked.update(first=post(url)))
            asking.start()
            assert within(loop, reloads.next(20)) == 0
            loop.call_soon_threadsafe(reloads.tell, answer)
            asking.join(20)
            assert asked["first"][0] == status
        assert call(url, headers={"Authorization": f"Bearer {KEY}"}, prompt="a")[0] == 200


def test_requests_are_not_lost_while_models_come_and_go():
    replica = Replica()
    statuses = []
    with running(replica, queue=64) as (url, gateway, loop):
        ends = time.monotonic() + 0.6

        def ask():
            while time.monotonic() < ends:
                statuses.append(call(url, prompt="a")[0])

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        for number in range(10):
            other = Replica()
            served = replace(SERVED, artifact_hash=f"{number:064x}")
            made = Gateway(served, gateway.limits, 1, other.send, other.count, metrics=gateway.metrics)
            within(loop, replica.front.switch(0, made))
            until(lambda: replica.front.left() == 0)
        for client in clients:
            client.join()
    assert len(statuses) > 20 and set(statuses) == {200}
