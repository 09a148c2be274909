"""Targets: what travels in messages. The protocol's bodies, packs, gRPC, notes between services."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import numpy as np

from services.gateway.core.tally import Tallies, Tally
from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc.infer import _NESTED
from services.gateway.grpc.messages import infer_body, infer_response
from services.gateway.grpc.reading import parsed
from shared import cancels, control, packs
from shared.broker.port import Message
from shared.errors import InvalidRequest, RoostError, TooLarge
from shared.models import Footprint, ModelSpec, TensorSpec
from shared.names import ModelId
from shared.tensors import Tensor, check_bytes, from_numpy, split_bytes, split_rows, to_numpy
from shared.v2 import (
    DEFAULT,
    InferRequest,
    RequestedOutput,
    check_inputs,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    error_message,
    parse_header_length,
    raw_input_of,
)
from tests.fuzz.kit import sayable, target

SPECS = (
    ModelSpec(),
    ModelSpec(max_batch_size=4),
    ModelSpec(inputs=(TensorSpec("a", "INT16", (-1,)), TensorSpec("b", "BYTES", (2,)))),
    ModelSpec(inputs=(TensorSpec("a", "FP32", (-1, 2)),), max_batch_size=2),
)
_REQUEST = InferRequest(
    id="r",
    parameters={"timeout": 7, "tenant": "t", "priority": 1},
    inputs=(
        from_numpy("a", np.array([1, 2, 3], np.int16)),
        from_numpy("b", np.array(["x", "yz"])),
        from_numpy("c", np.array([[True, False]])),
        from_numpy("d", np.array([1.5, -2e30], np.float32)),
    ),
    outputs=(RequestedOutput("y", binary=True), RequestedOutput("z")),
)
_WORDS = (
    b'"binary_data_size":', b'"data":[', b'"shape":[', b'"datatype":"BYTES"', b'{"name":"a",',
    b'"parameters":{', b'"inputs":[', b'"outputs":[', b"\\u0000", b"\\ud800", b"null", b"true",
    b"FP16", b"BF16", b"BOOL", b"[[", b"]]", b"4294967296", b"0.5",
)  # fmt: skip


def _headed(body: bytes, length: int | None) -> bytes:
    """The header's length before the body, as these two targets take it."""
    return (0xFFFF if length is None else length).to_bytes(2, "big") + body


def _split(data: bytes) -> tuple[bytes, int | None]:
    length = int.from_bytes(data[:2], "big")
    return data[2:], None if length == 0xFFFF else length


@target(
    _headed(*encode_request(_REQUEST)),
    _headed(*encode_request(_REQUEST, binary=False)),
    _headed(bytes(8), 0),
    words=_WORDS,
)
def v2_request(data: bytes) -> None:
    """A request's body, against models of all kinds."""
    body, length = _split(data)
    for spec in SPECS:
        try:
            request = decode_request(body, length, raw_input=raw_input_of(spec))
            encode_request(request)
            check_inputs(request, spec)
        except (InvalidRequest, TooLarge) as error:
            sayable(error)
            continue
        for tensor in request.inputs:
            assert to_numpy(tensor).shape == tensor.shape


@target(
    _headed(*encode_response("m", 1, "r", _REQUEST.inputs, InferRequest(binary_default=True))),
    _headed(*encode_response("m", 1, "r", _REQUEST.inputs, InferRequest())),
    _headed(b'{"error": "no"}', None),
    words=_WORDS,
)
def v2_response(data: bytes) -> None:
    """A reply's body, over HTTP and over gRPC."""
    body, length = _split(data)
    error_message(body)
    try:
        response = decode_response(body, length)
        infer_response(body, length)
    except (InvalidRequest, TooLarge) as error:
        sayable(error)
        return
    request = InferRequest(binary_default=bool(body and body[-1] & 1))
    with contextlib.suppress(InvalidRequest, TooLarge):
        encode_response("m", 1, None, response.outputs, request)


@target(b"\2\3\0\0\0abc\0\0\0\0", b"\0", b"\3\xff\xff\xff\xffab")
def bytes_tensor(data: bytes) -> None:
    """BYTES elements, and rows of them."""
    count, framed = data[0] if data else 0, data[1:]
    with contextlib.suppress(InvalidRequest, ValueError, IndexError):
        check_bytes(framed, count)
        tensor = Tensor("x", "BYTES", (count,), framed)
        assert len(split_bytes(framed)) == count
        pieces = split_rows(tensor, [count // 2, count - count // 2])
        assert b"".join(piece.data for piece in pieces) == framed


def _pack_of(*bodies: bytes) -> bytes:
    messages = [
        Message(body=body, headers={"a": 1, "b": "x"}, correlation_id="c", reply_to="roost.reply.t")
        for body in bodies
    ]
    return packs.pack(messages).body


@target(_pack_of(b"one", b"two"), _pack_of(b"", b"\0" * 90, b"x"), words=(b"\x94\x03\xa1c",))
def pack(data: bytes) -> None:
    """The body of what calls itself a pack."""
    message = Message(body=data, content_type=packs.CONTENT_TYPE, reply_to="roost.reply.t")
    packs.count(message)
    try:
        found = packs.members(message)
    except packs.BadPack as error:
        sayable(error)
        return
    assert 1 <= len(found) <= packs.MAX_MEMBERS
    assert sum(len(member.body) for member in found) <= len(data)


_REPORT = control.Report(
    worker="w", incarnation="i", seq=1, at=1.5, device_kind="cpu", device_name="cpu",
    budget_bytes=100, used_bytes=10, measured_bytes=10, labels={"a": "b"},
    models=(
        control.ModelReport(
            model=ModelId("m/1"), tier="device", phase="ready", bound=True,
            footprint=Footprint(weights_bytes=10),
        ),
    ),
)  # fmt: skip
_ASSIGNMENT = control.Assignment(
    worker="w", fence=1, generation=2, models=(control.Assigned(ModelId("m/1"), "why"),)
)


@target(control.encode(_REPORT), words=(b"\xa6models", b"\xa4tier", b"\xa6labels"))
def report(data: bytes) -> None:
    """A worker's report in the store, as the placer and gateways read it."""
    with contextlib.suppress(ValueError, RecursionError):
        control.encode(control.decode_report(data))


@target(control.encode(_ASSIGNMENT), words=(b"\xa6models", b"\xa5fence"))
def assignment(data: bytes) -> None:
    """The placer's word in the store, as workers read it."""
    with contextlib.suppress(ValueError, RecursionError):
        control.encode(control.decode_assignment(data))


@target(msgspec.msgpack.encode(Tally(rows=1)))
def tally(data: bytes) -> None:
    """A gateway's counts of a model in the store."""
    Tallies().sum(ModelId("m/1"), [data, data])


@target(cancels.encode([cancels.Cancelled("a", 5), cancels.Cancelled("b", 7)]))
def cancel(data: bytes) -> None:
    """A note of requests that nobody awaits."""
    told = cancels.CancelledRequests()
    for now_ms in (0, 10**12):
        told.note(data, now_ms)
    assert len(told) <= 100_000


def _grpc_request(*, raw: bool) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="a", datatype="FP32", shape=[1, 2])
    if not raw:
        tensor.contents.fp32_contents.extend([1, 2])
    request = pb.ModelInferRequest(
        model_name="m", id="r", inputs=[tensor],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="y")],
        raw_input_contents=[bytes(8)] if raw else [],
    )  # fmt: skip
    request.parameters["k"].string_param = "v"
    texts = request.inputs.add(name="b", datatype="BYTES", shape=[2])
    if raw:
        request.raw_input_contents.append(b"\1\0\0\0a\1\0\0\0b")
    else:
        texts.contents.bytes_contents.extend([b"a", b"b"])
    return bytes(request.SerializeToString())


@target(
    _grpc_request(raw=True), _grpc_request(raw=False), b"\xa3\6\xa4\6" + b"\x2a\0" * 40,
    words=(b"\x2a\x02\x0a\0", b"\x3a\x02ab", b"\xa3\6", b"\xa4\6", b"\x1a\x01\xff"),
)  # fmt: skip
def grpc_request(data: bytes) -> None:
    """A gRPC message of inference, into v2 bytes and through their decoder."""
    with contextlib.suppress(RoostError):
        message = parsed(pb.ModelInferRequest, data, _NESTED)
        body, length = infer_body(message, DEFAULT)
        decode_request(body, length)


def _header_values() -> list[Any]:
    return [None, 0, -1, True, 2**70, "12", b"7", "é", [], {}]


@target(b"12", b"0", b"999999999999", b"-1")
def header_length(data: bytes) -> None:
    """The header that says where the JSON ends."""
    for value in (data, data.decode("latin-1"), *_header_values()):
        with contextlib.suppress(InvalidRequest):
            parsed_length = parse_header_length(value)
            assert parsed_length is None or parsed_length >= 0
