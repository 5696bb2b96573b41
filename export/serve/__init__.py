"""A pipeline behind HTTP, on Ray Serve: one gateway that queues, batches and retries, replicas that draw.

The gateway (`gateway.py`, a Serve ingress with one replica) holds every accepted request, groups their images by equal
settings (`batching.py`) and gives each batch to a replica that is idle. So the queue has one length, a batch is as full
as all requests together allow, and what a dead replica was drawing is still there to be given to another. A replica
(`replica.py`) only draws. `serving.py` is the way from a model's name to a server that is ready, and back.

Ray, FastAPI and prometheus_client are the extra [ray]; nothing here imports them before a server is started.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, nearest

if TYPE_CHECKING:
    from .serving import Server

__all__ = ["build_app", "serve"]


@contextmanager
def serve(*models: str, revision: str | None = None, **settings: Any) -> "Iterator[Server]":
    """Yield a Server of artifacts or pipelines (folders, or OWNER/NAME) whose replicas are all up; taken down after.

        with surgery.serve("out/shapes", port=8000, device="cpu") as server:
            server.config.url

    settings: the fields of ServerConfig (replicas, host, port, address, start_timeout), of Limits (max_batch, queue,
    timeout, ...), of Access (origins, proxies, log, ...) and of WorkerConfig (device, dtype, threads, engine,
    trust_engines, fallback, compile); api_key_file, admin_key_file, otel; served_model_name and lora
    ("NAME=FILE"), lists.
    Raises InputError for what cannot be served, SurgeryError where a replica does not start.
    """
    from .serving import server

    with server(_serving(models, revision, settings)) as up:
        yield up


def build_app(arguments: Mapping[str, Any]) -> Any:
    """The Ray Serve application, for a cluster that starts it itself: `serve run`, `serve build`, a RayService.

        serve run surgery.export.serve:build_app model=OWNER/NAME replicas=2 device=cuda

    arguments: "model", or "models" with commas between, "revision", and the settings of `serve` but host and port,
    which the cluster has; numbers may be text. Without device "cuda" replicas take a CPU each. Every node opens the
    model itself, so a folder must be there on each. Raises InputError for what cannot be served.
    """
    from .serving import application

    settings = dict(arguments)
    models = settings.pop("models", None) or settings.pop("model", "")
    models = [name.strip() for name in models.split(",")] if isinstance(models, str) else models
    if not all(models):
        raise InputError('build_app needs an argument "model": a folder, or OWNER/NAME')
    threads = int(settings.get("threads") or 1)
    serving = _serving(models, settings.pop("revision", None), settings, address="auto")
    return application(serving, serving.worker.device == "cuda", threads)


def _serving(models, revision, settings, **config):
    from dataclasses import fields

    from pydantic import TypeAdapter, ValidationError

    from surgery.runtime.worker import WorkerConfig

    from .access import Access, read_keys
    from .checking import Limits, ServerConfig, checked_models

    settings = {**settings, **config}
    names, loras = (
        [given] if isinstance(given := settings.pop(name, ()), str) else given for name in ("served_model_name", "lora")
    )
    otel = str(settings.pop("otel", False)).lower() in ("true", "1")
    for name, option in (("keys", "api_key_file"), ("admins", "admin_key_file")):
        if path := settings.pop(option, None):
            settings[name] = read_keys(path, f"--{option.replace('_', '-')}")
    parts = {}
    for kind in (ServerConfig, Limits, Access):
        given = {one.name: settings.pop(one.name) for one in fields(kind) if one.name in settings}
        try:
            parts[kind] = TypeAdapter(kind).validate_python(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{where}: {first['msg'].lower()}, not {first['input']!r}") from None
    known = {one.name for one in fields(WorkerConfig) if one.default is not MISSING}
    if unknown := sorted(set(settings) - known):
        every = [*known, *(one.name for kind in parts for one in fields(kind))]
        near = nearest(unknown[0], every, cutoff=0.6)
        raise InputError(f"there is no setting {unknown[0]}; {f'did you mean {near}?' if near else sorted(every)}")
    if settings.get("threads") is not None:
        settings["threads"] = int(settings["threads"])
    return checked_models(
        models, revision, parts[ServerConfig], parts[Limits], settings, parts[Access], names, loras, otel
    )
