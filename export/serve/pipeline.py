"""The pipeline of one replica: batches in, image files out; what one image does wrong is not another one's loss."""

import asyncio
import base64
import gc
import io
import os
import sys
import threading
import time
from contextlib import contextmanager

from surgery.errors import ArtifactError, InputError, SurgeryError

from .cluster import StartFailure
from .request import Drawn, Picture

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class Stopped(Exception):
    """Nobody waits for the images any more."""


class ServedPipeline:
    """A loaded pipeline that draws one batch at a time. Making it loads the model and draws the Order's warm-up.

    Raises what `surgery.runtime.load.open_model` does, ArtifactError where the model is not the artifact of the Order,
    and SurgeryError where not even one image can be drawn.
    """

    def __init__(self, order):
        import torch

        from surgery.console import quiet_bars, quiet_notices
        from surgery.models.patching import denoiser, read_hyperparameters
        from surgery.runtime.load import open_model

        quiet_notices()  # at their usual level the libraries log the part of a prompt that they cut off
        quiet_bars()
        if order.threads:
            torch.set_num_threads(order.threads)
        dtype = getattr(torch, order.dtype) if order.dtype else None
        names = ("engine", "trust_engines", "fallback", "compile")
        how = {name: getattr(order, name) for name in names if getattr(order, name)}
        self._pipeline, recorded, found = open_model(order.model, order.revision, order.device, dtype=dtype, **how)
        if found != order.hash:
            raise ArtifactError(
                f"{order.model} is artifact {str(found)[:12]} on this replica's machine, not {str(order.hash)[:12]}; "
                "give every machine the same"
            )
        self._guidance = recorded.get("guidance")
        self._model = denoiser(self._pipeline)
        self._own = read_hyperparameters(self._model)
        self._fitting = {}  # (width, height) -> how many at once, where more did not fit
        self._warm(order)

    def draw(self, setting, pictures, stopped):
        """The Drawns of Pictures, in order; at most as many at once as are known to fit in memory.

        stopped: a threading.Event; once it is set the next denoising step raises Stopped.
        """
        size = min(len(pictures), self._fitting.get((setting.width, setting.height), len(pictures)))
        parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        return [drawn for part in parts for drawn in self._together(setting, part, stopped)]

    def _together(self, setting, pictures, stopped):
        """The Drawns of one batch; one that fails is drawn again in halves, so that each image answers for itself."""
        try:
            images = self._images(setting, pictures, stopped)
            return [_drawn(image, picture) for image, picture in zip(images, pictures, strict=True)]
        except Stopped:
            raise
        except Exception as error:
            # Nothing of the error is kept but its words: its traceback holds the tensors of what did not fit.
            kind, problem = _kind(error), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if _is_broken(error):
                print(f"surgery serve: the accelerator is lost to this replica: {problem}", file=sys.stderr, flush=True)
                os._exit(1)  # every later call would fail too; the batch is given to another replica
        if kind == "memory":
            self._make_room()
            self._fitting[setting.width, setting.height] = max(1, len(pictures) // 2)
        if len(pictures) > 1 and kind != "refused":
            half = len(pictures) // 2
            return self._together(setting, pictures[:half], stopped) + self._together(setting, pictures[half:], stopped)
        print(f"surgery serve: {len(pictures)} images were not drawn: {kind}", file=sys.stderr, flush=True)
        return [Drawn(problem=problem, kind=kind) for _ in pictures]

    def _images(self, setting, pictures, stopped):
        from surgery.runtime.draw import draw

        def on_step():
            if stopped.is_set():
                raise Stopped

        sampling = {**setting.sampling(), "guidance": self._guidance}
        if setting.negatives:
            sampling["negative_prompt"] = [picture.negative_prompt or "" for picture in pictures]
        with self._tuned(dict(setting.hyperparameters)):
            return draw(self._pipeline, [(picture.prompt, picture.seed) for picture in pictures], sampling, on_step)

    @contextmanager
    def _tuned(self, hyperparameters):
        """The request's hyperparameters in every patched module for one batch, and each module's own after it."""
        from surgery.models.patching import tune, write_hyperparameters

        if not hyperparameters:
            yield
            return
        try:
            tune(self._pipeline, **hyperparameters)
            yield
        finally:
            write_hyperparameters(self._model, self._own)
            self._model.update_config()

    def _make_room(self):
        import torch

        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _warm(self, order):
        for count in sorted({1, order.max_batch}):
            pictures = [Picture("a warm-up", seed) for seed in range(count)]
            for drawn in self.draw(order.warm, pictures, threading.Event()):
                if drawn.problem is not None:
                    raise SurgeryError(f"the replica cannot draw an image: {drawn.problem}")


def _drawn(image, picture):
    file = io.BytesIO()
    lossy = {} if picture.format == "png" else {"quality": 95}
    image.convert("RGB").save(file, format=picture.format.upper(), **lossy)
    text = base64.b64encode(file.getvalue()).decode("ascii")
    return Drawn(text, f"{image.width}x{image.height}", bool(image.info.get("flagged")))


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


_STUCK = 300.0  # seconds after which a step that was to be the last one counts as hung; compiling one takes minutes


class Replica:
    """Holds a pipeline. What it cannot load for it tells in a form that `serving.py` finds in Serve's status."""

    def __init__(self, order):
        try:
            self._pipeline = ServedPipeline(order)
        except Exception as error:  # whatever it is, trying again would not load the model
            raise StartFailure.of(error, order.model) from error
        self._drawing = asyncio.Lock()
        self._stopping_since = None

    async def draw(self, setting, pictures):
        """The Drawns of a batch. Cancelled, it stops at the next denoising step."""
        stopped = threading.Event()
        async with self._drawing:
            drawing = asyncio.ensure_future(asyncio.to_thread(self._pipeline.draw, setting, pictures, stopped))
            try:
                return await asyncio.shield(drawing)
            except asyncio.CancelledError:
                stopped.set()
                self._stopping_since = time.monotonic()
                await asyncio.wait((drawing,))
                self._stopping_since = None
                if not isinstance(drawing.exception(), (Stopped, type(None))):
                    raise drawing.exception() from None
                raise

    def check_health(self):
        """Called by Serve, which replaces a replica where this raises: RuntimeError if it does not stop drawing."""
        since = self._stopping_since
        if since is not None and time.monotonic() - since > _STUCK:
            raise RuntimeError(f"a batch that was given up has not stopped for {_STUCK:g} s")
