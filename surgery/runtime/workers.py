"""Workers that draw paired images: in this process, in others, or on Ray."""

import io
import json
import os
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from surgery.errors import ArtifactError, InputError, SurgeryError
from surgery.machine import connect_to_ray

from .draw import number_of_steps


@dataclass(frozen=True)
class Order:
    """What a painter is told. model: an absolute folder or a Hub repository, whose artifact must have this hash.

    threads: of the CPU, None for torch's own choice. dtype: "float16" and so on, None for the model's own.
    """

    model: str
    revision: str | None
    hash: str
    sampling: dict
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None


class Painter:
    """Holds the pipeline. Base and patched images come from the same weights in memory: the base is `unpatch`.

    It is loaded when it is first needed, since what is raised while a remote worker is made does not reach its maker.
    """

    def __init__(self, order):
        self.order, self.sampling = order, order.sampling

    @cached_property
    def pipeline(self):
        """The loaded pipeline, on its device; ArtifactError where it is not the artifact of the Order."""
        import torch

        from surgery.console import quiet_bars

        from .load import open_model

        quiet_bars()
        order = self.order
        if order.threads:
            torch.set_num_threads(order.threads)
        dtype = getattr(torch, order.dtype) if order.dtype else None
        pipeline, _, found = open_model(order.model, order.revision, order.device, dtype=dtype)
        if found != order.hash:
            raise ArtifactError(f"{order.model} is artifact {str(found)[:12]} here, not {order.hash[:12]}")
        return pipeline

    def draw(self, operations, jobs, on_step=None):
        """PNG files (bytes) of (prompt, seed) pairs, drawn as one batch; operations: a Side's."""
        import torch

        from surgery.models.patching import operate

        from .draw import draw

        operate(self.pipeline, operations)
        try:
            images = draw(self.pipeline, jobs, self.sampling, on_step)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise SurgeryError(
                f"drawing {len(jobs)} images at once ran out of memory. What was drawn so far is kept: run the same "
                f"command with --batch {max(1, len(jobs) // 2)}, it goes on from there"
            ) from error
        return [_png(image, prompt, seed) for image, (prompt, seed) in zip(images, jobs, strict=True)]

    def batch_size(self):
        """How many images fit in memory at once, as a power of two up to 32; on the CPU what is fastest, by size."""
        import torch

        from surgery.models.patching import denoiser

        from .draw import draw

        model = denoiser(self.pipeline)
        side = model.config.sample_size * self.pipeline.vae_scale_factor
        side = side if isinstance(side, int) else max(side)
        pixels = (self.sampling.get("height") or side) * (self.sampling.get("width") or side)
        if model.device.type != "cuda":
            return max(1, min(16, 16 * 128 * 128 // pixels))
        peaks = []
        for count in (1, 2):
            torch.cuda.reset_peak_memory_stats()
            draw(self.pipeline, [("memory", seed) for seed in range(count)], self.sampling)
            peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fitting = 1 + 0.8 * max(0, free - peaks[0]) / max(peaks[1] - peaks[0], 1)
        return 1 << min(5, int(fitting).bit_length() - 1)


def _png(image, prompt, seed):
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    record = {"prompt": prompt, "seed": seed} | ({"flagged": True} if image.info.get("flagged") else {})
    text.add_itxt("surgery", json.dumps(record, ensure_ascii=False))
    file = io.BytesIO()
    image.convert("RGB").save(file, format="PNG", pnginfo=text)
    return file.getvalue()


_TRIES = 3  # of a batch whose worker died


@contextmanager
def crew(order, workers=1, address=None):
    """Yield whoever is to draw by an Order: Here for one worker without an address, else OnRay.

    address: of a running Ray cluster, such as ray://host:10001; None starts one on this machine for the time being.
    Each worker has one GPU where the cluster has any. Raises InputError where Ray is not installed, or the cluster
    cannot be reached or is too small.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    if workers == 1 and address is None:
        yield Here(order)
        return
    ray, started = _connected(workers, address)
    try:
        yield OnRay(ray, order, workers)
    finally:
        if started:
            ray.shutdown()


class Here:
    """Draws in this process."""

    def __init__(self, order):
        self._painter = Painter(order)

    def batch_size(self):
        """As Painter's."""
        return self._painter.batch_size()

    def draw(self, tasks, advance):
        """Yield (task, PNG files) for tasks (Side, Jobs), in their order. advance: told each image's each step."""
        for side, jobs in tasks:
            pairs = [(job.prompt, job.seed) for job in jobs]
            yield (side, jobs), self._painter.draw(side.operations, pairs, partial(advance, len(jobs)))


class OnRay:
    """Draws on the workers of a Ray cluster, each of which has loaded the model."""

    def __init__(self, ray, order, workers):
        self.ray, self.order, self.workers = ray, order, workers
        self._class = _worker_class(ray, order, workers)
        self._idle = []

    def batch_size(self):
        """As Painter's, of one of the workers."""
        self._idle.append(self._class.remote(self.order))
        with self._told_plainly():
            return self.ray.get(self._idle[0].batch_size.remote())

    def draw(self, tasks, advance):
        """Yield (task, PNG files) as they are finished; a task whose worker died is drawn again by a new one.

        Raises SurgeryError where that happened to a task three times.
        """
        steps = number_of_steps(self.order.sampling)
        waiting, deaths, at_work = deque(tasks), {}, {}
        wanted = min(self.workers, len(tasks))
        self._idle += [self._class.remote(self.order) for _ in range(wanted - len(self._idle))]
        while waiting or at_work:
            while waiting and self._idle:
                worker, (side, jobs) = self._idle.pop(), waiting.popleft()
                done = worker.draw.remote(side.operations, [(job.prompt, job.seed) for job in jobs])
                at_work[done] = (worker, (side, jobs))
            (done,), _ = self.ray.wait(list(at_work), num_returns=1)
            worker, task = at_work.pop(done)
            try:
                with self._told_plainly():
                    images = self.ray.get(done)
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.WorkerCrashedError) as error:
                name = (task[0].key, task[1][0].key)
                deaths[name] = deaths.get(name, 0) + 1
                if deaths[name] == _TRIES:
                    raise SurgeryError(
                        f"{_TRIES} workers died over the same {len(task[1])} images (out of memory? try --batch "
                        f"{max(1, len(task[1]) // 2)}). What was drawn so far is kept; the same command goes on"
                    ) from error
                waiting.appendleft(task)
                self._idle.append(self._class.remote(self.order))
                continue
            self._idle.append(worker)
            advance(len(task[1]) * steps)
            yield task, images

    @contextmanager
    def _told_plainly(self):
        """Turn what went wrong inside a worker into the error that it was there; a worker's death passes."""
        try:
            yield
        except self.ray.exceptions.RayError as error:
            cause = error
            while isinstance(getattr(cause, "cause", None), Exception):
                cause = cause.cause
            if cause is error and not isinstance(error, self.ray.exceptions.RayTaskError):
                raise
            if isinstance(cause, SurgeryError):
                away = f"; a folder must be there on every machine of the cluster: {self.order.model}"
                raise type(cause)(f"{cause}{away if 'no folder' in str(cause) else ''}") from error
            raise SurgeryError(f"a worker failed: {type(cause).__name__}: {cause}") from error


def _connected(workers, address):
    """(ray, whether it was connected here)."""
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "drawing on several workers needs Ray: pip install 'pladis-surgery[ray]'; --workers 1 needs nothing"
        ) from error
    if ray.is_initialized():
        return ray, False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default; without it Ray warns
    hint = "RAY_AUTH_TOKEN if the cluster asks for one"
    return connect_to_ray(address, workers, "a Ray cluster on this machine", hint), True


def _worker_class(ray, order, workers):
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if order.device in (None, "cuda") else 0
    if gpus and workers > gpus:
        raise InputError(f"--workers {workers} needs a GPU each, and the cluster has {gpus}")
    if workers > there.get("CPU", 0):
        raise InputError(f"--workers {workers} needs a CPU each, and the cluster has {there.get('CPU', 0):g}")
    return ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(Painter)
