"""Spans of OpenTelemetry: a request, its time in the queue, the batch it was in, and the drawing in the replica.

The package is imported where spans are sent alone; OTEL_... in the environment say where to, as everywhere.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError

if TYPE_CHECKING:
    from .request import BatchKey

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_DELAY = "200"  # milliseconds until spans are sent: a replica may be ended soon after


@dataclass(frozen=True)
class Tracing:
    """That spans are sent. environment: OTEL_... of the process that started the server, which others may not have."""

    environment: tuple[tuple[str, str], ...] = ()

    def spans(self) -> "Spans":
        """The Spans of this process, sent by OTLP over HTTP."""
        from opentelemetry.exporter.otlp.proto.http import trace_exporter  # pyright: ignore[reportMissingImports]
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        os.environ.update(self.environment)
        os.environ.setdefault("OTEL_SERVICE_NAME", "surgery")
        os.environ.setdefault("OTEL_BSP_SCHEDULE_DELAY", _DELAY)
        provider = TracerProvider(resource=Resource.create())
        provider.add_span_processor(BatchSpanProcessor(trace_exporter.OTLPSpanExporter()))
        return Spans(provider)


def tracing_of(wanted: bool, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Tracing where it is wanted, or the environment names a collector; else None.

    Raises InputError where it is wanted and cannot be; where the environment alone asks for it a warning is printed.
    """
    named = any(environment.get(name) for name in _ENDPOINTS) and environment.get("OTEL_TRACES_EXPORTER") != "none"
    if not wanted and (not named or environment.get("OTEL_SDK_DISABLED", "").lower() == "true"):
        return None
    reason = None
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        reason = f"traces are sent by {_PROTOCOL} alone, to port 4318 as a rule, not by {protocol}"
    elif not _is_there("opentelemetry.exporter.otlp.proto.http") or not _is_there("opentelemetry.sdk"):
        reason = "traces need OpenTelemetry's exporter: pip install 'pladis-surgery[otel]'"
    if reason and wanted:
        raise InputError(f"--otel: {reason}")
    if reason:
        print(f"surgery serve: no traces are sent, though OTEL_... ask for them: {reason}", file=sys.stderr)
        return None
    return Tracing(tuple((name, value) for name, value in environment.items() if name.startswith("OTEL_")))


def _is_there(package):
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


class Spans:
    """Spans of a provider of OpenTelemetry's; without one nothing is done."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = provider and provider.get_tracer("surgery")

    @contextmanager
    def request(self, headers: Mapping[str, str], told: dict[str, Any]) -> Iterator[Any]:
        """The span of a request, a child of its traceparent; what it draws is below. told: gets its trace_id."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry import trace

        parent = _propagator().extract(headers)
        with self._tracer.start_as_current_span("request", parent, trace.SpanKind.SERVER) as span:
            told["trace_id"] = trace.format_trace_id(span.get_span_context().trace_id)
            yield span

    @staticmethod
    def end_request(span: Any, scope: Mapping[str, Any], status: int, told: Mapping[str, Any]) -> None:
        """Say of a request's span what it was and how it was answered. told: as the log has it."""
        if span is None:
            return
        from opentelemetry.trace import StatusCode

        path = getattr(scope.get("route"), "path", None)
        span.update_name(f"{scope['method']} {path}" if path else scope["method"])
        client = scope.get("client")
        said = {
            "http.request.method": scope["method"],
            "http.response.status_code": status,
            "http.route": path,
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "client.address": client[0] if client else None,
            **{f"surgery.{name}": value for name, value in told.items() if name != "trace_id"},
        }
        span.set_attributes({name: value for name, value in said.items() if value is not None})
        if status >= 500:
            span.set_status(StatusCode.ERROR)

    def now(self) -> tuple[Any, int] | None:
        """(what is the parent of spans now, when that is in ns); None without a provider."""
        if self._tracer is None:
            return None
        from opentelemetry import context

        return context.get_current(), time.time_ns()

    @contextmanager
    def batch(self, key: "BatchKey", queued: Sequence[tuple[Any, int] | None]) -> Iterator[None]:
        """While a batch is with a replica: its span, below the first image's request and linked to the others'.

        queued: for each image what `now` was; the time since is a span `queue` of each request.
        """
        if self._tracer is None:
            yield
            return
        from opentelemetry import trace

        requests = {id(parent): (parent, since) for parent, since in filter(None, queued)}
        for parent, since in requests.values():
            self._tracer.start_span("queue", parent, start_time=since).end()
        (first, _), *others = requests.values()
        links = [trace.Link(trace.get_current_span(parent).get_span_context()) for parent, _ in others]
        with self._tracer.start_as_current_span("batch", first, attributes=_attributes(key, len(queued)), links=links):
            yield

    def carrier(self) -> dict[str, str] | None:
        """The span that is open now, as another process takes it."""
        if self._tracer is None:
            return None
        carrier = {}
        _propagator().inject(carrier)
        return carrier

    @contextmanager
    def draw(self, carrier: Mapping[str, str] | None, key: "BatchKey", images: int) -> Iterator[None]:
        """While a replica draws; carrier: of the batch."""
        if self._tracer is None:
            yield
            return
        parent = _propagator().extract(carrier or {})
        with self._tracer.start_as_current_span("draw", parent, attributes=_attributes(key, images)):
            yield

    def flush(self) -> None:
        """Send what was not sent yet, for at most two seconds."""
        if self._provider is not None:
            self._provider.force_flush(2000)


def _propagator():
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _attributes(key, images):
    told = {"steps": len(key.timesteps or ()) or key.steps, "width": key.width, "height": key.height}
    told = {name: value for name, value in told.items() if value is not None}
    return {f"surgery.{name}": value for name, value in {"images": images, **told}.items()}
