"""The pipeline of one replica: batches in, image files out; what one image does wrong is not another one's loss."""

import base64
import gc
import io
import os
import sys
import threading
from contextlib import contextmanager

from surgery.errors import ArtifactError, InputError, SurgeryError

from .work import Drawn, Picture

_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class Stopped(Exception):
    """Nobody waits for the images any more."""


class ServedPipeline:
    """A loaded pipeline that draws one batch at a time. Making it loads the model and draws the Order's warm-up.

    Raises what `surgery.opening.open_model` does, ArtifactError where the model is not the artifact of the Order, and
    SurgeryError where not even one image can be drawn.
    """

    def __init__(self, order):
        import torch

        from surgery.opening import open_model
        from surgery.patching import denoiser, read_hyperparameters
        from surgery.quiet import quiet_bars, quiet_notices

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
        from surgery.generating import draw

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
        from surgery.patching import tune, write_hyperparameters

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
