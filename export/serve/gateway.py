"""The gateway of a model: accepts requests or refuses them, has them drawn; it knows no HTTP and no Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from surgery.recipe.schema import USUAL_STEPS

from .batching import Dispatcher
from .metrics import Metrics
from .refusal import Refusal
from .request import BatchKey, ImageResult, Job
from .tracing import Spans
from .waiting import Line, retry_headers

if TYPE_CHECKING:
    from .checking import Limits, ServedModel

_STATUS = {"memory": (507, "out_of_memory"), "refused": (400, "invalid_value"), "failed": (500, "generation_failed")}
_WATCH = 1.0  # seconds between two looks at how many replicas are up

Gone = Callable[[], Awaitable[None]]


class Gateway:
    """Everything between an HTTP request and the replicas; it lives in one event loop, which `start` is called in.

    send(key, requests, show): as the Dispatcher's. count(): how many replicas are up, or None where that cannot be told
    now, a coroutine. replicas: how many there are meant to be. pace(): seconds that an image takes a step, a coroutine.
    """

    def __init__(
        self,
        served: "ServedModel",
        limits: "Limits",
        replicas: int,
        send: Callable,
        count: Callable,
        pace: Callable | None = None,
        metrics: Metrics | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.served, self.limits = served, limits
        self._count, self.meant, self._pace = count, replicas, pace
        self.alive, self.most, self.draining = 0, 0, False
        self.open_requests, self._open_steps = 0, 0.0  # accepted and not finished
        self.held = 0  # requests that are read for it
        self.line = Line(limits.batch)
        self.metrics = metrics or Metrics(limits.batch)
        self._send = send
        self.dispatcher = Dispatcher(
            self._timed_send, lambda: self.alive, limits.batch, limits.batch_wait, self.metrics, spans
        )
        self._watcher = None

    async def start(self) -> None:
        """Begin to watch the replicas; nothing is drawn before."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        """Watch the replicas no more."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def draw(
        self, job: Job, gone: Gone, show: Callable[[int, int, ImageResult], object] | None = None
    ) -> list[ImageResult]:
        """The results of a job, each with a file; raises Refusal. gone(): a coroutine that ends if the client does.

        A job that is accepted here ends in an answer, whatever happens to replicas: in 504 at the latest.
        """
        if self.draining:
            text = "the server is shutting down; send this to another, or again later"
            raise Refusal(503, text, "shutting_down", headers={"Connection": "close", "Retry-After": "10"})
        if self.open_requests >= self.limits.queue:
            text = f"the queue is full ({self.limits.queue} requests); try again later"
            raise Refusal(429, text, "queue_full", headers=retry_headers(self._wait_for_room()))
        steps = self._steps(job.key) * len(job.requests)
        self.open_requests += 1
        self._open_steps += steps
        begun = time.monotonic()
        try:
            drawing = self.dispatcher.draw(job.key, job.requests, show)
            drawn = await self._unless_gone(drawing, gone())
        except TimeoutError:
            text = f"it was not done in {self.limits.timeout:g} s, and was given up"
            raise Refusal(504, text, "timeout", headers=retry_headers(self._wait_for_room())) from None
        finally:
            self.open_requests -= 1
            self._open_steps -= steps
        self.metrics.latency.observe(time.monotonic() - begun)
        for result in drawn:
            if result.problem is not None:
                status, code = _STATUS[result.kind or "failed"]
                text = result.problem
                if result.kind == "memory":
                    text = f"one such image does not fit in the replica's memory ({text}); ask for a smaller size"
                raise Refusal(status, text, code)
        self.metrics.images.inc(len(drawn))
        return drawn

    async def stream(self, job: Job, gone: Gone) -> AsyncIterator[tuple[int, int, ImageResult] | list[ImageResult]]:
        """(which image, the preview's number, the preview) of those that are wanted, and at last as `draw`."""
        shown = asyncio.Queue()
        drawing = asyncio.ensure_future(self.draw(job, gone, lambda *preview: shown.put_nowait(preview)))
        drawing.add_done_callback(lambda _: shown.put_nowait(None))
        try:
            while (preview := await shown.get()) is not None:
                yield preview
            yield await drawing
        finally:
            drawing.cancel()

    async def _unless_gone(self, drawing, gone):
        """What `drawing` returns; a Refusal nobody reads if the client leaves before, TimeoutError if it takes long."""
        drawing, gone = asyncio.ensure_future(drawing), asyncio.ensure_future(gone)
        try:
            await asyncio.wait((drawing, gone), timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if drawing.done():
                return drawing.result()
            raise Refusal(499, "the client closed the connection", "client_gone") if gone.done() else TimeoutError
        finally:
            drawing.cancel()
            gone.cancel()

    def status(self) -> str:
        """ "ok" while at least one replica is up and requests are accepted, else "draining", "starting" or "down"."""
        if self.draining:
            return "draining"
        return "ok" if self.alive else "down" if self.most else "starting"

    async def drain(self, seconds: float) -> int:
        """Accept no more requests and wait for those that are accepted; returns how many were not done in time."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.open_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.open_requests

    async def _timed_send(self, key, requests, show):
        begun = time.monotonic()
        drawn = await self._send(key, requests, show)
        self.line.batch(time.monotonic() - begun, self._steps(key) * len(requests))
        return drawn

    def _steps(self, key: BatchKey) -> float:
        """Of an image; one of twice the pixels of the model's own counts double."""
        steps = len(key.timesteps or ()) or key.steps or USUAL_STEPS
        own = (self.served.width or 0) * (self.served.height or 0)
        return steps * ((key.width or 0) * (key.height or 0) / own if own and key.width else 1.0)

    def _wait_for_room(self):
        """Seconds until there is likely to be room for one more, after those who were told before."""
        return self.line.seconds(self._open_steps / max(1, self.open_requests), self.alive)

    async def _watch(self):
        asked: Any = None
        while True:
            alive = await self._count()
            alive = self.alive if alive is None else alive
            if self.most >= self.meant and alive > self.alive:
                self.metrics.restarts.inc(alive - self.alive)
            self.alive, self.most = alive, max(self.most, alive)
            self.dispatcher.pump()
            if alive and asked is None and self._pace is not None:
                asked = asyncio.ensure_future(self._ask_pace(self._pace))
            await asyncio.sleep(_WATCH if self.most >= self.meant else _WATCH / 4)

    async def _ask_pace(self, pace):
        self.line.start(await pace())
