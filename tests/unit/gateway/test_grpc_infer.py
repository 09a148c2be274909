"""One call over gRPC without a server: what is held of it, and how its end is told."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("grpc")

from services.gateway.body import ClientGone, Held
from services.gateway.callers import asked_by
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc.infer import GrpcInference, Watched
from services.gateway.infer import Replied
from services.gateway.metrics import Metrics
from shared import v2
from shared.auth import Caller
from shared.broker.port import Message
from shared.errors import DeadlineExceeded
from shared.names import HEADER_LENGTH
from shared.tensors import Tensor

REQUEST = pb.ModelInferRequest(
    model_name="m",
    model_version="latest",
    inputs=[{"name": "x", "datatype": "UINT8", "shape": [50_000]}],
    raw_input_contents=[bytes(50_000)],
).SerializeToString()


class Call:
    """As a server hands it to a method."""

    def __init__(self, remaining_s=None, metadata=()):
        self.remaining_s = remaining_s
        self.metadata = metadata
        self.done = []

    async def read(self):
        return REQUEST

    def time_remaining(self):
        return self.remaining_s

    def invocation_metadata(self):
        return self.metadata

    def set_trailing_metadata(self, metadata):
        self.trailing = metadata

    def add_done_callback(self, callback):
        self.done.append(callback)


class Answering:
    """In the place of `Inference`: reads, and answers with so many bytes."""

    def __init__(self, admission, size):
        self._admission = admission
        self._size = size
        self.held = {}

    async def answer(self, asked):
        held = Held(self._admission)
        self.held["received"] = self._admission.held_bytes
        self.asked = asked
        self.read = await asked.read(None, held)
        self.held["read"] = self._admission.held_bytes
        held.release()
        tensor = Tensor("y", "UINT8", (self._size,), bytes(self._size))
        body, length = v2.encode_response("m", 1, None, [tensor], self.read.request)
        return Replied(Message(body=body, headers={HEADER_LENGTH: length}), "ok")


@pytest.mark.parametrize(("size", "kept"), [(1000, False), (100_000, True)])
async def test_what_is_held_of_a_call(size, kept):
    """The message until it was read, then the body; a large answer until it was taken."""
    admission = Admission(10, 1_000_000)
    inference = Answering(admission, size)
    grpc_inference = GrpcInference(GatewayConfig(), inference, admission, Metrics())
    call = Call()
    answer = await grpc_inference.answer(call, "c1")
    assert inference.held["received"] == len(REQUEST)
    assert inference.held["read"] == len(inference.read.body)
    assert (admission.held_bytes == len(answer)) == kept
    for callback in call.done:
        callback(call)
    assert admission.held_bytes == 0


async def test_what_metadata_and_deadline_say():
    """As headers do over HTTP."""
    admission = Admission(10, 1_000_000)
    inference = Answering(admission, 1)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (
        ("traceparent", parent), ("roost-split-key", "k"), ("a-bin", b"\xff"),
    )  # fmt: skip
    with asked_by(Caller("acme")):
        answering = GrpcInference(GatewayConfig(), inference, admission, Metrics())
        await answering.answer(Call(2.5, metadata), "c1")
    read, asked = inference.read, inference.asked
    assert (asked.name, asked.version, asked.split_key) == ("m", "latest", "k")
    assert (asked.tenant, read.traceparent, read.remaining_s) == ("acme", parent, 2.5)


@pytest.mark.parametrize(
    ("remaining_s", "kind"), [(None, ClientGone), (3.0, ClientGone), (0.0, DeadlineExceeded)]
)
async def test_what_a_cancelled_call_means(remaining_s, kind):
    """The client has gone, unless its time is up."""

    async def waiting():
        async with Watched(Call(remaining_s)):
            await asyncio.Event().wait()

    task = asyncio.create_task(waiting())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(kind):
        await task
