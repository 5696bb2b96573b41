"""Dynamic batching: images that wait, grouped by equal settings, given out in batches while replicas are idle.

An image goes out as soon as a replica is idle and its batch is full, or it has waited `wait` seconds; among the groups
that are ready the one with the oldest image is first, so no key starves another. A batch whose replica died goes
back to the front of the queue; an image that has seen two deaths is tried alone, since it may be what kills.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from surgery.runtime.worker import ImageRequest

from .request import BatchKey, ImageResult
from .tracing import Spans

TRIES = 3  # of an image whose replica dies
_PAUSE = 0.2  # seconds before the next try, doubled each time


class ReplicaLost(Exception):
    """The replica that had a batch died, or cannot be reached."""


@dataclass(eq=False)
class _Waiting:
    key: BatchKey
    request: ImageRequest
    since: float  # when it was first queued
    show: Callable[[int, ImageResult], object] | None = None
    done: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    deaths: int = 0
    queued: Any = None  # what Spans.now was

    def group(self):
        """What must be equal for images to share a batch; one that saw two deaths shares with none."""
        return (self.key, id(self) if self.deaths >= TRIES - 1 else None)


class Dispatcher:
    """Holds the images that wait, and the batches that are being drawn.

    send(key, requests, show): a coroutine that has a batch drawn and returns its ImageResults, or raises ReplicaLost;
    it is cancelled when nobody waits for any of its images any more. show(at, number, result): for the previews.
    replicas(): how many can draw now. observe: told of batches and deaths; see `metrics.py`.
    """

    def __init__(
        self,
        send: Callable[[BatchKey, Sequence[ImageRequest], Callable], Awaitable[list[ImageResult]]],
        replicas: Callable[[], int],
        max_batch: int,
        wait: float,
        observe: Any,
        spans: Spans | None = None,
    ) -> None:
        self._send, self._replicas, self._observe = send, replicas, observe
        self._spans = spans or Spans()
        self._max_batch, self._wait = max_batch, wait
        self._groups = OrderedDict()  # group -> deque of _Waiting, oldest first
        self._flying = set()  # tasks, one per batch that is with a replica
        self._timer = None

    @property
    def waiting(self) -> int:
        """How many images wait for a replica."""
        return sum(map(len, self._groups.values()))

    @property
    def flying(self) -> int:
        """How many batches are with replicas."""
        return len(self._flying)

    async def draw(
        self,
        key: BatchKey,
        requests: Sequence[ImageRequest],
        show: Callable[[int, int, ImageResult], object] | None = None,
    ) -> list[ImageResult]:
        """The results of some requests, in order. Cancelled, it takes those that still wait out of the queue.

        show: called with (which of them, the preview's number, the preview).
        """
        now = asyncio.get_running_loop().time()
        images = [
            _Waiting(key, request, now, None if show is None else partial(show, at), queued=self._spans.now())
            for at, request in enumerate(requests)
        ]
        for image in images:
            self._groups.setdefault(image.group(), deque()).append(image)
        self.pump()
        try:
            results = await asyncio.gather(*(image.done for image in images), return_exceptions=True)
        finally:
            for image in images:
                image.done.cancel()
                self._drop(image)
        drawn = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            drawn.append(result)
        return drawn

    def pump(self) -> None:
        """Give out what is ready to the replicas that are idle; to be called when there may be more of either."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self._groups and self.flying < self._replicas():
            ripe = {group: images[0].since + self._wait for group, images in self._groups.items()}
            ready = [group for group in self._groups if self._is_ready(group, ripe[group] <= loop.time())]
            if not ready:
                self._timer = loop.call_at(min(ripe.values()), self.pump)
                return
            group = min(ready, key=lambda group: ripe[group])
            images = self._groups[group]
            batch = [images.popleft() for _ in range(min(self._max_batch, len(images)))]
            if not images:
                del self._groups[group]
            task = loop.create_task(self._fly(batch))
            self._flying.add(task)
            for image in batch:
                image.done.add_done_callback(lambda _, batch=batch, task=task: self._let_go(batch, task))

    def _is_ready(self, group, is_ripe):
        """Whether a group goes out now: it is full, has waited long enough, or is one image that is tried alone."""
        _, alone = group
        return is_ripe or len(self._groups[group]) >= self._max_batch or alone is not None

    async def _fly(self, batch):
        try:
            self._observe.batch(len(batch))

            def show(at: int, number: int, result: ImageResult) -> None:
                if (wanted := batch[at].show) is not None and not batch[at].done.done():
                    wanted(number, result)

            key = batch[0].key
            with self._spans.batch(key, [image.queued for image in batch]):
                drawn = await self._send(key, [image.request for image in batch], show)
            for image, result in zip(batch, drawn, strict=True):
                if not image.done.done():
                    image.done.set_result(result)
        except ReplicaLost:
            self._observe.lost(len(batch))
            await asyncio.sleep(_PAUSE * 2 ** batch[0].deaths)
            self._again(batch)
        except Exception as error:
            for image in batch:
                if not image.done.done():
                    image.done.set_exception(error)
        finally:
            self._flying.discard(asyncio.current_task())
            self.pump()

    def _again(self, batch):
        for image in reversed([image for image in batch if not image.done.done()]):
            image.deaths += 1
            if image.deaths >= TRIES:
                text = f"{TRIES} replicas died while they drew this image"
                image.done.set_result(ImageResult(problem=text, kind="failed"))
            else:
                self._groups.setdefault(image.group(), deque()).appendleft(image)

    def _let_go(self, batch, task):
        if not task.done() and all(image.done.cancelled() for image in batch):
            task.cancel()

    def _drop(self, image):
        images = self._groups.get(image.group())
        if images and image in images:
            images.remove(image)
            if not images:
                del self._groups[image.group()]
