"""Traces of a real stack, as a collector receives them."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.e2e.running import Up, save_doubler
from tests.e2e.steady import until

TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: dict[bytes, tuple[str, str, bytes, bytes]] = {}
        """Service, name, parent and trace by the span's id."""

    def names(self) -> set[tuple[str, str]]:
        return {(service, name) for service, name, *_ in list(self.spans.values())}


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            said = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found = (said["service.name"], span.name, span.parent_span_id, span.trace_id)
                    self.server.spans[span.span_id] = found
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def traced(tmp_path, collector, monkeypatch) -> Iterator[Up]:
    """A stack of its own, with the collector in the environment of whoever starts it."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    url = f"http://127.0.0.1:{collector.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    stack = Up(
        tmp_path / "data", "--workers", "1", "--budget", "512MiB", "--device", "cpu",
        "--set", "ROOST_TRACING=1",
    )  # fmt: skip
    try:
        stack.wait_ready()
        stack.roost("push", "doubler", str(save_doubler(tmp_path)))
        yield stack
    finally:
        stack.stop()


def test_a_collector_gets_one_trace_from_all_three_services(traced, collector):
    """Through RabbitMQ and three processes, with one unbroken line of parents from the device's
    batch up to the client."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
    answer = httpx.post(
        f"{traced.url}/v2/models/doubler/infer",
        json=body,
        headers={"traceparent": f"00-{TRACE}-{CLIENT}-01"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    expected = {
        ("roost-gateway", "POST /v2/models/{model}/infer"),
        ("roost-gateway", "send roost.infer"),
        ("roost-placer", "place"),
        ("roost-worker", "process roost.model.doubler.1"),
        ("roost-worker", "batch"),
        ("roost-worker", "send reply"),
    }
    until(lambda: expected <= collector.names(), "every service has sent its spans")
    assert {trace.hex() for *_, trace in collector.spans.values()} == {TRACE}
    (at,) = [id_ for id_, span in collector.spans.items() if span[1] == "batch"]
    line = []
    while at in collector.spans:
        _, name, at, _ = collector.spans[at]
        line.append(name)
    assert line == [
        "batch",
        "process roost.model.doubler.1",
        "place",
        "send roost.infer",
        "POST /v2/models/{model}/infer",
    ]
    assert at.hex() == CLIENT
