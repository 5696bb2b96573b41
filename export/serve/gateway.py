"""The gateway of a server: accepts requests or refuses them, has them drawn, answers; it knows no HTTP and no Ray."""

import asyncio
import base64
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from surgery.recipe.guidance_scale import is_range, scale_of
from surgery.runtime.video import MEDIA_TYPES

from .batching import Dispatcher
from .request import Refusal, read_request

if TYPE_CHECKING:
    from .checking import Limits, ServedModel

PREFIX = "surgery"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The counters of one gateway, in a registry of their own."""

    def __init__(self, max_batch: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        common = {"namespace": PREFIX, "registry": self._registry}
        self.requests = Counter(
            "requests", "Requests for images, and all that were refused, by HTTP status", ["status"], **common
        )
        self.images = Counter("images", "Images and videos that were delivered", **common)
        self.latency = Histogram(
            "request_seconds",
            "From accepting a request to its images",
            buckets=_SECONDS,
            **common,
        )
        sizes = sorted({1, 2, 4, 8, 16, 32, max_batch})
        self.batches = Histogram(
            "batch_images", "Images in a batch", buckets=[size for size in sizes if size <= max_batch], **common
        )
        self.deaths = Counter("replica_deaths", "Batches whose replica died or could not be reached", **common)
        self.retried = Counter("retried_images", "Images that were queued again after that", **common)
        self.restarts = Counter("replica_restarts", "Replicas that came up again after all were up", **common)
        self.replicas = Gauge("replicas", "Replicas that are up", **common)
        self.in_flight = Gauge("requests_in_flight", "Requests that are accepted and not finished", **common)
        self.waiting = Gauge("queued_images", "Images that wait for a replica", **common)
        self.drawing = Gauge("batches_in_flight", "Batches that replicas are drawing", **common)

    def batch(self, size: int) -> None:
        """A batch was given to a replica."""
        self.batches.observe(size)

    def lost(self, size: int) -> None:
        """A batch's replica was lost."""
        self.deaths.inc()
        self.retried.inc(size)

    def text(self) -> tuple[bytes, str]:
        """(the content of /metrics as bytes, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


_STATUS = {"memory": (507, "out_of_memory"), "refused": (400, "invalid_value"), "failed": (500, "generation_failed")}
_WATCH = 1.0  # seconds between two looks at how many replicas are up


class Gateway:
    """Everything between an HTTP request and the replicas; it lives in one event loop, which `start` is called in.

    send(key, requests): as the Dispatcher's. count(): how many replicas are up, or None where that cannot be told
    now, a coroutine. replicas: how many there are meant to be.
    """

    def __init__(self, served: "ServedModel", limits: "Limits", replicas: int, send: Callable, count: Callable) -> None:
        self.served, self.limits = served, limits
        self._count, self._meant = count, replicas
        self._alive, self._most, self._draining = 0, 0, False
        self.open_requests = 0  # accepted and not finished
        self._per_image = 1.0  # seconds that a replica takes for an image, lately
        self._metrics = Metrics(limits.batch)
        self._send = send
        self._dispatcher = Dispatcher(
            self._timed_send, lambda: self._alive, limits.batch, limits.batch_wait, self._metrics
        )
        self._watcher = None

    async def start(self) -> None:
        """Begin to watch the replicas; nothing is drawn before."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def images(self, body: bytes, gone: Callable[[], Awaitable[None]]) -> dict[str, Any]:
        """The answer to a POST of images, as a dict; raises Refusal. gone(): a coroutine that ends if the client does.

        A request that is accepted here ends in an answer, whatever happens to replicas: in 504 at the latest.
        """
        self._refuse_other(is_video=False)
        return self._answer(*await self._counted(body, gone))

    async def video(self, body: bytes, gone: Callable[[], Awaitable[None]]) -> tuple[bytes, str, dict[str, str]]:
        """(the file, its media type, HTTP headers with what else is to say) for a POST of a video; else as `images`."""
        self._refuse_other(is_video=True)
        key, (request,), (result,) = await self._counted(body, gone)
        told = {"Seed": request.seed, "Size": result.size, "Frames": result.frames, "Fps": f"{result.fps:g}"}
        told |= {"Steps": len(key.timesteps or ()) or key.steps, "Artifact-Hash": self.served.artifact_hash}
        headers = {f"X-Surgery-{name}": str(value) for name, value in told.items() if value is not None}
        content = await asyncio.to_thread(base64.b64decode, result.image)
        return content, MEDIA_TYPES[request.format], headers

    def _refuse_other(self, is_video):
        """Refuse images of a model of videos, and the other way round."""
        if is_video != self.served.is_video:
            kind = "videos" if self.served.is_video else "images"
            text = f"{self.served.name} draws {kind}: POST /v1/{kind}/generations"
            raise Refusal(404, text, "model_not_found", "model")

    async def _counted(self, body, gone):
        try:
            drawn = await self._drawn(body, gone)
        except asyncio.CancelledError:
            self.refused(499)  # as nginx counts clients that left
            raise
        self._metrics.requests.labels("200").inc()
        return drawn

    def refused(self, status: int) -> None:
        """Count a request that had another answer than images."""
        self._metrics.requests.labels(str(status)).inc()

    async def _drawn(self, body, gone):
        """(the BatchKey, the ImageRequests, their ImageResults) of a request, all of which have a file."""
        if self._draining:
            text = "the server is shutting down; send this to another, or again later"
            raise Refusal(503, text, "shutting_down", headers={"Connection": "close", "Retry-After": "10"})
        key, requests = read_request(body, self.served, self.limits)
        if self.open_requests >= self.limits.queue:
            text = f"the queue is full ({self.limits.queue} requests); try again later"
            raise Refusal(429, text, "queue_full", headers={"Retry-After": str(self._wait_for_room())})
        self.open_requests += 1
        begun = time.monotonic()
        try:
            drawn = await self._unless_gone(self._dispatcher.draw(key, requests), gone())
        except TimeoutError:
            text = f"it was not done in {self.limits.timeout:g} s, and was given up"
            raise Refusal(504, text, "timeout", headers={"Retry-After": str(self._wait_for_room())}) from None
        finally:
            self.open_requests -= 1
        self._metrics.latency.observe(time.monotonic() - begun)
        for result in drawn:
            if result.problem is not None:
                status, code = _STATUS[result.kind]
                text = result.problem
                if result.kind == "memory":
                    text = f"one such image does not fit in the replica's memory ({text}); ask for a smaller size"
                raise Refusal(status, text, code)
        self._metrics.images.inc(len(drawn))
        return key, requests, drawn

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

    def _answer(self, key, requests, drawn):
        sampling = key.sampling()
        data = [
            {"b64_json": result.image, "seed": request.seed}
            | ({"guidance_scale": scale_of(sampling, request.seed)} if is_range(sampling) else {})
            | ({"flagged": True} if result.flagged else {})
            for request, result in zip(requests, drawn, strict=True)
        ]
        return {
            "created": int(time.time()),
            "data": data,
            "model": self.served.name,
            "artifact_hash": self.served.artifact_hash,
            "size": drawn[0].size,
            "output_format": requests[0].format,
            "steps": len(key.timesteps or ()) or key.steps,
            "guidance_scale": sampling.get("guidance_scale"),
            "pladis": dict(key.hyperparameters),
        }

    def models(self) -> dict[str, Any]:
        """GET /v1/models: the one model, in OpenAI's form, with what a request may set of its operator."""
        fixed = self.served.scheduled()
        free = {name: value for name, value in self.served.hyperparameters().items() if name not in fixed}
        entry = {"id": self.served.name, "object": "model", "created": 0, "owned_by": "pladis-surgery"}
        return {
            "object": "list",
            "data": [{**entry, "artifact_hash": self.served.artifact_hash, "pladis": free}],
        }

    def health(self) -> tuple[int, dict[str, Any]]:
        """(HTTP status, body): 200 while at least one replica is up and requests are accepted, else 503."""
        status = "draining" if self._draining else "ok" if self._alive else "starting" if not self._most else "down"
        body = {"status": status, "replicas": self._alive, "of": self._meant}
        return (200 if status == "ok" else 503), body

    def metrics(self) -> tuple[bytes, str]:
        """(the content of /metrics as bytes, its content type)."""
        self._metrics.replicas.set(self._alive)
        self._metrics.in_flight.set(self.open_requests)
        self._metrics.waiting.set(self._dispatcher.waiting)
        self._metrics.drawing.set(self._dispatcher.flying)
        return self._metrics.text()

    async def drain(self, seconds: float) -> int:
        """Accept no more requests and wait for those that are accepted; returns how many were not done in time."""
        self._draining = True
        deadline = time.monotonic() + seconds
        while self.open_requests and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self.open_requests

    async def _timed_send(self, key, requests):
        begun = time.monotonic()
        drawn = await self._send(key, requests)
        self._per_image += 0.2 * ((time.monotonic() - begun) / len(requests) - self._per_image)
        return drawn

    def _wait_for_room(self):
        """Whole seconds until half of what waits now is likely to be drawn."""
        return max(1, math.ceil(self._dispatcher.waiting / 2 * self._per_image / max(1, self._alive)))

    async def _watch(self):
        while True:
            alive = await self._count()
            alive = self._alive if alive is None else alive
            if self._most >= self._meant and alive > self._alive:
                self._metrics.restarts.inc(alive - self._alive)
            self._alive, self._most = alive, max(self._most, alive)
            self._dispatcher.pump()
            await asyncio.sleep(_WATCH if self._most >= self._meant else _WATCH / 4)
