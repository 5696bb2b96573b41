"""Batches: as full as equal settings allow, given to idle replicas alone, and none lost with its replica."""

import asyncio

import pytest

from surgery.export.serve.batching import TRIES, Dispatcher, ReplicaLost
from surgery.export.serve.request import BatchKey, ImageResult
from surgery.runtime.worker import ImageRequest

A, B = BatchKey(steps=1), BatchKey(steps=2)


class Replicas:
    """Records the batches it is given; each takes `seconds`, and the first ones die."""

    def __init__(self, seconds=0.02, deaths=0, alive=1):
        self.seconds, self.deaths, self.alive = seconds, deaths, alive
        self.batches, self.stopped, self.at_once, self.most = [], [], 0, 0

    async def send(self, key, requests, show):
        self.batches.append((key, [request.seed for request in requests]))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.stopped.append([request.seed for request in requests])
            raise
        finally:
            self.at_once -= 1
        if self.deaths:
            self.deaths -= 1
            raise ReplicaLost("killed")
        return [ImageResult(image=f"{key.steps} {request.seed}") for request in requests]

    def batch(self, size):
        pass

    lost = batch


def dispatcher(replicas, max_batch=4, wait=0.0):
    return Dispatcher(replicas.send, lambda: replicas.alive, max_batch, wait, replicas)


def requests(*seeds):
    return [ImageRequest("a", seed) for seed in seeds]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("surgery.export.serve.batching._PAUSE", 0.0)


def test_what_waits_together_with_equal_settings_is_drawn_together():
    async def run():
        replicas = Replicas()
        made = dispatcher(replicas, wait=0.01)
        asked = [(A, requests(1)), (B, requests(2)), (A, requests(3, 4)), (B, requests(5))]
        drawn = await asyncio.gather(*(made.draw(*each) for each in asked))
        assert [[one.image for one in each] for each in drawn] == [["1 1"], ["2 2"], ["1 3", "1 4"], ["2 5"]]
        assert replicas.batches == [(A, [1, 3, 4]), (B, [2, 5])]
        assert made.waiting == made.flying == 0

    asyncio.run(run())


def test_a_full_batch_does_not_wait_and_a_lone_image_waits_no_longer_than_it_should():
    async def run():
        clock = asyncio.get_running_loop().time
        replicas = Replicas(seconds=0)
        made = dispatcher(replicas, max_batch=2, wait=0.3)
        begun = clock()
        await made.draw(A, requests(1, 2))
        assert clock() - begun < 0.2
        await made.draw(A, requests(3))
        assert 0.25 < clock() - begun < 2

    asyncio.run(run())


def test_no_replica_gets_a_second_batch_before_it_is_idle_and_the_oldest_image_goes_first():
    async def run():
        replicas = Replicas(alive=2)
        made = dispatcher(replicas, max_batch=1)
        tasks = [asyncio.ensure_future(made.draw(A if seed % 2 else B, requests(seed))) for seed in range(6)]
        await asyncio.gather(*tasks)
        assert replicas.most == 2 and [seeds for _, seeds in replicas.batches] == [[seed] for seed in range(6)]

    asyncio.run(run())


def test_a_request_for_more_images_than_a_batch_is_spread():
    async def run():
        replicas = Replicas(alive=2)
        drawn = await dispatcher(replicas, max_batch=2).draw(A, requests(1, 2, 3))
        assert [one.image for one in drawn] == ["1 1", "1 2", "1 3"]
        assert [seeds for _, seeds in replicas.batches] == [[1, 2], [3]]

    asyncio.run(run())


def test_a_batch_whose_replica_died_is_drawn_again_before_what_came_later():
    async def run():
        replicas = Replicas(deaths=1)
        made = dispatcher(replicas, max_batch=2, wait=0.01)
        tasks = [asyncio.ensure_future(made.draw(A, requests(seed))) for seed in (1, 2, 3)]
        drawn = await asyncio.gather(*tasks)
        assert [one.image for (one,) in drawn] == ["1 1", "1 2", "1 3"]
        assert [seeds for _, seeds in replicas.batches] == [[1, 2], [1, 2], [3]]

    asyncio.run(run())


def test_an_image_that_kills_every_replica_is_given_up_and_the_others_are_not():
    async def run():
        replicas = Replicas()
        send = replicas.send

        async def deadly(key, chosen, show):
            drawn = await send(key, chosen, show)
            if any(request.seed == 13 for request in chosen):
                raise ReplicaLost("killed")
            return drawn

        replicas.send = deadly
        made = dispatcher(replicas, max_batch=4, wait=0.01)
        drawn = await asyncio.gather(*(made.draw(A, requests(seed)) for seed in (12, 13, 14)))
        assert [one.image for (one,) in drawn] == ["1 12", None, "1 14"]
        assert f"{TRIES} replicas died" in drawn[1][0].problem and drawn[1][0].kind == "failed"

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_not_drawn():
    async def run():
        replicas = Replicas(seconds=0.1)
        made = dispatcher(replicas, max_batch=1)
        first, second, third = (asyncio.ensure_future(made.draw(A, requests(seed))) for seed in (1, 2, 3))
        await asyncio.sleep(0.02)
        second.cancel()
        await asyncio.gather(first, third)
        assert [seeds for _, seeds in replicas.batches] == [[1], [3]]

    asyncio.run(run())


def test_a_batch_is_stopped_when_its_last_image_is_given_up_and_not_before():
    async def run():
        replicas = Replicas(seconds=0.2)
        made = dispatcher(replicas, max_batch=2, wait=0.01)
        first, second = (asyncio.ensure_future(made.draw(A, requests(seed))) for seed in (1, 2))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.02)
        assert replicas.at_once == 1
        second.cancel()
        await asyncio.sleep(0.02)
        assert replicas.stopped == [[1, 2]] and made.flying == made.waiting == 0
        assert (await made.draw(A, requests(3)))[0].image == "1 3"

    asyncio.run(run())


def test_an_error_of_a_batch_reaches_all_who_wait_for_it_and_nobody_else():
    async def run():
        async def failing(key, chosen, show):
            if key == B:
                raise ValueError("no such thing")
            return [ImageResult(image="x") for _ in chosen]

        replicas = Replicas()
        replicas.send = failing
        made = dispatcher(replicas)
        good, bad = await asyncio.gather(
            made.draw(A, requests(1)), made.draw(B, requests(2, 3)), return_exceptions=True
        )
        assert good[0].image == "x" and isinstance(bad, ValueError)

    asyncio.run(run())
