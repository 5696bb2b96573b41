"""A server on Ray Serve: from what `checking.py` found right to one that is ready, and back."""

import logging
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

from surgery.errors import InputError, SurgeryError

from .cluster import ray_cluster, ray_errors, read
from .ingress import REPLICA, Ingress, build_app
from .pipeline import Replica

_POLL = 0.2
_START_POLL = 0.5  # a look at Serve's status costs its controller tens of milliseconds, which a start could use
_LAST_BYTES = 0.5  # seconds for what is answered to leave Serve's proxy
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Server:
    """A server that is up. `name`: of the Serve application; `served`: the ServedModel; `handle`: of its Ingress."""

    def __init__(self, name, served, place, handle):
        self.name, self.served, self.place = name, served, place
        self._handle = handle
        self.hurried = False  # set to leave without waiting for anything

    def replicas(self):
        """How many replicas are up; SurgeryError where the application is gone from the cluster."""
        from ray import serve

        try:
            app = serve.status().applications.get(self.name)
        except ray_errors() as error:
            raise SurgeryError(f"Ray does not answer any more: {_last_line(str(error))}") from error
        if app is None:
            raise SurgeryError(f"the application {self.name} was deleted from the cluster")
        deployment = app.deployments.get(REPLICA)
        return deployment.replica_states.get("RUNNING", 0) if deployment else 0

    def drain(self, seconds):
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
                raise SurgeryError(f"the front died, and what it had accepted: {_last_line(str(error))}") from error
        return 0


@contextmanager
def server(served, place, limits, order):
    """Yield a Server whose replicas are all up; on leaving, it is taken down, and a Ray that was started here ended.

    Raises InputError where the cluster has not what the replicas need, and the error of a replica that could not start.
    """
    threads = order.threads or (max(1, (os.cpu_count() or 1) // place.replicas) if place.address is None else 1)
    with ray_cluster(place.address, threads * place.replicas) as there:
        gpus = there.get("GPU", 0) if order.device in (None, "cuda") else 0
        if order.device == "cuda" and not gpus and place.address is None:
            raise InputError("--device cuda: there is no GPU here")
        if gpus and place.replicas > gpus and place.address is None:
            raise InputError(f"--replicas {place.replicas} needs a GPU each, and there are {gpus:g} here")
        on_gpu = bool(gpus) or order.device == "cuda"
        order = replace(order, threads=None if on_gpu else threads)
        started_there = _start_serve(place) and place.address is not None
        name = f"surgery-{served.name.replace('/', '-')}"
        resources = {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": threads}
        app = _application(served, limits, order, place.replicas, resources)
        up = None
        try:
            up = Server(name, served, place, _run(app, name, place))
            yield up
        finally:
            hurried = up is None or up.hurried
            if place.address is not None or not hurried:  # a Ray of our own takes all with it
                _take_down(name, started_there, wait=not hurried)


def _application(served, limits, order, replicas, resources):
    from ray import serve

    quick = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 3}
    replica = serve.deployment(
        name=REPLICA,
        num_replicas=replicas,
        max_ongoing_requests=1,  # batches; the front keeps what waits
        ray_actor_options=resources,
        **quick,
    )(Replica)
    ingress = serve.deployment(
        name="Front",
        num_replicas=1,
        max_ongoing_requests=100_000,  # what is too much is refused there, at once and with 429
        ray_actor_options={"num_cpus": 0},
        **quick,
    )(serve.ingress(build_app)(Ingress))
    return ingress.bind(served, limits, replicas, replica.bind(order))


def _start_serve(place):
    """Start Serve's HTTP on the cluster; False where one runs already, which is then used."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    runs_already = bool(serve.status().proxies)
    if runs_already:
        text = "Ray Serve runs on this cluster already and listens where it was told to then, not at --host and --port"
        print(f"surgery serve: {text}", file=sys.stderr)
    where = "HeadOnly" if place.address is None else "EveryNode"
    try:
        serve.start(proxy_location=where, http_options={"host": place.host, "port": place.port}, logging_config=_QUIET)
    except (RuntimeError, OSError, TimeoutError, ValueError) as error:
        raise SurgeryError(f"Ray Serve cannot listen on {place.host}:{place.port}: {_last_line(str(error))}") from error
    return not runs_already


def _run(app, name, place):
    """The handle of the application's ingress once every replica is up; the error of the one that cannot start."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    # Not waited for there: Serve says nothing until a replica failed three times, and waits without an end where
    # replicas find no room.
    target = serve.RunTarget(app, name=name, route_prefix="/", logging_config=_QUIET)
    try:
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
    except (*ray_errors(), RuntimeError, ValueError) as error:
        raise SurgeryError(f"the server did not start: {_last_line(str(error))}") from error
    deadline = time.monotonic() + place.start_timeout
    while True:
        status, told = _status(name)
        if error := read(told):
            raise _explained(error, place)
        if status == ApplicationStatus.RUNNING:
            return handle
        if status == ApplicationStatus.DEPLOY_FAILED:
            raise SurgeryError(f"the server did not start: {_last_line(told) or 'Ray Serve does not say why'}")
        if time.monotonic() > deadline:
            raise SurgeryError(
                f"not all replicas were up after {place.start_timeout:g} s (--start-timeout). Ray Serve says: "
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


def _explained(error, place):
    if error is None or place.address is None:
        return error
    return type(error)(f"{error} (on a replica's machine; a folder must be there on every machine of the cluster)")


def _take_down(name, started_there, wait):
    """Delete the application; and end Serve, if it was started for it on a cluster and serves nothing else by now."""
    from ray import serve

    try:
        serve.delete(name, _blocking=wait)
        if started_there and not serve.status().applications:
            serve.shutdown()
    except ray_errors() as error:  # Ray may be what has gone; the reason for leaving is the error to tell
        logging.getLogger(__name__).warning("taking the server down: %s", error)


def _last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
