"""The replica as Ray Serve runs it: one batch at a time, in a thread, so that it goes on answering health checks."""

import asyncio
import threading
import time

from .pipeline import ServedPipeline, Stopped
from .start_failure import StartFailure

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
