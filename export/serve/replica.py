"""A replica: batches in, image files out; what one image does wrong is not another one's loss."""

import asyncio
import base64
import gc
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from surgery import errors
from surgery.errors import InputError, SurgeryError
from surgery.models.videos import draws_videos
from surgery.runtime.video import Video, video_file
from surgery.runtime.worker import ImageRequest, Worker, WorkerConfig

from .request import BatchKey, ImageResult
from .tokens import Reading
from .tracing import Spans, Tracing

Show = Callable[[int, int, ImageResult], object]

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class Stopped(Exception):
    """Nobody waits for the images any more."""


class BatchRunner:
    """A Worker that draws one batch at a time. Making it loads the model and warms it up.

    warm: what is drawn then, one image and then `max_batch` of them, so that what has to be built or compiled is, and
    what does not fit is known. Raises what `surgery.runtime.load.open_model` does, ArtifactError where the model is not
    the artifact of the config, and SurgeryError where not even one image can be drawn.
    """

    def __init__(self, config: WorkerConfig, warm: BatchKey, max_batch: int) -> None:
        from surgery.console import quiet_notices

        quiet_notices()  # at their usual level the libraries log the part of a prompt that they cut off
        self._worker = Worker(config)
        self.pace = 0.0  # seconds that an image took a step, at the end of the warm-up
        self._fitting = {}  # (width, height, frames) -> how many at once, where more did not fit
        form = "webp" if draws_videos(type(self._worker.pipeline)) else "png"
        for count in sorted({1, max_batch}):
            requests = [ImageRequest("a warm-up", seed, format=form) for seed in range(count)]
            begun = time.monotonic()
            for result in self.draw(warm, requests, threading.Event()):
                if result.problem is not None:
                    raise SurgeryError(f"the replica cannot draw an image: {result.problem}")
            self.pace = (time.monotonic() - begun) / count / (warm.steps or 1)

    def draw(
        self,
        key: BatchKey,
        requests: Sequence[ImageRequest],
        stopped: threading.Event,
        show: Show | None = None,
    ) -> list[ImageResult]:
        """The results of requests, in order; at most as many at once as are known to fit in memory.

        stopped: once it is set the next denoising step raises Stopped. show: called, in this thread, with the previews
        that requests want.
        """
        size = min(len(requests), self._fitting.get(_extent(key), len(requests)))
        starts = range(0, len(requests), size)
        return [
            result
            for start in starts
            for result in self._together(key, requests[start : start + size], stopped, show, start)
        ]

    def _together(self, key, requests, stopped, show, start):
        """The results of one batch; one that fails is drawn again in halves, so that each image answers for itself."""

        def on_step():
            if stopped.is_set():
                raise Stopped

        def on_preview(at, number, image):
            shown = _encoded(image, requests[at])
            assert show is not None
            show(start + at, number, shown)

        try:
            previews = None if show is None else on_preview
            sampling, tuned = key.sampling(), dict(key.hyperparameters)
            images = self._worker.draw(requests, sampling, tuned, on_step, previews, key.loras)
            files = [_encoded(image, request) for image, request in zip(images, requests, strict=True)]
            reading = Reading(self._worker.pipeline, sampling)
            return [
                replace(file, **reading.of(request, image))
                for file, request, image in zip(files, requests, images, strict=True)
            ]
        except Stopped:
            raise
        except Exception as error:
            # Nothing of the error is kept but its words: its traceback holds the tensors of what did not fit.
            kind, problem = _kind(error), str(error).partition("\n")[0]
            if kind != "refused":  # which is in words for whoever asked
                problem = f"{type(error).__name__}: {problem}"
            if _is_broken(error):
                print(f"surgery serve: the accelerator is lost to this replica: {problem}", file=sys.stderr, flush=True)
                os._exit(1)  # every later call would fail too; the batch is given to another replica
        if kind == "memory":
            _make_room()
            self._fitting[_extent(key)] = max(1, len(requests) // 2)
        if len(requests) > 1:  # an engine may take one image where it refuses several, of texts of unequal length
            half = len(requests) // 2
            return [
                result
                for part, at in ((requests[:half], start), (requests[half:], start + half))
                for result in self._together(key, part, stopped, show, at)
            ]
        print(f"surgery serve: {len(requests)} images were not drawn: {kind}", file=sys.stderr, flush=True)
        return [ImageResult(problem=problem, kind=kind) for _ in requests]


def _extent(key):
    return key.width, key.height, key.num_frames


def _make_room():
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _encoded(drawn, request):
    if isinstance(drawn, Video):
        text = base64.b64encode(video_file(drawn, request.format)).decode("ascii")
        width, height = drawn.size
        return ImageResult(text, f"{width}x{height}", frames=len(drawn.frames), fps=drawn.fps)
    file = io.BytesIO()
    lossy = {} if request.format == "png" else {"quality": _first(request.compression, 95)}
    drawn.convert("RGB").save(file, format=request.format.upper(), **lossy)
    text = base64.b64encode(file.getvalue()).decode("ascii")
    return ImageResult(text, f"{drawn.width}x{drawn.height}", bool(drawn.info.get("flagged")))


def _first(value, other):
    return other if value is None else value


def _kind(error):
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "memory"
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
        return "memory"
    return "refused" if isinstance(error, InputError) else "failed"


def _is_broken(error):
    import torch

    return isinstance(error, torch.AcceleratorError) and _kind(error) != "memory"


_MARK = "surgery-start-failure "
_LINE = re.compile(rf"{_MARK}(\{{.*\}})\s*$", re.MULTILINE)


class StartFailure(RuntimeError):
    """An error, written in one line that `read_start_failure` finds again."""

    @classmethod
    def of(cls, error: Exception, model: str) -> "StartFailure":
        """The StartFailure for whatever kept a replica from loading a model."""
        if not isinstance(error, SurgeryError):
            error = SurgeryError(f"{model} cannot be loaded: {type(error).__name__}: {str(error).strip()}")
        return cls(_MARK + json.dumps({"kind": type(error).__name__, "message": str(error)}))


def read_start_failure(text: str) -> SurgeryError | None:
    """The SurgeryError that a text with a StartFailure in it tells of, or None."""
    found = _LINE.search(text)
    if found is None:
        return None
    told = json.loads(found.group(1))
    kind = getattr(errors, told["kind"], SurgeryError)
    kind = InputError if kind is errors.RecipeError else kind  # which is made of problems, not of a text
    return kind(told["message"])


_STUCK = 300.0  # seconds after which a step that was to be the last one counts as hung; compiling one takes minutes


class Replica:
    """What Ray Serve makes. What it cannot load for it tells in a form that `serving.py` finds in Serve's status.

    described: (ServedModel, Limits, number of replicas) of what it draws.
    """

    def __init__(
        self,
        config: WorkerConfig,
        warm: BatchKey,
        described: tuple,
        make_runner: type[BatchRunner] = BatchRunner,
        tracing: Tracing | None = None,
    ) -> None:
        self._described, self._spans = described, tracing.spans() if tracing else Spans()
        _, limits, _ = described
        try:
            self._runner = make_runner(config, warm, limits.batch)
        except Exception as error:  # whatever it is, trying again would not load the model
            raise StartFailure.of(error, config.model) from error
        self._drawing = asyncio.Lock()
        self._stopping_since = None

    async def draw(
        self, key: BatchKey, requests: Sequence[ImageRequest], carrier: Mapping[str, str] | None = None
    ) -> list[ImageResult]:
        """The results of a batch, whose span is the carrier's. Cancelled, it stops at the next denoising step."""
        return await self._draw(key, requests, None, carrier)

    async def draw_showing(
        self, key: BatchKey, requests: Sequence[ImageRequest], carrier: Mapping[str, str] | None = None
    ) -> AsyncIterator[tuple[int, int, ImageResult] | list[ImageResult]]:
        """(which request, the preview's number, the preview) of those that are wanted, and at last as `draw`."""
        loop, shown = asyncio.get_running_loop(), asyncio.Queue()

        def show(*preview):
            loop.call_soon_threadsafe(shown.put_nowait, preview)

        drawing = asyncio.ensure_future(self._draw(key, requests, show, carrier))
        drawing.add_done_callback(lambda _: shown.put_nowait(None))
        try:
            while (preview := await shown.get()) is not None:
                yield preview
            yield await drawing
        finally:
            if not drawing.done():
                drawing.cancel()
                await asyncio.wait((drawing,))

    async def describe(self) -> tuple:
        """(ServedModel, Limits, number of replicas) of what it draws."""
        return self._described

    async def pace(self) -> float:
        """Seconds that an image took a step, when it was warmed up."""
        return self._runner.pace

    async def _draw(self, key, requests, show, carrier):
        stopped = threading.Event()
        async with self._drawing:
            with self._spans.draw(carrier, key, len(requests)):
                return await self._drawn(key, requests, show, stopped)

    async def _drawn(self, key, requests, show, stopped):
        drawing = asyncio.ensure_future(asyncio.to_thread(self._runner.draw, key, requests, stopped, show))
        try:
            return await asyncio.shield(drawing)
        except asyncio.CancelledError:
            stopped.set()
            self._stopping_since = time.monotonic()
            await asyncio.wait((drawing,))
            self._stopping_since = None
            error = drawing.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error from None
            raise

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica where this raises: RuntimeError if it does not stop drawing."""
        since = self._stopping_since
        if since is not None and time.monotonic() - since > _STUCK:
            raise RuntimeError(f"a batch that was given up has not stopped for {_STUCK:g} s")
