"""gRPC as other clients may use it: typed tensors, errors, limits, deadlines, health, the end."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from services.gateway.config import GatewayConfig
from services.gateway.grpc.server import GrpcServer
from shared.cancels import CancelledRequests
from shared.store.memory import MemoryStore
from shared.store.port import TOPIC_CANCELLED
from tests.gateway_rig import error_reply, reply_to, running, until
from tests.grpc_rig import ADDER, ARRAYS, Code, refused, running_grpc, same, trailing


@pytest.fixture
async def rig(tmp_path):
    async with running_grpc(tmp_path) as made:
        yield made


@pytest.fixture
async def channel(rig):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as made:
        yield made


@pytest.fixture
def stub(channel):
    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


async def test_typed_contents(rig, stub):
    """Elements in the message itself, of every datatype that has a place there."""
    fields = {
        "BOOL": "bool_contents", "UINT8": "uint_contents", "INT64": "int64_contents",
        "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
    }  # fmt: skip
    request = service_pb2.ModelInferRequest(model_name="echo")
    for name, field in fields.items():
        contents = service_pb2.InferTensorContents(**{field: ARRAYS[name].ravel().tolist()})
        request.inputs.add(name=name, datatype=name, shape=[1, 2], contents=contents)
    same(triton.InferResult(await stub.ModelInfer(request)), tuple(fields))


async def test_errors_have_a_status_a_code_and_a_time_to_come_back(rig, stub):
    """Of the gateway's refusals and of workers' alike; no retry is promised where none helps."""
    request = service_pb2.ModelInferRequest(model_name="absent")
    error = await refused(stub.ModelInfer(request))
    assert error.code() == Code.NOT_FOUND
    assert trailing(error) == {"roost-code": "not_found"}
    wrong = service_pb2.ModelInferRequest()
    wrong.CopyFrom(ADDER)
    wrong.inputs[0].shape[:] = [1, 4]
    error = await refused(stub.ModelInfer(wrong))
    assert error.code() == Code.INVALID_ARGUMENT
    assert "input 'x'" in error.details()
    error = await refused(stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="a/b")))
    assert error.code() == Code.INVALID_ARGUMENT

    for code, status, retryable in (
        ("model_failed", Code.INTERNAL, False),
        ("unavailable", Code.UNAVAILABLE, True),
        ("resource_exhausted", Code.RESOURCE_EXHAUSTED, True),
        ("quarantined", Code.FAILED_PRECONDITION, False),
    ):

        async def fail(worker, delivery, code=code, retryable=retryable):
            reply = error_reply(delivery, code, f"it is {code}", retryable=retryable)
            await worker.reply(delivery, reply)
            await delivery.ack()

        rig.worker.script = fail
        error = await refused(stub.ModelInfer(ADDER))
        assert (error.code(), error.details()) == (status, f"it is {code}")
        assert ("grpc-retry-pushback-ms" in trailing(error)) == retryable
    assert await rig.metric("roost_gateway_held_bytes") == 0


async def test_a_long_message_is_cut(rig, stub):
    """What a model says may be long; a client takes no more than some kilobytes."""

    async def fail(worker, delivery):
        await worker.reply(delivery, error_reply(delivery, "model_failed", "ä" * 20_000))
        await delivery.ack()

    rig.worker.script = fail
    error = await refused(stub.ModelInfer(ADDER))
    assert (error.code(), error.details()) == (Code.INTERNAL, "ä" * 1000)


async def test_answers_tell_what_http_tells_in_headers(rig, stub):
    """How long it waited, as trailing metadata."""
    rig.worker.script = lambda worker, delivery: worker.reply(delivery, reply_to(delivery))
    call = stub.ModelInfer(ADDER)
    answer = await call
    assert (answer.model_name, answer.id) == ("adder", "r1")
    assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [2, 3, 4]
    assert dict(await call.trailing_metadata())["roost-queue-us"] == "5"


async def test_a_request_without_a_message_and_one_that_is_rubbish(rig, channel):
    """Both are refused; the one that waits for its message, after a time."""
    infer = "/inference.GRPCInferenceService/ModelInfer"
    error = await refused(channel.unary_unary(infer)(b"\xff\xff\xff"))
    assert (error.code(), "ModelInferRequest" in error.details()) == (Code.INVALID_ARGUMENT, True)
    for method in ("ModelInfer", "ServerLive"):
        call = channel.stream_unary(f"/inference.GRPCInferenceService/{method}")()
        error = await refused(call)
        assert trailing(error) == {"roost-code": "request_timeout"}
        empty = channel.stream_unary(f"/inference.GRPCInferenceService/{method}")(iter(()))
        assert (await refused(empty)).code() == Code.INVALID_ARGUMENT
    error = await refused(channel.unary_unary("/inference.GRPCInferenceService/Wish")(b""))
    assert error.code() == Code.UNIMPLEMENTED


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_what_is_too_large_is_refused_unpacked(tmp_path, compression):
    """The limit is of the unpacked message; a client that tries again by itself is told not to."""
    limits = {"request_limit_bytes": 100_000, "load_limit_bytes": 100_000}
    async with (
        running(tmp_path, grpc_port=0, **limits) as rig,
        grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="adder", raw_input_contents=[b""])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        request.raw_input_contents[0] = b"\0" * 110_000
        error = await refused(stub.ModelInfer(request, compression=compression))
        assert error.code() == Code.RESOURCE_EXHAUSTED
        if compression == grpc.Compression.Gzip:  # else gRPC itself refuses it
            assert trailing(error) == {"roost-code": "too_large", "grpc-retry-pushback-ms": "-1"}
        assert rig.worker.seen == []
        assert await rig.metric("roost_gateway_held_bytes") == 0


async def test_bodies_that_find_no_room(tmp_path):
    """All that is held together is bounded, over gRPC too."""
    async with (
        running(tmp_path, grpc_port=0, inflight_bytes_limit=10) as rig,
        grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        error = await refused(stub.ModelInfer(ADDER))
        assert error.code() == Code.RESOURCE_EXHAUSTED
        assert trailing(error)["grpc-retry-pushback-ms"] == "1000"
        rejected = 'roost_gateway_rejected_total{reason="bytes_full"}'
        assert await rig.metric(rejected) == 1
        ready = service_pb2.ModelReadyRequest(name="adder" + " " * 20)  # longer than there is room
        assert (await refused(stub.ModelReady(ready))).code() == Code.INVALID_ARGUMENT
        assert (await stub.ServerReady(service_pb2.ServerReadyRequest())).ready


# --- deadlines, hanging up, the end --------------------------------------------------------


async def test_a_clients_deadline_is_the_requests(rig, stub):
    """The worker is told of it, and when it passes that is no hang-up."""
    rig.worker.script = lambda _, delivery: delivery.ack()
    error = await refused(stub.ModelInfer(ADDER, timeout=0.5))
    assert error.code() == Code.DEADLINE_EXCEEDED
    assert rig.worker.seen[0].message.expiration_ms <= 500

    async def counted():
        line = 'roost_gateway_requests_total{code="deadline_exceeded",model="adder",version="1"}'
        return await rig.metric(line) == 1

    await until(counted)


async def test_cancelling_a_call_tells_the_workers(rig, stub):
    """That request and no other."""
    rig.worker.script = lambda _, delivery: delivery.ack()
    told = CancelledRequests()

    async def listen():
        async for data in MemoryStore(rig.state).notes(TOPIC_CANCELLED):
            told.note(data, int(time.time() * 1000))

    listener = asyncio.create_task(listen())
    await until(lambda: rig.state.note_listeners)
    stayer, leaver = stub.ModelInfer(ADDER), stub.ModelInfer(ADDER)
    asking = [asyncio.ensure_future(each) for each in (stayer, leaver)]
    await until(lambda: len(rig.worker.seen) == 2)
    leaver.cancel()
    await until(lambda: len(told) == 1)
    assert await rig.metric("roost_gateway_in_flight_requests") == 1
    stayer.cancel()
    await until(lambda: len(told) == 2)
    await asyncio.gather(*asking, return_exceptions=True)
    listener.cancel()


async def test_the_gateway_answers_what_is_under_way_and_stops(tmp_path):
    """A call that came before the end gets its answer; the port is closed to others."""
    release = asyncio.Event()

    async def late(worker, delivery):
        await release.wait()
        await worker.reply(delivery, reply_to(delivery))
        await delivery.ack()

    async with running(tmp_path, grpc_port=0) as rig:
        rig.worker.script = late
        async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.grpc_port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
            call = stub.ModelInfer(ADDER)
            await until(lambda: rig.worker.seen)
            rig.stop.set()
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            release.set()
            assert (await call).id == "r1"
            assert (await watcher.code()) == Code.OK


async def test_a_port_that_is_taken_is_an_error(rig):
    """Two gateways do not share a port unseen."""
    with pytest.raises(OSError, match="cannot listen"):
        await GrpcServer(GatewayConfig(grpc_port=rig.grpc_port), []).start()


# --- health --------------------------------------------------------------------------------


async def test_health_follows_the_way_to_the_workers(rig, channel):
    """Of the server and of the inference service; there are no others."""
    stub = health_pb2_grpc.HealthStub(channel)
    said = health_pb2.HealthCheckResponse
    for service in ("", "inference.GRPCInferenceService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == said.SERVING
    unknown = health_pb2.HealthCheckRequest(service="wish")
    assert (await refused(stub.Check(unknown))).code() == Code.NOT_FOUND
    watching = stub.Watch(unknown)
    assert (await watching.read()).status == said.SERVICE_UNKNOWN
    watching.cancel()
    rig.gateway_broker.lose()
    inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def away():
        ready = (await inference.ServerReady(service_pb2.ServerReadyRequest())).ready
        status = (await stub.Check(health_pb2.HealthCheckRequest())).status
        return not ready and status == said.NOT_SERVING

    await until(away)
