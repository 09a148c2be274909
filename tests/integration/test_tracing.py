"""One request through all three services, and what its trace says of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from shared.broker.memory import MemoryBroker
from shared.broker.port import Message
from shared.names import HEADER_LENGTH, INFER_EXCHANGE, model_queue
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from tests.gateway_rig import running, until
from tests.traced_rig import BODY, Traced, traced

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{CLIENT}-01", "tracestate": "shop=cart7"}
NOT_SAMPLED = {"traceparent": f"00-{TRACE}-{CLIENT}-00"}


def parent(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def own(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


async def test_a_cold_request_is_one_trace_from_the_client_to_the_device_and_back(tmp_path):
    """Gateway, publishing, placing, processing, queue, batch and reply: each below what caused
    it, with the client's own span on top."""
    async with traced(tmp_path) as rig:
        rig.register("echo")
        assert (await rig.infer("echo", **SAMPLED)).status_code == 200
        await rig.settled("process roost.model.echo.1")
        assert {f"{span.context.trace_id:032x}" for span in rig.spans()} == {TRACE}
        serve, send = rig.span("POST /v2/models/{model}/infer"), rig.span("send roost.infer")
        place, process = rig.span("place"), rig.span("process roost.model.echo.1")
        queue, batch, reply = rig.span("queue"), rig.span("batch"), rig.span("send reply")
        assert len(rig.spans()) == 7
        assert parent(serve) == CLIENT
        assert parent(send) == own(serve)
        assert parent(place) == own(send)
        assert parent(process) == own(place)
        assert {parent(span) for span in (queue, batch, reply)} == {own(process)}
        kinds = [span.kind for span in (serve, send, place, process, reply)]
        assert kinds == [
            SpanKind.SERVER,
            SpanKind.PRODUCER,
            SpanKind.CONSUMER,
            SpanKind.CONSUMER,
            SpanKind.PRODUCER,
        ]
        assert process.context.trace_state.get("shop") == "cart7"
        assert serve.attributes["http.response.status_code"] == 200
        assert serve.attributes["roost.model.version"] == 1
        assert serve.attributes["roost.compute.seconds"] == pytest.approx(0.001)
        assert batch.attributes["roost.batch.rows"] == 1
        assert process.start_time <= queue.start_time + 1_000_000  # two clocks, read one by one
        assert queue.start_time <= queue.end_time == batch.start_time < batch.end_time
        assert batch.end_time - batch.start_time == pytest.approx(1_000_000, abs=1000)


async def test_a_request_without_a_trace_begins_one(tmp_path):
    """The gateway's span is then the root; and the placer is not on the way of a model in use."""
    async with traced(tmp_path) as rig:
        rig.register("echo")
        assert (await rig.infer("echo", **NOT_SAMPLED)).status_code == 200
        assert (await rig.infer("echo")).status_code == 200
        await rig.settled("process roost.model.echo.1")
        root = rig.span("POST /v2/models/{model}/infer")
        assert root.parent is None
        of_it = rig.spans(f"{root.context.trace_id:032x}")
        assert len(of_it) == len(rig.spans())  # of the first, nothing was kept: its client said so
        assert {span.name for span in of_it} >= {"process roost.model.echo.1", "batch"}


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{CLIENT}",
        f"00-{'0' * 32}-{CLIENT}-01",
        f"ff-{TRACE}-{CLIENT}-01",
    ],
)
async def test_a_malformed_traceparent_is_ignored(tmp_path, traceparent):
    """The request is served all the same, in a trace of its own."""
    async with traced(tmp_path) as rig:
        rig.register("echo")
        assert (await rig.infer("echo", traceparent=traceparent)).status_code == 200
        root = rig.span("POST /v2/models/{model}/infer")
        assert root.parent is None
        assert f"{root.context.trace_id:032x}" != TRACE


async def test_a_failure_is_told_where_it_happened(tmp_path):
    """A model that raises is an error of the processing and of the server; a request that does
    not suit its model is the client's own, and never leaves the gateway."""
    async with traced(tmp_path) as rig:
        rig.register("fail")
        bad = BODY.replace(b"2.0", b"-2.0")
        answer = await rig.http.post("/v2/models/fail/infer", content=bad)
        assert answer.status_code == 500
        await rig.settled("process roost.model.fail.1")
        process = rig.span("process roost.model.fail.1")
        serve = rig.span("POST /v2/models/{model}/infer")
        assert process.status.status_code is serve.status.status_code is StatusCode.ERROR
        assert process.attributes["error.type"] == serve.attributes["error.type"] == "model_failed"
        rig.exporter.clear()
        assert (await rig.http.post("/v2/models/fail/infer", content=b"{}")).status_code == 400
        (only,) = rig.spans()
        assert only.attributes["http.response.status_code"] == 400
        assert only.status.status_code is StatusCode.UNSET


async def test_requests_that_travel_in_one_message_keep_their_own_traces(tmp_path):
    """Packing is the gateway's way to save messages: in a trace it does not show."""
    async with traced(tmp_path) as rig:
        rig.register("echo")
        await rig.infer("echo")
        await rig.settled("process roost.model.echo.1")
        await until(lambda: rig.exchange.bindings.get("echo"))  # none passes the placer any more
        rig.exporter.clear()
        traces = [f"{n:032x}" for n in range(1, 17)]
        sent = [rig.infer("echo", traceparent=f"00-{trace}-{CLIENT}-01") for trace in traces]
        assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}
        await rig.settled("process roost.model.echo.1", 16)
        for trace in traces:
            serve, send, process = (
                rig.span(name, trace)
                for name in (
                    "POST /v2/models/{model}/infer",
                    "send roost.infer",
                    "process roost.model.echo.1",
                )
            )
            assert (parent(serve), parent(send), parent(process)) == (CLIENT, own(serve), own(send))
            assert send.end_time < serve.end_time  # at the broker's word, not at the answer


async def test_requests_of_one_batch_are_linked(tmp_path):
    """Producers on AMQP bring their traces along. Each has its own span of the batch, and the
    first's leads to the others' requests."""
    async with traced(tmp_path) as rig:
        rig.register("slow")
        await rig.infer("slow")
        await rig.settled("process roost.model.slow.1")
        rig.exporter.clear()
        rig.engine.gate.clear()
        broker = MemoryBroker(rig.exchange, "producer")
        await broker.start()
        await broker.declare_queue("roost.reply.producer")
        x = from_numpy("x", np.ones((1, 2), np.float32))
        body, length = encode_request(InferRequest(inputs=(x,), binary_default=True))
        traces = [f"{n:032x}" for n in range(1, 5)]
        for n, trace in enumerate(traces):
            headers = {HEADER_LENGTH: length, "traceparent": f"00-{trace}-{CLIENT}-01"}
            message = Message(
                body=body,
                headers=headers,
                reply_to="roost.reply.producer",
                correlation_id=f"p{n}",
            )
            await broker.publish(INFER_EXCHANGE, "slow", message)
        await until(lambda: all_taken(rig))
        rig.engine.gate.set()
        await rig.settled("process roost.model.slow.1", 4)
        batches = [rig.span("batch", trace) for trace in traces]
        together = max(span.attributes["roost.batch.requests"] for span in batches)
        assert together > 1
        shared = [s for s in batches if s.attributes["roost.batch.requests"] == together]
        first = max(shared, key=lambda span: len(span.links))
        linked = {f"{link.context.trace_id:032x}" for link in first.links}
        others = [span for span in shared if span is not first]
        assert linked == {f"{span.context.trace_id:032x}" for span in others}
        assert all(own_of(span.links[0]) == own(first) for span in others)
        await broker.close()


def all_taken(rig: Traced) -> bool:
    report = rig.state.reports["w0"][1]
    return any(model.held == 4 for model in report.models)


def own_of(link) -> str:
    return f"{link.context.span_id:016x}"


async def test_where_traces_are_off_a_client_s_trace_is_carried_on(tmp_path):
    """To producers of spans further on; malformed ones are not."""
    async with running(tmp_path) as rig:
        await rig.infer(headers=SAMPLED)
        await rig.infer(headers={"traceparent": "nonsense", "tracestate": "a=b"})
        first, second = (delivery.message.headers for delivery in rig.worker.seen)
        assert {key: first[key] for key in SAMPLED} == SAMPLED
        assert not SAMPLED.keys() & second.keys()
        assert rig.worker.seen[0].queue == model_queue("adder/1")
