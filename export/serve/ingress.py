"""The Serve ingress: a Front in a process of its own, whose batches go to the replicas through a deployment handle."""

import asyncio

from .batching import ReplicaLost
from .cluster import ray_errors
from .front import Front
from .http import http_app

REPLICA = "Replica"  # the name of the deployment


class Ingress:
    """What Ray Serve makes one of. served, limits, replicas: as Front's; handle: of the replicas' deployment."""

    async def __init__(self, served, limits, replicas, handle):
        self._handle = handle
        self.front = Front(served, limits, replicas, self._send, self._count)
        await self.front.start()

    async def drain(self, seconds):
        """As Front's; called by the process that started the server."""
        return await self.front.drain(seconds)

    async def _send(self, setting, pictures):
        """A batch's Drawns from a replica that is idle. Raises ReplicaLost for all that is no fault of the batch."""
        from ray.exceptions import RayTaskError

        response = self._handle.draw.remote(setting, pictures)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:  # raised by the replica's own code
            if isinstance(error.cause, ray_errors()):
                raise ReplicaLost(str(error.cause)) from error
            raise
        except ray_errors() as error:
            raise ReplicaLost(str(error)) from error

    async def _count(self):
        """How many replicas pass Serve's health checks; None while its controller is away."""
        try:
            return await asyncio.to_thread(_running)
        except ray_errors():
            return None


def build_app():
    """The HTTP application of the Ingress in this process."""
    from ray import serve

    return http_app(lambda: serve.get_replica_context().servable_object.front)


def _running():
    from ray import serve

    app = serve.status().applications.get(serve.get_replica_context().app_name)
    deployment = app.deployments.get(REPLICA) if app else None
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0
