"""What Ray Serve makes of a server: its ingress, which finds the replicas of each model and sends them batches."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from surgery.compat import served_object
from surgery.runtime.ray_client import ray_errors

from .batching import ReplicaLost
from .front import Front
from .gateway import Gateway
from .http import http_app
from .metrics import Metrics
from .tracing import Spans

REPLICA = "Replica"  # what the names of deployments with models begin with


class Ingress:
    """models: the (ServedModel, Limits, number of replicas) of each; access: who may use it.

    tracing: where spans are sent, if they are. families: for each model what the names of the applications with its
    replicas begin with, one for each time that it was loaded (`generation`); where there are none, handles: of
    deployments beside this one.
    """

    async def __init__(self, models, access, tracing=None, families=(), *handles):
        self._spans = tracing.spans() if tracing else Spans()
        self._metrics = Metrics(max(limits.batch for _, limits, _ in models))
        gateways = []
        for index, described in enumerate(models):
            if handles:
                gateways.append(self._gateway(handles[index], None, replicas_name(index), described))
                continue
            app = await asyncio.to_thread(_newest, families[index])
            gateways.append(
                await self._of_application(app, described if app == generation(families[index], 1) else None)
            )
        self.front = Front(gateways, self._metrics, access, self._spans)
        await self.front.start()

    async def up(self):
        """Called by the process that started the server: return once /health says that it is up."""
        await self.front.up()

    async def drain(self, seconds):
        """Called by the process that started the server: accept no more, and how many were not done in time."""
        return await self.front.drain(seconds)

    async def wish(self, seconds):
        """Called by the same: see Reloads.next."""
        return await self.front.reloads.next(seconds)

    async def tell(self, answer):
        """Called by the same: see Reloads.tell."""
        self.front.reloads.tell(answer)

    async def switch(self, index, app):
        """Called by the same: new requests for a model go to the replicas of an application, which are up."""
        await self.front.switch(index, await self._of_application(app))

    async def left(self):
        """Called by the same: how many requests the replicas before the last switches still have to answer."""
        return self.front.left()

    async def _of_application(self, app, described=None):
        """The Gateway over an application's replicas; they say what they draw where it was loaded after the start."""
        from ray import serve

        handle = await asyncio.to_thread(serve.get_deployment_handle, REPLICA, app)
        return self._gateway(handle, app, REPLICA, described or await handle.describe.remote())

    def _gateway(self, handle, app, deployment, described):
        served, limits, replicas = described
        send, pace = partial(_send, handle, self._spans), partial(_pace, handle)
        count: Callable = partial(_count, app, deployment)
        return Gateway(served, limits, replicas, send, count, pace, self._metrics, self._spans)


async def _pace(handle):
    try:
        return await handle.pace.remote()
    except ray_errors():
        return 0.0


async def _send(handle, spans, key, requests, show):
    """A batch's results from a replica that is idle. Raises ReplicaLost for all that is no fault of the batch."""
    from ray.exceptions import RayTaskError

    shows = any(request.previews for request in requests)
    if shows:
        response = handle.options(stream=True).draw_showing.remote(key, requests, spans.carrier())
    else:
        response = handle.draw.remote(key, requests, spans.carrier())
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


async def _count(app, deployment):
    """How many replicas pass Serve's health checks; None while its controller is away."""
    try:
        return await asyncio.to_thread(_running, app, deployment)
    except ray_errors():
        return None


def _running(app, deployment):
    from ray import serve

    found = serve.status().applications.get(app or serve.get_replica_context().app_name)
    return replicas_of(found, deployment) if found else 0


def replicas_name(index: int) -> str:
    """The name of the deployment with the replicas of a server's model, where all are in one application."""
    return f"{REPLICA}{index or ''}"


def generation(family: str, number: int) -> str:
    """The name of the application with a model's replicas as they were loaded the number-th time, from 1."""
    return f"{family}.{number}"


def replicas_of(app: Any, deployment: str) -> int:
    """How many replicas of a deployment are up. app: as Serve's status has it."""
    found = app.deployments.get(deployment)
    return found.replica_states.get("RUNNING", 0) if found else 0


def _newest(family):
    """The application of a model that was loaded last, of those whose replicas are up; if none are, the first.

    That a gateway which died is made anew over what it had.
    """
    from ray import serve

    numbers = {}
    for name, app in serve.status().applications.items():
        begin, _, number = name.rpartition(".")
        if begin == family and number.isdecimal():
            numbers[int(number)] = app.status == "RUNNING"
    up = [number for number, is_up in numbers.items() if is_up]
    return generation(family, max(up) if up else min(numbers, default=1))


def ingress_app() -> Any:
    """The HTTP application of the Ingress in this process."""
    return http_app(lambda: served_object().front, told_before=True)
