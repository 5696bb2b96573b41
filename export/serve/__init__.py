"""A pipeline behind HTTP, on Ray Serve: one gateway that queues, batches and retries, replicas that draw.

The gateway (`gateway.py`, a Serve ingress with one replica) holds every accepted request, groups their images by equal
settings (`batching.py`) and gives each batch to a replica that is idle. So the queue has one length, a batch is as full
as all requests together allow, and what a dead replica was drawing is still there to be given to another. A replica
(`replica.py`) only draws. `serving.py` is the way from a model's name to a server that is ready, and back.

Ray, FastAPI and prometheus_client are the extra [ray]; nothing here imports them before a server is started.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .serving import Server

__all__ = ["serve"]


@contextmanager
def serve(model: str, *, revision: str | None = None, **settings: Any) -> "Iterator[Server]":
    """Yield a Server of an artifact or pipeline (a folder, or OWNER/NAME) whose replicas are all up; taken down after.

        with surgery.serve("out/shapes", port=8000, device="cpu") as server:
            server.config.url

    settings: the fields of ServerConfig (replicas, host, port, address, start_timeout), of Limits (max_batch, queue,
    timeout, ...), and of WorkerConfig (device, dtype, threads, engine, trust_engines, fallback, compile).
    Raises InputError for what cannot be served, SurgeryError where a replica does not start.
    """
    from dataclasses import fields

    from .checking import Limits, ServerConfig, checked
    from .serving import server

    def taken(of):
        return {field.name: settings.pop(field.name) for field in fields(of) if field.name in settings}

    config, limits = ServerConfig(**taken(ServerConfig)), Limits(**taken(Limits))
    with server(checked(model, revision, config, limits, settings)) as up:
        yield up
