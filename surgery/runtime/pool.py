"""A pool of workers: one in this process, or several on Ray."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from surgery.errors import InputError, SurgeryError

from .draw import number_of_steps
from .ray_client import pool_cluster
from .worker import ImageRequest, Worker, WorkerConfig

_TRIES = 3  # of a batch whose worker died


@dataclass(frozen=True)
class Batch:
    """What a worker draws at once. operations: as the model's config has them, None for the untouched base."""

    operations: list | None
    requests: tuple[ImageRequest, ...]


@contextmanager
def worker_pool(config: WorkerConfig, workers: int = 1, address: str | None = None) -> "Iterator[LocalPool | RayPool]":
    """Yield a LocalPool for one worker without an address, else a RayPool.

    address: of a running Ray cluster, such as ray://host:10001; None starts one on this machine for the time being.
    Each worker has one GPU where the cluster has any. Raises InputError where Ray is not installed, or the cluster
    cannot be reached or is too small.
    """
    if workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    if workers == 1 and address is None:
        yield LocalPool(config)
        return
    with pool_cluster(address, workers) as ray:
        yield RayPool(ray, config, workers)


class LocalPool:
    """Draws in this process."""

    def __init__(self, config: WorkerConfig) -> None:
        self._worker = Worker(config)

    def batch_size(self) -> int:
        """How many images are to be drawn at once."""
        return self._worker.batch_size()

    def draw(self, batches: Sequence[Batch], advance: Callable[[int], object]) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (place among the batches, PNG files). advance: told each image's each step."""
        for number, batch in enumerate(batches):
            on_step = partial(advance, len(batch.requests))
            yield number, self._worker.draw_files(batch.operations, batch.requests, on_step)


class RayPool:
    """Draws on the workers of a Ray cluster, each of which has loaded the model."""

    def __init__(self, ray: Any, config: WorkerConfig, workers: int, worker_class: type = Worker) -> None:
        self._ray, self._config, self._workers = ray, config, workers
        self._class = _remote_class(ray, config, workers, worker_class)
        self._idle = []

    def batch_size(self) -> int:
        """How many images are to be drawn at once, as one of the workers finds."""
        self._idle.append(self._class.remote(self._config))
        with self._told_plainly():
            return self._ray.get(self._idle[0].batch_size.remote())

    def draw(self, batches: Sequence[Batch], advance: Callable[[int], object]) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (place among the batches, PNG files) as they are finished; what a dead worker had, a new one draws.

        Raises SurgeryError where three workers died over a batch.
        """
        steps = number_of_steps(self._config.sampling)
        waiting, deaths, at_work = deque(range(len(batches))), Counter(), {}
        wanted = min(self._workers, len(batches))
        self._idle += [self._class.remote(self._config) for _ in range(wanted - len(self._idle))]
        while waiting or at_work:
            while waiting and self._idle:
                worker, number = self._idle.pop(), waiting.popleft()
                done = worker.draw_files.remote(batches[number].operations, batches[number].requests)
                at_work[done] = (worker, number)
            (done,), _ = self._ray.wait(list(at_work), num_returns=1)
            worker, number = at_work.pop(done)
            count = len(batches[number].requests)
            try:
                with self._told_plainly():
                    images = self._ray.get(done)
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.WorkerCrashedError) as error:
                deaths[number] += 1
                if deaths[number] == _TRIES:
                    raise SurgeryError(
                        f"{_TRIES} workers died over the same {count} images (out of memory? try --batch "
                        f"{max(1, count // 2)}). What was drawn so far is kept; the same command goes on"
                    ) from error
                waiting.appendleft(number)
                self._idle.append(self._class.remote(self._config))
                continue
            self._idle.append(worker)
            advance(count * steps)
            yield number, images

    @contextmanager
    def _told_plainly(self) -> Iterator[None]:
        """Turn what went wrong inside a worker into the error that it was there; a worker's death passes."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            cause = error
            while isinstance(getattr(cause, "cause", None), Exception):
                cause = cause.cause
            if cause is error and not isinstance(error, self._ray.exceptions.RayTaskError):
                raise
            if isinstance(cause, SurgeryError):
                away = f"; a folder must be there on every machine of the cluster: {self._config.model}"
                raise type(cause)(f"{cause}{away if 'no folder' in str(cause) else ''}") from error
            raise SurgeryError(f"a worker failed: {type(cause).__name__}: {cause}") from error


def _remote_class(ray, config, workers, worker_class):
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if config.device in (None, "cuda") else 0
    if gpus and workers > gpus:
        raise InputError(f"--workers {workers} needs a GPU each, and the cluster has {gpus}")
    if workers > there.get("CPU", 0):
        raise InputError(f"--workers {workers} needs a CPU each, and the cluster has {there.get('CPU', 0):g}")
    return ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(worker_class)
