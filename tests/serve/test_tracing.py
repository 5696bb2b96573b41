"""Spans of OpenTelemetry: from a request's to the replica's, as a collector gets them."""

import asyncio
import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from surgery.errors import InputError
from surgery.export.serve.access import Access
from surgery.export.serve.batching import ReplicaLost
from surgery.export.serve.checking import Limits
from surgery.export.serve.replica import Replica as RealReplica
from surgery.export.serve.request import BatchKey
from surgery.export.serve.tracing import Spans, Tracing, tracing_of
from surgery.runtime.worker import ImageRequest, WorkerConfig

from .test_gateway import Replica, call, running, until, waiting

trace = pytest.importorskip("opentelemetry.sdk.trace")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def sent():
    """(Spans, a function that has the spans that were ended, in order)."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Spans(provider), exporter.get_finished_spans


def named(spans, name):
    return [span for span in spans if span.name == name]


def test_a_request_its_wait_and_its_batch_are_one_trace_below_the_callers(sent, tmp_path):
    spans, ended = sent
    log = tmp_path / "log"
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine-1"}
    with running(Replica(), spans=spans, access=Access(log=str(log)), max_batch=4) as (url, _, _):
        assert call(url, headers=headers, prompt="a secret", n=2, seed=5, steps=3)[0] == 200
        call(url, "/metrics")
        until(lambda: len(ended()) >= 3)
        assert call(url, headers=headers, prompt=" ")[0] == 400
        until(lambda: len(ended()) == 4)
    queue, batch, request, refused = ended()
    assert (queue.name, batch.name, request.name) == ("queue", "batch", "POST /v1/images/generations")
    assert {f"{span.context.trace_id:032x}" for span in ended()} == {TRACE}
    assert f"{request.parent.span_id:016x}" == PARENT and request.kind.name == "SERVER"
    assert queue.parent.span_id == batch.parent.span_id == request.context.span_id
    assert request.start_time <= queue.start_time <= queue.end_time <= batch.start_time <= batch.end_time
    told = dict(request.attributes)
    assert told["surgery.request_id"] == "mine-1" and told["http.response.status_code"] == 200
    assert (told["surgery.model"], told["surgery.n"], told["surgery.seed"]) == ("shapes-pladis", 2, 5)
    assert (batch.attributes["surgery.images"], batch.attributes["surgery.steps"]) == (2, 3)
    assert not any("secret" in str(span.to_json()) for span in ended())
    assert refused.attributes["http.response.status_code"] == 400 and refused.status.status_code.name == "UNSET"
    lines = map(json.loads, log.read_text().splitlines())
    assert [line["trace_id"] for line in lines if line["method"] == "POST"] == [TRACE] * 2


def test_with_log_prompts_the_prompt_is_there(sent):
    spans, ended = sent
    with running(Replica(), spans=spans, access=Access(log_prompts=True, traced=True)) as (url, _, _):
        call(url, prompt="a secret")
        until(lambda: named(ended(), "POST /v1/images/generations"))
    assert ended()[-1].attributes["surgery.prompt"] == "a secret"


def test_a_batch_of_several_requests_is_below_the_first_and_linked_to_the_others(sent):
    spans, ended = sent
    with running(Replica(), spans=spans, max_batch=2, batch_wait=5.0) as (url, _, _):
        with waiting(url, {"prompt": "a"}, {"prompt": "b"}) as answers:
            pass
        assert [answer[0] for answer in answers] == [200, 200]
        until(lambda: len(ended()) == 5)
    (batch,) = named(ended(), "batch")
    requests = {span.context.span_id for span in named(ended(), "POST /v1/images/generations")}
    assert {batch.parent.span_id, *(link.context.span_id for link in batch.links)} == requests
    assert {span.parent.span_id for span in named(ended(), "queue")} == requests


def test_a_batch_whose_replica_died_is_an_error_and_the_next_try_another_span(sent):
    spans, ended = sent
    replica = Replica()
    send, died = replica.send, []

    async def dying(*batch):
        if not died:
            died.append(True)
            raise ReplicaLost("killed")
        return await send(*batch)

    replica.send = dying
    with running(replica, spans=spans) as (url, _, _):
        assert call(url, prompt="a")[0] == 200
        until(lambda: len(ended()) == 5)
    assert [span.status.status_code.name for span in named(ended(), "batch")] == ["ERROR", "UNSET"]


def test_without_a_provider_nothing_is_told():
    with running(Replica(), spans=Spans()) as (url, _, _):
        assert call(url, prompt="a")[0] == 200
    assert Spans().carrier() is None


@contextmanager
def collector():
    """(its address, the spans that it was sent) of a collector of OTLP over HTTP."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            sent = service.ExportTraceServiceRequest.FromString(body)
            for resource in sent.resource_spans:
                name = {one.key: one.value.string_value for one in resource.resource.attributes}["service.name"]
                spans.extend((name, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        thread.join()


class Runner:
    """Draws at once."""

    def __init__(self, config, warm, max_batch):
        pass

    def draw(self, key, requests, stopped, show):
        return requests


def test_a_replica_sends_its_span_to_the_collector_below_the_batchs(sent, monkeypatch):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    spans, ended = sent
    for name in ("OTEL_SERVICE_NAME", "OTEL_BSP_SCHEDULE_DELAY", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.setenv(name, "")  # put back what was there
        monkeypatch.delenv(name)
    key, request = BatchKey(steps=3), ImageRequest("a secret", 1)
    with collector() as (url, got):
        tracing = Tracing((("OTEL_EXPORTER_OTLP_ENDPOINT", url), ("OTEL_SERVICE_NAME", "images")))
        described = None, Limits(max_batch=1), 1
        replica = RealReplica(WorkerConfig("a", None, None), BatchKey(), described, Runner, tracing)
        with spans.request({}, {}), spans.batch(key, [spans.now()]):
            assert asyncio.run(replica.draw(key, [request], spans.carrier())) == [request]
        until(lambda: got)
    ((service, span),) = got
    (batch,) = named(ended(), "batch")
    assert (service, span.name) == ("images", "draw") and b"secret" not in span.SerializeToString()
    assert span.parent_span_id.hex() == f"{batch.context.span_id:016x}"
    assert span.trace_id.hex() == f"{batch.context.trace_id:032x}"


def test_the_environment_or_the_option_asks_for_traces():
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    there = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "HOME": "/"}
    assert tracing_of(False, {}) is None
    assert tracing_of(True, {}) == Tracing()
    assert tracing_of(False, there).environment == (("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318"),)
    assert tracing_of(False, {**there, "OTEL_SDK_DISABLED": "true"}) is None
    assert tracing_of(False, {**there, "OTEL_TRACES_EXPORTER": "none"}) is None


@pytest.mark.parametrize("case", ["no package", "grpc"])
def test_what_cannot_be_sent_is_an_error_if_it_is_asked_for_and_else_a_warning(monkeypatch, capsys, case):
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}
    if case == "grpc":
        environment["OTEL_EXPORTER_OTLP_PROTOCOL"], words = "grpc", "by http/protobuf alone, .* not by grpc"
    else:
        import importlib.util

        from surgery.export.serve import tracing

        def find(name, *rest):
            return None if name.startswith("opentelemetry.exporter") else importlib.util.find_spec(name, *rest)

        monkeypatch.setattr(tracing, "find_spec", find)
        words = r"pip install 'pladis-surgery\[otel\]'"
    with pytest.raises(InputError, match=f"--otel: .*{words}"):
        tracing_of(True, environment)
    assert tracing_of(False, environment) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "no traces are sent, though OTEL_" in line
