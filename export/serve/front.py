"""What a server has beside its models' gateways: which model a request means, kept images, health and metrics."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .access import Access
from .answers import model_entry
from .gateway import Gateway
from .metrics import Metrics
from .refusal import Refusal
from .reloading import Reloads
from .request import no_such_model
from .store import Store
from .tracing import Spans


class Front:
    """The gateways of a server, the first of which has what names no model. access: who may use it, and from where."""

    def __init__(
        self,
        gateways: Sequence[Gateway],
        metrics: Metrics,
        access: Access | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.gateways, self.metrics, self.spans = list(gateways), metrics, spans or Spans()
        self._leaving = []  # gateways that finish what they have accepted
        self.reloads = Reloads()
        limits = gateways[0].limits
        self.access = access or Access(hosts=limits.hosts)
        self.store = Store(limits.keep_bytes, limits.keep_seconds)

    async def start(self) -> None:
        """Begin to watch the replicas."""
        for gateway in self.gateways:
            await gateway.start()

    async def up(self) -> None:
        """Return once each model has a replica that is up."""
        for gateway in self.gateways:
            await _up(gateway)

    async def reload(self, name: str) -> dict[str, Any]:
        """POST /v1/models/{name}/reload: what the model is then, or a Refusal."""
        self.model(name)
        (index,) = (at for at, gateway in enumerate(self.gateways) if name in gateway.served.names())
        return await self.reloads.ask(index)

    async def switch(self, index: int, gateway: Gateway) -> None:
        """Have a gateway take the place of another, which finishes what it has accepted, once a replica of it is up."""
        await gateway.start()
        await _up(gateway)
        before = self.gateways[index]
        gateway.draining = before.draining
        self.gateways[index] = gateway
        self._leaving.append(before)

    def left(self) -> int:
        """How many requests are with gateways whose place another has taken."""
        for gateway in [one for one in self._leaving if not one.held + one.open_requests]:
            gateway.stop()
            self._leaving.remove(gateway)
        return sum(gateway.held + gateway.open_requests for gateway in self._leaving)

    @contextmanager
    def using(self, model: object, is_video: bool) -> Iterator[Gateway]:
        """The gateway of a request; while this lasts, and then while it has accepted it, its replicas stay."""
        gateway = self.gateway(model, is_video)
        gateway.held += 1
        try:
            yield gateway
        finally:
            gateway.held -= 1

    def gateway(self, model: object, is_video: bool) -> Gateway:
        """That of a model's name, for None the first of the kind; Refusal for a name that is not here or of another."""
        found = next((one for one in self.gateways if one.served.is_video == is_video), self.gateways[0])
        if isinstance(model, str) and model:
            named = {name: gateway for gateway in self.gateways for name in gateway.served.names()}
            if model not in named:
                raise no_such_model(model, tuple(named))
            found = named[model]
        if found.served.is_video != is_video:
            kind = "videos" if found.served.is_video else "images"
            text = f"{found.served.names()[0]} draws {kind}: POST /v1/{kind}/generations"
            raise Refusal(404, text, "model_not_found", "model")
        return found

    def models(self) -> dict[str, Any]:
        """GET /v1/models: each name, in OpenAI's form, with what a request may set."""
        return {"object": "list", "data": list(self._entries().values())}

    def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/{name}; Refusal for one that is not here."""
        entries = self._entries()
        if name not in entries:
            raise no_such_model(name, tuple(entries))
        return entries[name]

    def _entries(self):
        return {
            name: model_entry(gateway.served, gateway.limits, name)
            for gateway in self.gateways
            for name in gateway.served.names()
        }

    def health(self) -> tuple[int, dict[str, Any]]:
        """(HTTP status, body): 200 while each model has a replica that is up and requests are accepted, else 503."""
        states = {gateway.served.names()[0]: gateway.status() for gateway in self.gateways}
        worst = next((state for state in states.values() if state != "ok"), "ok")
        body = {
            "status": worst,
            "replicas": sum(gateway.alive for gateway in self.gateways),
            "of": sum(gateway.meant for gateway in self.gateways),
            **({"models": states} if len(states) > 1 else {}),
        }
        return (200 if worst == "ok" else 503), body

    def metrics_text(self) -> tuple[bytes, str]:
        """(the content of /metrics as bytes, its content type)."""
        self.metrics.replicas.set(sum(gateway.alive for gateway in self.gateways))
        working = (*self.gateways, *self._leaving)
        self.metrics.in_flight.set(sum(gateway.open_requests for gateway in working))
        self.metrics.waiting.set(sum(gateway.dispatcher.waiting for gateway in working))
        self.metrics.drawing.set(sum(gateway.dispatcher.flying for gateway in working))
        self.metrics.kept.set(self.store.bytes)
        return self.metrics.text()

    async def drain(self, seconds: float) -> int:
        """Accept no more requests and wait for those that are accepted; returns how many were not done in time."""
        left = sum(await asyncio.gather(*(gateway.drain(seconds) for gateway in (*self.gateways, *self._leaving))))
        await asyncio.to_thread(self.spans.flush)
        return left


async def _up(gateway):
    while not gateway.alive:
        await asyncio.sleep(0.05)
