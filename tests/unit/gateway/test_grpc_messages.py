"""Protobuf messages into v2 bytes and back, and what is done against messages that mean ill."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("grpc")

from services.gateway.body import Held
from services.gateway.core.admission import Admission
from services.gateway.grpc import inference_pb2 as pb
from services.gateway.grpc.messages import infer_body, infer_response
from services.gateway.grpc.reading import NoMessage, parsed, receive
from services.gateway.grpc.statuses import STATUS
from shared import errors, v2
from shared.errors import InvalidRequest, TooLarge
from shared.tensors import Tensor, to_numpy

ROOT = Path(__file__).parents[3]
LIMITS = v2.Limits(body_bytes=1000, json_elements=100)


def request(raw=None, contents=None, datatype="FP32", shape=(2,), **options):
    tensor = {"name": "x", "datatype": datatype, "shape": shape}
    if contents is not None:
        tensor["contents"] = contents
    raw_contents = [] if raw is None else [raw]
    return pb.ModelInferRequest(
        model_name="m", inputs=[tensor], raw_input_contents=raw_contents, **options
    )


def changed(changes):
    """A whole request with some bytes replaced."""
    data = bytearray(WHOLE)
    for at, byte in changes:
        data[at] = byte
    return bytes(data)


def read(message, limits=LIMITS):
    return v2.decode_request(*infer_body(message, limits), limits)


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT16", "int_contents", [-(2**15), 2**15 - 1]),
        ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
        ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT16", "uint_contents", [0, 2**16 - 1]),
        ("UINT32", "uint_contents", [0, 2**32 - 1]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, -2.0]),
        ("FP64", "fp64_contents", [0.1, -2.0]),
        ("BYTES", "bytes_contents", [b"", b"\xff\x00"]),
    ],
)
def test_typed_contents_become_raw_bytes(datatype, field, values):
    """Of each datatype, to the ends of its range."""
    found = read(request(contents={field: values}, datatype=datatype)).inputs[0]
    assert to_numpy(found).tolist() == values


def test_a_request_keeps_all_that_it_says():
    """Id, parameters of every kind, requested outputs; answers are asked for as raw bytes."""
    parameters = {
        "s": {"string_param": "ä"}, "i": {"int64_param": -3}, "u": {"uint64_param": 2**64 - 1},
        "b": {"bool_param": True}, "d": {"double_param": 0.5},
        "binary_data_output": {"bool_param": False},
    }  # fmt: skip
    wish = {"name": "y", "parameters": {"binary_data": {"bool_param": False}}}
    data = np.array([1, 2], np.float32).tobytes()
    found = read(request(data, id="r", parameters=parameters, outputs=[wish]))
    assert found.id == "r"
    assert found.parameters == {"s": "ä", "i": -3, "u": 2**64 - 1, "b": True, "d": 0.5}
    assert found.outputs == (v2.RequestedOutput("y"),)
    assert found.binary_default
    assert bytes(found.inputs[0].data) == data


def test_a_tensor_without_elements():
    """Needs neither contents nor raw bytes."""
    (found,) = read(request(shape=(0, 2))).inputs
    assert (found.shape, bytes(found.data)) == ((0, 2), b"")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (request(contents={"fp32_contents": [1]}), "1 elements, shape .2. holds 2"),
        (request(), "binary_data_size is 0"),
        (request(contents={"fp64_contents": [1, 2]}), "fp32_contents, not in fp64_contents"),
        (request(contents={"int_contents": [1, 300]}, datatype="INT8"), "from -128 to 127"),
        (request(contents={"fp32_contents": [1, 2]}, datatype="FP16"), "raw_input_contents"),
        (request(contents={"fp32_contents": [1, 2]}, datatype="BF16"), "raw_input_contents"),
        (request(datatype="WISH"), "unknown datatype 'WISH'"),
        (request(b"12345678", contents={"fp32_contents": [1, 2]}), "both contents and raw"),
        (request(b"1234567"), "takes 8 bytes"),
        (request(b"12345678", shape=[1] * 1000), "at most 8 dimensions"),
        (request(contents={"fp32_contents": []}, shape=[2**62] * 8), "holds"),
        (request(b"12345678", parameters={"a": {}}), "'a' has no value"),
        (request(b"12345678", parameters={"a": {"double_param": math.inf}}), "must be finite"),
        (request(b"12345678", parameters={"sequence_id": {"int64_param": 1}}), "sequences"),
        (request(b"12345678", parameters={"priority": {"int64_param": -1}}), "priority"),
        (request(b"12345678", id="r" * 300), "id is longer"),
        (pb.ModelInferRequest(raw_input_contents=[b""]), "raw_input_contents has 1 tensors"),
    ],
)
def test_messages_that_are_wrong(message, words):
    """What is wrong is said in the caller's words."""
    with pytest.raises(InvalidRequest, match=words):
        read(message)


def test_shared_memory_and_classification_are_refused():
    """As over HTTP: they would be parameters of tensors and outputs."""
    for parameter in ("shared_memory_region", "shared_memory_offset"):
        message = request(b"12345678")
        message.inputs[0].parameters[parameter].string_param = "r"
        with pytest.raises(InvalidRequest, match="shared memory is not supported"):
            read(message)
    wish = {"name": "y", "parameters": {"classification": {"int64_param": 1}}}
    with pytest.raises(InvalidRequest, match="classification"):
        read(request(b"12345678", outputs=[wish]))


def test_limits_hold_before_memory_is_taken():
    """Elements that take one byte in the message and eight afterwards."""
    with pytest.raises(TooLarge, match="101 elements"):
        read(request(contents={"fp64_contents": [0] * 101}, datatype="FP64", shape=[101]))
    with pytest.raises(TooLarge, match="more than 1000 bytes"):
        read(request(bytes(1001)))


def test_an_answer_comes_back_whole():
    """Outputs in order, raw, large and empty ones too, whatever the worker sent as JSON."""
    outputs = [
        Tensor("a", "FP32", (2,), np.array([1, 2], np.float32).tobytes()),
        Tensor("b", "BYTES", (1,), b"\x02\0\0\0hi"),
        Tensor("c", "UINT8", (300,), bytes(300)),
        Tensor("d", "INT32", (0,), b""),
    ]
    for binary in (True, False):
        asked = v2.InferRequest(binary_default=binary)
        body, length = v2.encode_response("m", 3, "r", outputs, asked)
        answer = pb.ModelInferResponse.FromString(infer_response(body, length))
        assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "r")
        told = [(each.name, each.datatype, tuple(each.shape)) for each in answer.outputs]
        assert told == [(each.name, each.datatype, each.shape) for each in outputs]
        assert list(answer.raw_output_contents) == [each.data for each in outputs]


# --- receiving -----------------------------------------------------------------------------


class Sent:
    """A call that has sent this."""

    def __init__(self, message):
        self._message = message

    async def read(self):
        return self._message


async def received(message, limit=100_000):
    admission = Admission(10, 1_000_000)
    held = Held(admission)
    try:
        return await receive(Sent(message), held, limit, 10.0)
    finally:
        held.release()
        assert admission.held_bytes == 0


async def test_messages_are_unpacked():
    """By their first bytes; a message that is not packed cannot be taken for one that is."""
    plain = request(bytes(8)).SerializeToString()
    assert await received(plain) == plain
    assert await received(gzip.compress(plain)) == plain
    for level in (1, 6, 9):
        assert await received(zlib.compress(plain, level)) == plain
    assert await received(b"") == b""


async def test_what_unpacks_to_too_much():
    """Is found while it is unpacked, not afterwards."""
    for packed in (gzip.compress(bytes(200_000)), zlib.compress(bytes(200_000))):
        assert len(packed) < 1000
        with pytest.raises(TooLarge):
            await received(packed)
    with pytest.raises(InvalidRequest, match="truncated"):
        await received(gzip.compress(bytes(1000))[:-9])
    with pytest.raises(NoMessage):
        await received(object())


def test_messages_of_very_many_fields():
    """Two bytes each, they would take fifty times as much when parsed: at any depth that counts."""
    many = 60_000
    empty_inputs = b"\x2a\x00" * many
    nested = b"\x22\x00" * many
    size = bytes([len(nested) & 0x7F | 0x80, len(nested) >> 7 & 0x7F | 0x80, len(nested) >> 14])
    for message in (empty_inputs, b"\x2a" + size + nested, b"\x32" + size + nested):
        with pytest.raises(TooLarge, match="fields"):
            parsed(pb.ModelInferRequest, message, frozenset((5, 6)))
    large = request(bytes(200_000), shape=[50_000]).SerializeToString()
    assert len(parsed(pb.ModelInferRequest, large).raw_input_contents[0]) == 200_000


@pytest.mark.parametrize("message", [b"\xff" * 10, b"\x2a\xff", b"\xff" * 70_000, b"\x0a\x01\xff"])
def test_rubbish_is_no_message(message):
    """Short or long, broken off, or with a name that is no text."""
    with pytest.raises(InvalidRequest, match="no ModelInferRequest"):
        parsed(pb.ModelInferRequest, message)


# --- tables --------------------------------------------------------------------------------


def test_every_error_has_a_status():
    """One that is new must be thought about."""
    assert set(errors.STATUS) <= set(STATUS)


def test_generated_modules_are_current():
    """As the .proto files are; where grpcio-tools is not installed, nobody can tell."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "protos", "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_our_messages_are_tritons():
    """Each of our fields has its number and type in Triton's own description, and nothing of it
    has a name of ours alone."""
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2").DESCRIPTOR.pool
    seen = 0
    for name, ours in pb.DESCRIPTOR.message_types_by_name.items():
        todo = [(ours, theirs.FindMessageTypeByName(f"inference.{name}"))]
        while todo:
            mine, real = todo.pop()
            for field in mine.fields:
                other = real.fields_by_name[field.name]
                assert (field.number, field.type, field.is_repeated) == (
                    other.number, other.type, other.is_repeated,
                ), f"{mine.name}.{field.name}"  # fmt: skip
                seen += 1
            todo += [(n, real.nested_types_by_name[n.name]) for n in mine.nested_types]
    assert seen > 100
    values = theirs.FindEnumTypeByName("inference.DataType").values_by_name
    ours = pb.DESCRIPTOR.enum_types_by_name["DataType"].values
    assert {v.name: v.number for v in ours} == {name: v.number for name, v in values.items()}


WHOLE = request(
    contents={"fp32_contents": [1, 2]},
    id="r",
    parameters={"timeout": {"int64_param": 5}, "priority": {"uint64_param": 1}},
    outputs=[{"name": "y", "parameters": {"k": {"int64_param": 0}}}],
).SerializeToString()


@given(
    st.binary(max_size=64)
    | st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6
    ).map(changed)
)
def test_any_bytes_give_a_request_or_an_error_of_ours(data):
    """Whatever a message is, it is read, or refused with a reason."""
    with contextlib.suppress(InvalidRequest, TooLarge):
        read(parsed(pb.ModelInferRequest, data, frozenset((5, 6))))


def test_json_of_a_request_is_what_http_has():
    """The same header that a client would send, so that a worker cannot tell."""
    body, length = infer_body(request(b"12345678"), LIMITS)
    assert json.loads(body[:length]) == {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
        ],
        "parameters": {"binary_data_output": True},
    }
    assert body[length:] == b"12345678"
