"""Who draws: this process, or workers of a Ray cluster. Both have `batch_size()` and `draw(tasks, advance)`."""

import os
from collections import deque
from contextlib import contextmanager
from functools import partial

from surgery.errors import InputError, SurgeryError
from surgery.generating import number_of_steps
from surgery.ray_connection import connect_to_ray

from .painter import Painter

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
