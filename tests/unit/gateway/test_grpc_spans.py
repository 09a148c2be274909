"""The server's span of a call over gRPC."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.gateway.body import ClientGone
from services.gateway.grpc.spans import serving_call, told
from shared.errors import InvalidRequest, Unavailable
from shared.tracing import Tracing

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def traced():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


def test_a_call_continues_the_clients_trace(traced):
    """And says what it was, and how it ended."""
    tracing, exporter = traced
    with serving_call(tracing, {b"traceparent": PARENT}) as span:
        told(span, "ok")
    (ended,) = exporter.get_finished_spans()
    assert ended.name == "inference.GRPCInferenceService/ModelInfer"
    assert f"{ended.context.trace_id:032x}".encode() in PARENT
    assert ended.attributes["rpc.method"] == "ModelInfer"
    assert ended.attributes["rpc.grpc.status_code"] == 0
    assert ended.status.is_unset


@pytest.mark.parametrize(
    ("error", "number", "failed"),
    [(InvalidRequest("x"), 3, False), (Unavailable("x"), 14, True), (ClientGone(), None, True)],
)
def test_calls_that_end_badly(traced, error, number, failed):
    """Only what is the server's fault, or nobody hears, is an error of the span's."""
    tracing, exporter = traced
    with pytest.raises(type(error)), serving_call(tracing, {}):
        raise error
    (ended,) = exporter.get_finished_spans()
    assert ended.attributes.get("rpc.grpc.status_code") == number
    assert ended.status.is_unset != failed
