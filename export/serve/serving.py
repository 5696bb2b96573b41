"""A server on Ray Serve: from what `checking.py` found right to one that is ready, and back."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from surgery.compat import delete_application, run_application, served_object
from surgery.errors import InputError, SurgeryError
from surgery.runtime.ray_client import ray_errors, serve_cluster

from .batching import ReplicaLost
from .checking import ServedModel, ServerConfig, Serving
from .front import Front
from .gateway import Gateway
from .http import http_app
from .metrics import Metrics
from .replica import Replica, read_start_failure

REPLICA = "Replica"  # what the names of deployments with models begin with


class Ingress:
    """What Ray Serve makes one of.

    models: the (ServedModel, Limits, number of replicas) of each; access: who may use it; handles: of the deployments
    of their replicas.
    """

    async def __init__(self, models, access, *handles):
        metrics = Metrics(max(limits.batch for _, limits, _ in models))
        gateways = []
        for index, ((served, limits, replicas), handle) in enumerate(zip(models, handles, strict=True)):
            count = partial(self._count, replicas_name(index))
            send, pace = partial(self._send, handle), partial(self._pace, handle)
            gateways.append(Gateway(served, limits, replicas, send, count, pace, metrics))
        self.front = Front(gateways, metrics, access)
        await self.front.start()

    async def drain(self, seconds):
        """Called by the process that started the server: accept no more, and how many were not done in time."""
        return await self.front.drain(seconds)

    async def _pace(self, handle):
        try:
            return await handle.pace.remote()
        except ray_errors():
            return 0.0

    async def _send(self, handle, key, requests, show):
        """A batch's results from a replica that is idle. Raises ReplicaLost for all that is no fault of the batch."""
        from ray.exceptions import RayTaskError

        shows = any(request.previews for request in requests)
        if shows:
            response = handle.options(stream=True).draw_showing.remote(key, requests)
        else:
            response = handle.draw.remote(key, requests)
        try:
            if not shows:
                return await response
            async for told in response:
                if isinstance(told, list):
                    return told
                show(*told)
            raise ReplicaLost("the replica sent no images")
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:  # raised by the replica's own code
            if isinstance(error.cause, ray_errors()):
                raise ReplicaLost(str(error.cause)) from error
            raise
        except ray_errors() as error:
            raise ReplicaLost(str(error)) from error

    async def _count(self, name):
        """How many replicas pass Serve's health checks; None while its controller is away."""
        try:
            return await asyncio.to_thread(_running, name)
        except ray_errors():
            return None


def replicas_name(index: int) -> str:
    """The name of the deployment with the replicas of a server's model."""
    return f"{REPLICA}{index or ''}"


def _http_app():
    """The HTTP application of the Ingress in this process."""
    return http_app(lambda: served_object().front)


def _running(name):
    from ray import serve

    app = serve.status().applications.get(serve.get_replica_context().app_name)
    return _replicas_of(app, name) if app else 0


def _replicas_of(app, wanted=None):
    """How many replicas of an application, as Serve's status has it, are up: of a deployment, or of all."""
    return sum(
        deployment.replica_states.get("RUNNING", 0)
        for name, deployment in app.deployments.items()
        if (name == wanted if wanted else name.startswith(REPLICA))
    )


_POLL = 0.2
_START_POLL = 0.5  # a look at Serve's status costs its controller tens of milliseconds, which a start could use
_LAST_BYTES = 0.5  # seconds for what is answered to leave Serve's proxy
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Server:
    """A server that is up. `name`: of the Serve application; `served`: the ServedModel; `handle`: of its Ingress."""

    def __init__(self, name: str, served: ServedModel, config: ServerConfig, handle: Any) -> None:
        self.name, self.served, self.config = name, served, config
        self._handle = handle
        self.hurried = False  # set to leave without waiting for anything

    def replicas(self) -> int:
        """How many replicas are up; SurgeryError where the application is gone from the cluster."""
        from ray import serve

        try:
            app = serve.status().applications.get(self.name)
        except ray_errors() as error:
            raise SurgeryError(f"Ray does not answer any more: {_last_line(str(error))}") from error
        if app is None:
            raise SurgeryError(f"the application {self.name} was deleted from the cluster")
        return _replicas_of(app)

    def drain(self, seconds: float) -> int:
        """Have the server accept nothing more and finish what it has accepted; returns how many were not done."""
        response = self._handle.drain.remote(seconds)
        deadline = time.monotonic() + seconds + 5
        while not self.hurried:
            try:
                left = response.result(timeout_s=_POLL)
                time.sleep(_LAST_BYTES)
                return left
            except TimeoutError:  # which Ray's own is as well
                if time.monotonic() > deadline:
                    raise SurgeryError("the server did not answer when it was told to finish") from None
            except ray_errors() as error:
                raise SurgeryError(f"the gateway died, and what it had accepted: {_last_line(str(error))}") from error
        return 0


@contextmanager
def server(serving: Serving) -> Iterator[Server]:
    """Yield a Server whose replicas are all up; on leaving, it is taken down, and a Ray that was started here ended.

    Raises InputError where the cluster has not what the replicas need, and the error of a replica that could not start.
    """
    config, worker = serving.server, serving.worker
    replicas = config.replicas * len(serving.models())
    threads = worker.threads or (max(1, (os.cpu_count() or 1) // replicas) if config.address is None else 1)
    with serve_cluster(config.address, threads * replicas) as there:
        gpus = there.get("GPU", 0) if worker.device in (None, "cuda") else 0
        if worker.device == "cuda" and not gpus and config.address is None:
            raise InputError("--device cuda: there is no GPU here")
        if gpus and replicas > gpus and config.address is None:
            raise InputError(f"{replicas} replicas need a GPU each, and there are {gpus:g} here (--replicas)")
        on_gpu = bool(gpus) or worker.device == "cuda"
        started_there = _start_serve(config) and config.address is not None
        name = f"surgery-{serving.served.name.replace('/', '-')}"
        app = application(serving, on_gpu, threads)
        up = None
        try:
            up = Server(name, serving.served, config, _run(app, name, config))
            yield up
        finally:
            hurried = up is None or up.hurried
            if config.address is not None or not hurried:  # a Ray of our own takes all with it
                _take_down(name, started_there, wait=not hurried)


def application(serving: Serving, on_gpu: bool, threads: int) -> Any:
    """The Ray Serve application of a server: its Ingress bound to the replicas of each model.

    threads: of each replica without a GPU.
    """
    from ray import serve

    resources = {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": threads}

    quick = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 3}
    replicas, models, handles = serving.server.replicas, [], []
    for index, model in enumerate(serving.models()):
        replica = serve.deployment(
            name=replicas_name(index),
            num_replicas=replicas,
            max_ongoing_requests=1,  # batches; the gateway keeps what waits
            ray_actor_options=resources,
            **quick,
        )(Replica)
        worker = replace(model.worker, threads=None if on_gpu else threads)
        handles.append(replica.bind(worker, model.warm, model.limits.batch))
        models.append((model.served, model.limits, replicas))
    ingress = serve.deployment(
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=100_000,  # what is too much is refused there, at once and with 429
        ray_actor_options={"num_cpus": 0},
        **quick,
    )(serve.ingress(_http_app)(Ingress))
    return ingress.bind(models, serving.access, *handles)


def _start_serve(config):
    """Start Serve's HTTP on the cluster; False where one runs already, which is then used."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    runs_already = bool(serve.status().proxies)
    if runs_already:
        text = "Ray Serve runs on this cluster already and listens where it was told to then, not at --host and --port"
        print(f"surgery serve: {text}", file=sys.stderr)
    where = "HeadOnly" if config.address is None else "EveryNode"
    try:
        options = {"host": config.host, "port": config.port}
        options |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key} if config.tls_cert else {}
        serve.start(proxy_location=where, http_options=options, logging_config=_QUIET)
    except (RuntimeError, OSError, TimeoutError, ValueError) as error:
        raise SurgeryError(
            f"Ray Serve cannot listen on {config.host}:{config.port}: {_last_line(str(error))}"
        ) from error
    return not runs_already


def _run(app, name, config):
    """The handle of the application's ingress once every replica is up; the error of the one that cannot start."""
    from ray.serve.schema import ApplicationStatus

    # Not waited for there: Serve says nothing until a replica failed three times, and waits without an end where
    # replicas find no room.
    try:
        handle = run_application(app, name, _QUIET)
    except (*ray_errors(), RuntimeError, ValueError) as error:
        raise SurgeryError(f"the server did not start: {_last_line(str(error))}") from error
    deadline = time.monotonic() + config.start_timeout
    while True:
        status, told = _status(name)
        if error := read_start_failure(told):
            raise _explained(error, config)
        if status == ApplicationStatus.RUNNING:
            return handle
        if status == ApplicationStatus.DEPLOY_FAILED:
            raise SurgeryError(f"the server did not start: {_last_line(told) or 'Ray Serve does not say why'}")
        if time.monotonic() > deadline:
            raise SurgeryError(
                f"not all replicas were up after {config.start_timeout:g} s (--start-timeout). Ray Serve says: "
                f"{_last_line(told) or 'nothing'}"
            )
        time.sleep(_START_POLL)


def _status(name):
    """(Serve's status of an application or None, what it says of it and of its deployments as one text)."""
    from ray import serve

    app = serve.status().applications.get(name)
    if app is None:
        return None, ""
    return app.status, "\n".join([app.message, *(deployment.message for deployment in app.deployments.values())])


def _explained(error, config):
    if error is None or config.address is None:
        return error
    return type(error)(f"{error} (on a replica's machine; a folder must be there on every machine of the cluster)")


def _take_down(name, started_there, wait):
    """Delete the application; and end Serve, if it was started for it on a cluster and serves nothing else by now."""
    from ray import serve

    try:
        delete_application(name, wait)
        if started_there and not serve.status().applications:
            serve.shutdown()
    except ray_errors() as error:  # Ray may be what has gone; the reason for leaving is the error to tell
        logging.getLogger(__name__).warning("taking the server down: %s", error)


def _last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
