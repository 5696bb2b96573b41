"""A server on Ray Serve: from what `checking.py` found right to one that is ready, and back."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from surgery.compat import delete_application, run_applications
from surgery.errors import InputError, SurgeryError
from surgery.runtime.ray_client import ray_errors, serve_cluster

from .checking import ServedModel, Serving
from .ingress import REPLICA, Ingress, generation, ingress_app, replicas_name, replicas_of
from .replica import Replica, read_start_failure

_POLL = 0.2
_FIRST_LOOK = 10.0  # seconds for the gateway to see replicas that are up
_SWITCHES = 3  # tries to have the gateway send requests elsewhere
_JOIN = 10.0  # seconds for a reload to be given up
_LOOK = 1.0  # seconds between two looks whether a model is to be loaded anew
_START_POLL = 0.5  # a look at Serve's status costs its controller tens of milliseconds, which a start could use
_LAST_BYTES = 0.5  # seconds for what is answered to leave Serve's proxy
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


class Server:
    """A server that is up. name: of the Serve application with its ingress; resources: of a replica, for Ray."""

    def __init__(self, name: str, serving: Serving, resources: Mapping[str, float], threads: int | None) -> None:
        self.name, self.config = name, serving.server
        self.hurried = False  # set to leave without waiting for anything
        self._models, self._access, self._tracing = list(serving.models()), serving.access, serving.tracing
        self._numbers = [1] * len(self._models)  # of the generations that are served
        self._loads = 1  # the highest number of any generation
        self._resources, self._threads = resources, threads
        self._handle: Any = None
        self._asked, self._leaving, self._reloading = threading.Event(), threading.Event(), threading.Lock()
        self._reloader = threading.Thread(target=self._carry_out, name="reloads", daemon=True)

    @property
    def served(self) -> ServedModel:
        """The first model, as it is now."""
        return self._models[0].served

    def start(self) -> None:
        """Have everything brought up; the error of a replica that cannot start."""
        described = [_described(one) for one in self._models]
        families = tuple(map(self._family, range(len(self._models))))
        apps = {self._app(index): self._replicas(one) for index, one in enumerate(self._models)}
        ingress = _ingress().bind(described, self._access, self._tracing, families)
        handles = _run({**apps, self.name: ingress}, self.name, self.config, self._leaving)
        self._handle = handles[-1]
        self._reloader.start()
        with suppress(TimeoutError, *ray_errors()):  # or /health would say "starting" to who reads that it is up
            self._handle.up.remote().result(timeout_s=_FIRST_LOOK)

    def replicas(self) -> int:
        """How many replicas are up; SurgeryError where an application is gone from the cluster."""
        from ray import serve

        try:
            apps = serve.status().applications
        except ray_errors() as error:
            raise SurgeryError(f"Ray does not answer any more: {_last_line(str(error))}") from error
        wanted = [self.name, *map(self._app, range(len(self._models)))]
        if gone := [name for name in wanted if name not in apps]:
            raise SurgeryError(f"the application {gone[0]} was deleted from the cluster")
        return sum(replicas_of(apps[name], REPLICA) for name in wanted)

    def reload(self, index: int = 0) -> Serving:
        """Load a model anew, as its folder or repository is now; returns what is served then.

        Requests meanwhile, and those that were accepted before, are drawn by the replicas that are there. Raises
        InputError, BaseError and so on for what cannot be served, and the error of a replica that cannot start; the
        model is then served as before.
        """
        with self._reloading:
            new = self._models[index].again()
            others = [name for at, one in enumerate(self._models) if at != index for name in one.served.names()]
            if twice := set(others).intersection(new.served.names()):
                raise InputError(f"it is called {twice.pop()} now, as another model is here")
            self._check_room(index)
            self._loads += 1
            old, app = self._app(index), generation(self._family(index), self._loads)
            try:
                _run({app: self._replicas(new)}, self.name, self.config, self._leaving)
                self._switch(index, app)
            except BaseException:
                _take_down([app], wait=False)
                raise
            self._models[index], self._numbers[index] = new, self._loads
            while self._left() and not self._leaving.wait(_POLL):
                pass  # what was accepted is finished
            _take_down([old], wait=False)
            return new

    def ask_to_reload(self) -> None:
        """Have all models loaded anew by another thread, which says on standard error what came of it."""
        self._asked.set()

    def take_down(self, wait: bool) -> None:
        """Delete the applications."""
        self._leaving.set()
        if self._reloader.is_alive():
            self._reloader.join(_JOIN)  # it may have replicas of its own to delete
        _take_down([self.name, *map(self._app, range(len(self._models)))], wait)

    def _switch(self, index, app):
        for left in reversed(range(_SWITCHES)):
            try:
                self._handle.switch.remote(index, app).result()
                return
            except ray_errors() as error:  # a gateway that died is made anew, over the newest replicas
                if not left:
                    raise SurgeryError(f"the gateway does not answer: {_last_line(str(error))}") from error

    def _left(self):
        try:
            return self._handle.left.remote().result()
        except ray_errors():
            return 0  # it died, and what it had accepted

    def _family(self, index):
        return f"{self.name}.{index}"

    def _app(self, index):
        return generation(self._family(index), self._numbers[index])

    def _replicas(self, model):
        return _replicas(REPLICA, model, self._resources, self._threads, self._tracing)

    def _check_room(self, index):
        """Raise InputError where a second set of a model's replicas never finds room beside the first."""
        import ray

        gpus = self._resources.get("num_gpus", 0) * self.config.replicas
        free = ray.available_resources().get("GPU", 0.0)
        if self.config.address is None and gpus > free:
            raise InputError(
                f"its new replicas need {gpus:g} GPUs beside the old ones, and {free:g} are free: start the server "
                "anew, or with fewer --replicas"
            )

    def _carry_out(self):
        """Reload what the gateway's clients or this process ask for, until the server is left."""
        while not self._leaving.is_set():
            try:
                if self._asked.is_set():
                    self._asked.clear()
                    for index in range(len(self._models)):
                        self._told(index)
                    continue
                wish = self._handle.wish.remote(_LOOK).result(timeout_s=_LOOK + 10)
                if wish is not None:
                    self._handle.tell.remote(self._told(wish)).result()
            except Exception as error:  # the gateway died, or is slow, or Ray is being left
                logging.getLogger(__name__).info("looking for reloads: %s", error)
                self._leaving.wait(_LOOK)

    def _told(self, index):
        """Reload a model; what is told of it, a dict, or the reason why not, a text."""
        before, begun = self._models[index].served, time.monotonic()
        name = before.names()[0]
        print(f"surgery serve: loading {name} anew", file=sys.stderr, flush=True)
        try:
            served = self.reload(index).served
        except Exception as error:
            text = str(error) if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
            print(f"surgery serve: {name} is served as before: {text}", file=sys.stderr, flush=True)
            return text
        now = served.names()[0]
        hashes = [str(one.artifact_hash)[:12] for one in (served, before) if one.artifact_hash]
        print(f"surgery serve: {now} was loaded anew: {', before '.join(hashes)}", file=sys.stderr, flush=True)
        return {
            "id": now,
            "object": "model",
            "artifact_hash": served.artifact_hash,
            "artifact_hash_before": before.artifact_hash,
            "seconds": round(time.monotonic() - begun, 3),
        }

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
    with serve_cluster(config.address, threads) as there:
        gpus = there.get("GPU", 0) if worker.device in (None, "cuda") else 0
        if worker.device == "cuda" and not gpus and config.address is None:
            raise InputError("--device cuda: there is no GPU here")
        if gpus and replicas > gpus and config.address is None:
            raise InputError(f"{replicas} replicas need a GPU each, and there are {gpus:g} here (--replicas)")
        on_gpu = bool(gpus) or worker.device == "cuda"
        started_there = _start_serve(config) and config.address is not None
        resources = _resources(on_gpu, threads)
        if config.address is None:
            # Nothing else runs on this Ray, and a model that is loaded anew is there twice for a while.
            resources = _resources(on_gpu, 0) | ({"num_gpus": 0.5} if on_gpu and replicas == gpus == 1 else {})
        name = f"surgery-{serving.served.name.replace('/', '-')}"
        up = Server(name, serving, resources, None if on_gpu else threads)
        is_up = False
        try:
            up.start()
            is_up = True
            yield up
        finally:
            hurried = not is_up or up.hurried
            if config.address is not None or not hurried:  # a Ray of our own takes all with it
                up.take_down(wait=not hurried)
                _end_serve(started_there)


def application(serving: Serving, on_gpu: bool, threads: int) -> Any:
    """The Ray Serve application of a server, all in one: its Ingress bound to the replicas of each model.

    threads: of each replica without a GPU.
    """
    resources, own = _resources(on_gpu, threads), None if on_gpu else threads
    models = serving.models()
    names = map(replicas_name, range(len(models)))
    handles = [_replicas(name, one, resources, own, serving.tracing) for name, one in zip(names, models, strict=True)]
    return _ingress().bind([_described(one) for one in models], serving.access, serving.tracing, (), *handles)


def _resources(on_gpu, threads):
    return {"num_cpus": 0, "num_gpus": 1} if on_gpu else {"num_cpus": threads}


_QUICK = {"health_check_period_s": 1, "graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 3}


def _described(model):
    return model.served, model.limits, model.server.replicas


def _replicas(name, model, resources, threads, tracing):
    """The deployment of a model's replicas, bound; threads: of each on a CPU."""
    from ray import serve

    replica = serve.deployment(
        name=name,
        num_replicas=model.server.replicas,
        max_ongoing_requests=1,  # batches; the gateway keeps what waits
        ray_actor_options=resources,
        **_QUICK,
    )(Replica)
    return replica.bind(replace(model.worker, threads=threads), model.warm, _described(model), tracing=tracing)


def _ingress():
    from ray import serve

    return serve.deployment(
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=100_000,  # what is too much is refused there, at once and with 429
        ray_actor_options={"num_cpus": 0},
        **_QUICK,
    )(serve.ingress(ingress_app)(Ingress))


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


def _run(apps, route, config, leaving):
    """The handles of {name: application} once all are up; the error of what cannot start. route: the ingress' name."""
    # Not waited for there: Serve says nothing until a replica failed three times, and waits without an end where
    # replicas find no room.
    try:
        handles = run_applications(apps, route, _QUIET)
    except (*ray_errors(), RuntimeError, ValueError) as error:
        raise SurgeryError(f"the server did not start: {_last_line(str(error))}") from error
    deadline = time.monotonic() + config.start_timeout
    while True:
        states, told = _states(apps)
        if error := read_start_failure(told):
            raise _explained(error, config)
        if set(states) == {"RUNNING"}:
            return handles
        if "DEPLOY_FAILED" in states:
            raise SurgeryError(f"the server did not start: {_last_line(told) or 'Ray Serve does not say why'}")
        if time.monotonic() > deadline:
            raise SurgeryError(
                f"not all replicas were up after {config.start_timeout:g} s (--start-timeout). Ray Serve says: "
                f"{_last_line(told) or 'nothing'}"
            )
        if leaving.wait(_START_POLL):
            raise SurgeryError("the server is being ended")


def _states(names):
    """(the status of each application, None of one that is not there; what Serve says of all as one text)."""
    from ray import serve

    apps = serve.status().applications
    found = [apps[name] for name in names if name in apps]
    told = [text for app in found for text in (app.message, *(one.message for one in app.deployments.values()))]
    return [apps[name].status if name in apps else None for name in names], "\n".join(told)


def _explained(error, config):
    if error is None or config.address is None:
        return error
    return type(error)(f"{error} (on a replica's machine; a folder must be there on every machine of the cluster)")


def _take_down(names: Sequence[str], wait: bool):
    """Delete applications."""
    try:
        for name in names:
            delete_application(name, wait)
    except ray_errors() as error:  # Ray may be what has gone; the reason for leaving is the error to tell
        logging.getLogger(__name__).warning("taking the server down: %s", error)


def _end_serve(started_there):
    """End Serve, if it was started for this on a cluster and serves nothing else by now."""
    from ray import serve

    try:
        if started_there and not serve.status().applications:
            serve.shutdown()
    except ray_errors() as error:
        logging.getLogger(__name__).warning("taking the server down: %s", error)


def _last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
