"""Traces are off unless asked for, and cost nobody a request."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.gateway.config import GatewayConfig
from shared.config import ConfigError, load
from shared.tracing import Tracing, current, open_tracing, serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider)


@pytest.fixture
def variables(monkeypatch):
    """Sets these, and no others of OpenTelemetry's are set."""

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_off_is_the_default_and_imports_nothing():
    """A service without traces does not pay for OpenTelemetry's import, nor needs it installed."""
    code = (
        "import sys; import services.gateway.app, services.placer.app, services.worker.app;"
        "from shared.tracing import open_tracing;"
        "assert open_tracing(on=False, service='x', instance='y') is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_it_is_switched_on_for_all_services_by_one_variable():
    """Beside the standard ones, which the settings leave alone."""
    environ = {"ROOST_TRACING": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert load(GatewayConfig, "gateway", environ).tracing is True
    assert load(GatewayConfig, "gateway", {}).tracing is False


@pytest.mark.parametrize(
    ("named", "name"),
    [
        ({}, "roost-worker"),
        ({"OTEL_SERVICE_NAME": "ours"}, "ours"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs"}, "theirs"),
    ],
)
def test_a_service_names_itself_unless_the_environment_does(variables, named, name):
    """And always tells which instance it is."""
    variables(OTEL_TRACES_EXPORTER="none", **named)
    tracing = open_tracing(on=True, service="worker", instance="w7")
    assert tracing is not None
    told = tracing._provider.resource.attributes
    assert (told["service.name"], told["service.instance.id"]) == (name, "w7")


@pytest.mark.parametrize(
    "wrong",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
    ],
)
def test_what_there_is_no_exporter_for_is_said_at_the_start(variables, wrong):
    """In one line that names the variable."""
    variables(**wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        open_tracing(on=True, service="worker", instance="w7")


HELD_UP = """
import time
from shared.tracing import open_tracing
tracing = open_tracing(on=True, service="gateway", instance="g")
began = time.monotonic()
for _ in range(2000):
    tracing.begin("x", "internal", None, {}).end()
spans_s = time.monotonic() - began
began = time.monotonic()
tracing.close()
print(spans_s, time.monotonic() - began)
"""


def test_a_collector_that_never_answers_holds_up_neither_requests_nor_the_end():
    """It takes connections and says nothing. Spans beyond the queue are dropped. In a process of
    its own: what the exporter still tries when it is given up ends with the process."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = os.environ | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "10",
            "OTEL_BSP_MAX_QUEUE_SIZE": "64",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "16",
        }
        done = subprocess.run(
            [sys.executable, "-c", HELD_UP],
            env=environ, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spans_s, close_s = map(float, done.stdout.split())
    assert spans_s < 5  # some 20 ms, but for this machine's moods
    assert close_s < 9


@pytest.mark.parametrize("traceparent", [None, 7, b"x", "", "00-xyz", f"00-{TRACE}-{PARENT}"])
def test_headers_that_name_no_trace_begin_a_new_one(tracing, exporter, traceparent):
    """Whatever a producer wrote there."""
    tracing.begin("x", "consumer", {"traceparent": traceparent}, {}).end()
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_a_trace_is_carried_on_by_headers(tracing, exporter):
    """With its state."""
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}
    span = tracing.begin("x", "consumer", headers, {})
    told = span.headers()
    span.end()
    (ended,) = exporter.get_finished_spans()
    assert told == {
        "traceparent": f"00-{TRACE}-{ended.context.span_id:016x}-01",
        "tracestate": "a=b",
    }
    assert f"{ended.parent.span_id:016x}" == PARENT


def test_an_ended_span_is_not_touched_again(tracing, exporter):
    """Several parts may hold it: the first end counts, in silence."""
    span = tracing.begin("x", "internal", None, {}, at=10.0)
    span.end(12.0)
    span.set({"late": True})
    span.fail("internal", "late")
    span.end(99.0)
    (ended,) = exporter.get_finished_spans()
    assert (ended.start_time, ended.end_time) == (10_000_000_000, 12_000_000_000)
    assert not ended.attributes
    assert not span.recording


def test_the_current_span_is_that_of_the_block(tracing, exporter):
    """And ends with it, also when it raises."""
    span = tracing.begin("x", "server", None, {})

    def served() -> None:
        with serving(span):
            assert current() is span
            raise KeyError

    with pytest.raises(KeyError):
        served()
    assert current() is None
    assert len(exporter.get_finished_spans()) == 1
