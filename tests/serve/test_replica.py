"""A replica without Ray: one batch at a time, stopped when it is given up, found out when it hangs."""

import asyncio
import threading

import pytest

from surgery.errors import ArtifactError
from surgery.export.serve import replica as module
from surgery.export.serve.checking import Limits
from surgery.export.serve.replica import Replica, StartFailure, Stopped, read_start_failure
from surgery.export.serve.request import BatchKey
from surgery.runtime.worker import WorkerConfig

CONFIG = WorkerConfig("a/model", None, None)
DESCRIBED = (None, Limits(max_batch=1), 1)


class Runner:
    """Draws until it is stopped, or let go."""

    def __init__(self, config, warm, max_batch):
        type(self).made = self
        self.at_once, self.most, self.begun, self.let_go = 0, 0, threading.Semaphore(0), threading.Event()

    def draw(self, key, requests, stopped, show):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.begun.release()
        try:
            while not self.let_go.wait(0.005):
                if stopped.is_set() and key is not None:
                    raise Stopped
            return requests
        finally:
            self.at_once -= 1


@pytest.fixture
def replica():
    return Replica(CONFIG, BatchKey(), DESCRIBED, Runner)


async def begun():
    await asyncio.to_thread(Runner.made.begun.acquire)


def test_one_batch_is_drawn_at_a_time_and_the_loop_goes_on_meanwhile(replica):
    async def run():
        tasks = [asyncio.ensure_future(replica.draw(BatchKey(), [seed])) for seed in range(3)]
        await begun()
        replica.check_health()
        Runner.made.let_go.set()
        assert await asyncio.gather(*tasks) == [[0], [1], [2]] and Runner.made.most == 1

    asyncio.run(run())


def test_a_batch_that_is_given_up_stops_before_the_next_one_begins(replica):
    async def run():
        first = asyncio.ensure_future(replica.draw(BatchKey(), [1]))
        await begun()
        second = asyncio.ensure_future(replica.draw(BatchKey(), [2]))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await begun()
        Runner.made.let_go.set()
        assert await second == [2] and Runner.made.most == 1
        replica.check_health()

    asyncio.run(run())


def test_a_replica_that_hangs_is_found_out(replica, monkeypatch):
    async def run():
        hanging = asyncio.ensure_future(replica.draw(None, [1]))  # this runner does not stop for that
        await begun()
        hanging.cancel()
        await asyncio.sleep(0.02)
        replica.check_health()
        monkeypatch.setattr(module, "_STUCK", 0.01)
        with pytest.raises(RuntimeError, match="has not stopped"):
            replica.check_health()
        Runner.made.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        replica.check_health()

    asyncio.run(run())


def test_what_keeps_it_from_starting_can_be_read_from_the_error():
    def fails(config, warm, max_batch):
        raise ArtifactError("it was altered")

    with pytest.raises(StartFailure) as caught:
        Replica(CONFIG, BatchKey(), DESCRIBED, fails)
    told = read_start_failure(str(caught.value))
    assert type(told) is ArtifactError and str(told) == "it was altered"
