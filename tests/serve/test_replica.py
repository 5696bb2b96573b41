"""A replica without Ray: one batch at a time, stopped when it is given up, found out when it hangs."""

import asyncio
import threading

import pytest
from surgery.export.serve import cluster as start_failure
from surgery.export.serve import pipeline as module
from surgery.export.serve.pipeline import Stopped
from surgery.export.serve.request import Setting
from surgery.export.serve.settings import Order

from surgery.errors import ArtifactError

ORDER = Order("a/model", None, None, Setting(), 1)


class Pipeline:
    """Draws until it is stopped, or let go."""

    def __init__(self, order):
        self.at_once, self.most, self.begun, self.let_go = 0, 0, threading.Semaphore(0), threading.Event()

    def draw(self, setting, pictures, stopped):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.begun.release()
        try:
            while not self.let_go.wait(0.005):
                if stopped.is_set() and setting is not None:
                    raise Stopped
            return pictures
        finally:
            self.at_once -= 1


@pytest.fixture
def replica(monkeypatch):
    monkeypatch.setattr(module, "ServedPipeline", Pipeline)
    return module.Replica(ORDER)


async def begun(replica):
    await asyncio.to_thread(replica._pipeline.begun.acquire)


def test_one_batch_is_drawn_at_a_time_and_the_loop_goes_on_meanwhile(replica):
    async def run():
        tasks = [asyncio.ensure_future(replica.draw(Setting(), [seed])) for seed in range(3)]
        await begun(replica)
        replica.check_health()
        replica._pipeline.let_go.set()
        assert await asyncio.gather(*tasks) == [[0], [1], [2]] and replica._pipeline.most == 1

    asyncio.run(run())


def test_a_batch_that_is_given_up_stops_before_the_next_one_begins(replica):
    async def run():
        first = asyncio.ensure_future(replica.draw(Setting(), [1]))
        await begun(replica)
        second = asyncio.ensure_future(replica.draw(Setting(), [2]))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await begun(replica)
        replica._pipeline.let_go.set()
        assert await second == [2] and replica._pipeline.most == 1
        replica.check_health()

    asyncio.run(run())


def test_a_replica_that_hangs_is_found_out(replica, monkeypatch):
    async def run():
        hanging = asyncio.ensure_future(replica.draw(None, [1]))  # this pipeline does not stop for that
        await begun(replica)
        hanging.cancel()
        await asyncio.sleep(0.02)
        replica.check_health()
        monkeypatch.setattr(module, "_STUCK", 0.01)
        with pytest.raises(RuntimeError, match="has not stopped"):
            replica.check_health()
        replica._pipeline.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        replica.check_health()

    asyncio.run(run())


def test_what_keeps_it_from_starting_can_be_read_from_the_error(monkeypatch):
    def fails(order):
        raise ArtifactError("it was altered")

    monkeypatch.setattr(module, "ServedPipeline", fails)
    with pytest.raises(start_failure.StartFailure) as caught:
        module.Replica(ORDER)
    told = start_failure.read(str(caught.value))
    assert type(told) is ArtifactError and str(told) == "it was altered"
