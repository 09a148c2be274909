"""The v2 codec: what it accepts, what it refuses and in which words, and tritonclient's view."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from shared.errors import InvalidRequest, RoostError, TooLarge
from shared.models import Datatype, ModelSpec, TensorSpec
from shared.tensors import NUMPY, Tensor, from_numpy, to_numpy
from shared.v2 import (
    InferRequest,
    Limits,
    RequestedOutput,
    check_inputs,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    error_body,
    error_message,
    message_priority,
    parse_header_length,
    priority,
    priority_level,
    raw_input_of,
    timeout_us,
)

IDS = from_numpy("ids", np.array([[1, 2, 3]], dtype=np.int64))
MASK = from_numpy("mask", np.array([[True, False, True]]))


def as_json(inputs: list[dict[str, Any]] | Any, **rest: Any) -> bytes:
    return json.dumps({"inputs": inputs, **rest}).encode()


def listed(name: str = "x", datatype: str = "INT32", shape: Any = (2,), **rest: Any) -> Any:
    return {"name": name, "datatype": datatype, "shape": shape, **rest}


def binary(size: Any, **kwargs: Any) -> Any:
    return listed(parameters={"binary_data_size": size}, **kwargs)


def refused(
    body: bytes, length: int | None = None, error: type[RoostError] = InvalidRequest
) -> str:
    with pytest.raises(error) as caught:
        decode_request(body, length)
    return str(caught.value)


# --- round trips --------------------------------------------------------------------------


def test_a_binary_request_comes_back_without_copies() -> None:
    """Raw tensors are views of the body; id, parameters and wishes survive."""
    request = InferRequest(
        id="r1",
        parameters={"tenant": "a", "priority": 1, "share": 0.5, "dry": True},
        inputs=(IDS, MASK),
        outputs=(RequestedOutput("y", binary=True), RequestedOutput("z")),
        binary_default=True,
    )
    body, length = encode_request(request)
    decoded = decode_request(body, length)
    assert decoded == request
    assert all(memoryview(tensor.data).obj is body for tensor in decoded.inputs)
    assert decode_request(memoryview(body), length) == request


def test_a_json_request_comes_back() -> None:
    """The same tensors as JSON, and without a header length."""
    request = InferRequest(inputs=(IDS, MASK, from_numpy("s", np.array([["ä", 'q"\\']], object))))
    body, length = encode_request(request, binary=False)
    assert length is None
    assert decode_request(body, None) == request


def test_json_and_binary_tensors_mix() -> None:
    """Raw bytes go, in order, to those tensors that claim some."""
    header = as_json(
        [
            binary(2, name="a", datatype="UINT8"),
            listed("b", data=[1, 2]),
            binary(3, name="c", datatype="UINT8", shape=[3]),
        ]
    )
    request = decode_request(header + b"\1\2\3\4\5", len(header))
    assert [to_numpy(tensor).tolist() for tensor in request.inputs] == [[1, 2], [1, 2], [3, 4, 5]]


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_json_data_may_be_flat_or_nested(data: list[Any]) -> None:
    """Both are row-major."""
    request = decode_request(as_json([listed(shape=[2, 2], data=data)]), None)
    assert to_numpy(request.inputs[0]).tolist() == [[1, 2], [3, 4]]


def test_long_json_data_are_counted_before_they_are_decoded() -> None:
    """Long arrays pass when right, flat or nested, of numbers or text, and are refused when not."""
    numbers = list(range(30_000))
    words = ['[,"\\'] * 30_000
    for datatype, flat in (("INT32", numbers), ("BYTES", words)):
        nested = [flat[i : i + 10] for i in range(0, len(flat), 10)]
        for data in (flat, nested):
            request = decode_request(
                as_json([listed(datatype=datatype, shape=[3000, 10], data=data)]), None
            )
            assert to_numpy(request.inputs[0]).size == 30_000
        for wrong in (flat[1:], [flat], [[]] * 30_000):
            body = as_json([listed(datatype=datatype, shape=[3000, 10], data=wrong)])
            assert "'x'" in refused(body)


@pytest.mark.parametrize("shape", [[0], [0, 3], [3, 0]])
def test_empty_tensors_are_fine(shape: list[int]) -> None:
    """As JSON and as zero raw bytes, with and without a header length."""
    assert decode_request(as_json([listed(shape=shape, data=[])]), None).inputs[0].data == b""
    body = as_json([binary(0, shape=shape)])
    assert decode_request(body, None) == decode_request(body, len(body))


def test_unknown_keys_are_tolerated() -> None:
    """As the protocol allows: at the top, in tensors, and scalars among parameters."""
    body = as_json(
        [listed(data=[1, 2], extra={"a": []}, parameters={"note": "x"})],
        parameters={"tenant": "t"},
        outputs=[{"name": "y", "parameters": {"note": 1}}],
        other=[1, {}],
    )
    request = decode_request(body, None)
    assert request.parameters == {"tenant": "t"}
    assert request.outputs == (RequestedOutput("y"),)


def test_an_empty_list_of_outputs_asks_for_all() -> None:
    """As with Triton."""
    assert decode_request(as_json([], outputs=[]), None).outputs is None


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [-1, 3, True, "1", 1.0])
def test_a_header_length_outside_the_body_is_refused(length: Any) -> None:
    """Negative, beyond the body, or no whole number."""
    assert "header length must be from 0 to the body's 2 bytes" in refused(b"{}", length)


@pytest.mark.parametrize(
    "value", ["-1", "1.5", "", " 1", "0x1", "9" * 20, b"a", True, -1, 1.0, "\u0661"]
)
def test_a_header_length_that_is_no_number_is_refused(value: object) -> None:
    """What stands in an HTTP or AMQP header is checked before it is a number."""
    with pytest.raises(InvalidRequest, match="whole number"):
        parse_header_length(value)


def test_header_lengths_are_read() -> None:
    """As text, bytes or a number; None when absent."""
    assert [parse_header_length(v) for v in (None, "12", b"12", 12)] == [None, 12, 12, 12]


def test_sizes_beyond_the_limits_are_too_large() -> None:
    """The body, and the JSON before raw tensors."""
    limits = Limits(body_bytes=100, header_bytes=50)
    with pytest.raises(TooLarge, match="101 bytes, the limit is 100"):
        decode_request(b" " * 101, None, limits)
    with pytest.raises(TooLarge, match="60 bytes, the limit before raw tensors is 50"):
        decode_request(b" " * 100, 60, limits)


@pytest.mark.parametrize(
    "head",
    [b"[", b'{"inputs":', b'{"a":', b'{"inputs":[{"data":', b'{"\\"":"]}]}","a":', b'{"a\\\\":'],
)
def test_deep_json_is_refused_before_it_is_parsed(head: bytes) -> None:
    """Depth counts only brackets outside strings, escaped quotes or not."""
    assert "more than 32 deep" in refused(head + b"[" * 100_000)
    assert "more than 32 deep" in refused(head + b'{"a":' * 3_000_000)


def test_brackets_in_strings_are_not_depth() -> None:
    """Nor are many that are closed again."""
    text = '["{[' * 100 + '\\"'
    body = as_json([listed(datatype="BYTES", shape=[1], data=[text])], id=text[:100])
    assert to_numpy(decode_request(body, None).inputs[0]).tolist() == [text.encode()]
    body = as_json([listed(shape=[100, 1], data=[[1]] * 100)])
    assert decode_request(body, None).inputs[0].shape == (100, 1)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "malformed"),
        (b"[]", "Expected object, got array"),
        (b"{}", "missing required field inputs"),
        (b'{"inputs":[]} x', "malformed"),
        (b'\xef\xbb\xbf{"inputs":[]}', "malformed"),
        (b'{"id":"\xff","inputs":[]}', "not UTF-8"),
        (b'{"id":"\\ud800","inputs":[]}', "header"),
        (as_json([], id=5), "at id"),
        (as_json([], id="x" * 257), "id is longer"),
        (as_json({}), "at inputs"),
        (as_json([5]), "input number 0: Expected object"),
        (as_json([], parameters={"a": {"b": 1}}), "at parameters"),
        (as_json([], parameters={"a": None}), "at parameters"),
        (as_json([], outputs=[{"nome": "y"}]), "output number 0: Object missing"),
        (as_json([], outputs=[{"name": "y"}, {"name": "y"}]), "'y' is requested more than once"),
        (as_json([], outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), "true or false"),
        (as_json([], outputs=[{"name": "y", "parameters": {"classification": 3}}]), "'y': class"),
    ],
)
def test_broken_headers_are_refused(body: bytes, says: str) -> None:
    """The message says what was expected, and where."""
    assert says in refused(body)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (listed(shape="no"), "Expected array, got str, at shape"),
        (listed(shape=[1.5]), "Expected int, got float, at shape[0]"),
        (listed(shape=[True]), "Expected int, got bool"),
        (listed(shape=[-1, 2], data=[]), "dimensions must be 0 or more, got [-1, 2]"),
        (listed(shape=[2**62, 2**62], data=[]), "beyond 2147483647 elements"),
        (listed(shape=[0, 2**40], data=[]), "beyond 2147483647 elements"),
        (listed(shape=[10**4000], data=[]), "(huge)"),
        (listed(shape=[1] * 9, data=[1]), "at most 8 dimensions, got 9"),
        (listed(datatype="FLOAT", data=[1, 2]), "unknown datatype 'FLOAT', expected one of BOOL"),
        (listed(datatype=3), "Expected str, got int, at datatype"),
        (listed(), "neither data nor binary_data_size"),
        (listed(data=[1, 2], parameters={"binary_data_size": 8}), "both data and"),
        (listed(parameters={"shared_memory_region": "r"}), "shared memory is not supported"),
        (listed(parameters={"a": [1]}), "at parameters"),
        (binary(-1), "must be a whole number from 0, got '-1'"),
        (binary(2.0), "must be a whole number"),
        (binary(True), "must be a whole number"),
        (binary("8"), "must be a whole number"),
        (binary(10**4000), "only 0 bytes are left"),
        (binary(8), "binary_data_size is 8, but only 0 bytes are left"),
        (listed(data=5), "data must be an array"),
        (listed(data=None), "data must be an array"),
        (listed(data={"a": 1}), "data must be an array"),
        (listed(data=[1]), "data has 1 elements, shape [2] holds 2"),
        (listed(data=[1, 2, 3]), "data has 3 elements, shape [2] holds 2"),
        (listed(data=[1, 2.5]), "Expected int, got float - at data[1]"),
        (listed(data=[1, 2.0]), "Expected int, got float"),
        (listed(data=[1, True]), "Expected int, got bool"),
        (listed(data=[1, "2"]), "Expected int, got str"),
        (listed(data=[1, None]), "Expected int, got null"),
        (listed(data=[1, 2**31]), "data[1] is outside INT32's range of -2147483648 to"),
        (listed(data=[-(10**4000), 1]), "data[0] is outside INT32's range"),
        (listed(datatype="UINT64", data=[0, -1]), "data[1] is outside UINT64's range of 0 to"),
        (listed(datatype="BOOL", data=[True, 1]), "Expected bool, got int"),
        (listed(datatype="FP32", data=[0, True]), "Expected float, got bool"),
        (listed(datatype="FP32", data=[0, 1e39]), "data[1] is outside the range of FP32"),
        (listed(datatype="BYTES", data=["a", 1]), "Expected str, got int"),
        (listed(datatype="FP16", data=[1, 2]), "FP16 via JSON is not supported"),
        (listed(datatype="BF16", data=[1, 2]), "BF16 via JSON is not supported"),
        (listed(data=[[1], [2]]), "data does not suit"),
        (listed(shape=[2, 2], data=[[1, 2], [3]]), "has 1 elements along dimension 1"),
        (listed(shape=[2, 2], data=[[1, 2]]), "has 1 elements along dimension 0"),
        (listed(shape=[2, 2], data=[[1, 2], 3]), "data does not suit"),
    ],
)
def test_broken_tensors_are_refused_by_name(tensor: Any, says: str) -> None:
    """Whatever is wrong with a tensor, the message names it and what was expected."""
    message = refused(as_json([tensor]))
    assert message.startswith("input 'x'")
    assert says in message


def test_nan_and_infinity_are_not_json() -> None:
    """Python's json writes them, the protocol knows no such thing."""
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        body = b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[' + value + b"]}]}"
        refused(body)


@pytest.mark.parametrize(
    ("head", "rest", "says"),
    [
        ([binary(8)], b"1234567", "binary_data_size is 8, but only 7 bytes are left"),
        ([binary(8)], b"123456789", "1 bytes are left over after the last input"),
        ([listed(data=[1, 2])], b"1", "1 bytes are left over"),
        ([binary(4)], b"1234", "INT32 of shape [2] takes 8 bytes, binary_data_size is 4"),
        ([binary(1, datatype="BYTES")], b"1", "'x': the length of BYTES element 0"),
        ([binary(5, datatype="BYTES")], b"\2\0\0\0a", "'x': BYTES element 0 claims 2 bytes, 1"),
        ([binary(5, datatype="BYTES")], b"\1\0\0\0a", "1 BYTES elements, the shape holds 2"),
        ([binary(4, datatype="BYTES", shape=[0])], b"\0" * 4, "more than the 0 BYTES elements"),
        ([binary(8), binary(8)], b"1" * 16, "'x' is given more than once"),
        ([binary(4, name="")], b"1234", "'': a name must have 1 to 256"),
        ([binary(4, name="n" * 300)], b"1234", "a name must have 1 to 256"),
    ],
)
def test_raw_tensors_that_do_not_fit_are_refused(head: list[Any], rest: bytes, says: str) -> None:
    """Size, shape and the body's length must agree exactly."""
    header = as_json(head)
    assert says in refused(header + rest, len(header))


def test_too_many_things_are_too_large() -> None:
    """Inputs, outputs, parameters, and elements that are costly to visit."""
    many = {f"p{i}": 1 for i in range(257)}
    names = [{"name": f"p{i}"} for i in range(257)]
    inputs = [listed(f"p{i}", data=[1, 2]) for i in range(257)]
    for body in (
        as_json(inputs),
        as_json([], outputs=names),
        as_json([], parameters=many),
        as_json([listed(data=[1, 2], parameters=many)]),
        as_json([listed(datatype="BYTES", shape=[2**21], data=[])]),
        as_json([listed(shape=[2**23], data=[])]),
        as_json([binary(0, datatype="BYTES", shape=[2**21])]),
    ):
        refused(body, error=TooLarge)


@pytest.mark.parametrize(
    "parameters",
    [
        {"triton_x": 1},
        {"headers": "x"},
        {"sequence_id": 7},
        {"binary_data_output": "yes"},
        {"priority": -1},
        {"priority": "high"},
        {"priority": True},
        {"timeout": 1.5},
        {"timeout": -1},
        {"timeout": 2**60},
    ],
)
def test_reserved_and_wrong_parameters_are_refused(parameters: dict[str, Any]) -> None:
    """The message names the parameter."""
    assert f"{next(iter(parameters))!r}" in refused(as_json([], parameters=parameters))


def test_timeout_and_priority_are_read() -> None:
    """Microseconds, where 0 is no wish; 0 is the default priority."""
    assert timeout_us({"timeout": 1500}) == 1500
    assert timeout_us({"timeout": 0}) is None
    assert timeout_us({}) is None
    assert (priority({"priority": 3}), priority({})) == (3, 0)


def test_priorities_travel_upside_down() -> None:
    """The protocol's 1 is AMQP's 9; the ninth level and all below are its 1; 0 is no wish."""
    assert [message_priority(level) for level in (0, 1, 2, 9, 10, 2**40)] == [0, 9, 8, 1, 1, 1]
    assert [priority_level(p) for p in (None, 0, 1, 9, 10, 255)] == [0, 0, 9, 1, 1, 1]
    assert all(priority_level(message_priority(level)) == level for level in range(10))


# --- raw binary requests --------------------------------------------------------------------


def raw(body: bytes, datatype: Datatype, shape: tuple[int, ...], batch: int = 0) -> InferRequest:
    spec = ModelSpec(inputs=(TensorSpec("x", datatype, shape),), max_batch_size=batch)
    return decode_request(body, 0, raw_input=raw_input_of(spec))


def test_a_raw_request_is_the_one_input() -> None:
    """Its size gives the one variable dimension; it is a batch of 1, answered in raw bytes."""
    request = raw(b"12345678", "INT16", (2, -1), batch=4)
    assert request.binary_default
    assert request.inputs == (Tensor("x", "INT16", (1, 2, 2), b"12345678"),)
    assert to_numpy(raw(b"hi", "BYTES", (-1,)).inputs[0]).tolist() == [b"hi"]


@pytest.mark.parametrize(
    ("datatype", "shape"),
    [("INT16", (-1, -1)), ("INT16", (3,)), ("INT16", (2, -1)), ("INT16", (0, -1)), ("BYTES", (2,))],
)
def test_a_raw_request_that_does_not_fit_is_refused(
    datatype: Datatype, shape: tuple[int, ...]
) -> None:
    """Two variable dimensions, or a size that does not divide."""
    with pytest.raises(InvalidRequest, match="'x'"):
        raw(b"12345", datatype, shape)


def test_a_raw_request_needs_a_model_with_one_known_input() -> None:
    """Otherwise the message says what to do."""
    assert raw_input_of(ModelSpec()) is None
    assert "send a JSON header" in refused(b"1234", 0)


# --- responses ----------------------------------------------------------------------------

OUTPUTS = [from_numpy("y", np.array([[0.5, 2.0]], np.float32)), from_numpy("z", np.array(["ä"]))]


def test_a_response_honours_order_subset_and_flags() -> None:
    """Each output as raw bytes or JSON, as asked; the id is echoed."""
    request = InferRequest(outputs=(RequestedOutput("z"), RequestedOutput("y", binary=True)))
    body, length = encode_response("m", 3, "r1", OUTPUTS, request)
    assert length is not None
    head = json.loads(body[:length])
    assert head == {
        "model_name": "m",
        "model_version": "3",
        "id": "r1",
        "outputs": [
            {"name": "z", "datatype": "BYTES", "shape": [1], "data": ["ä"]},
            {
                "name": "y",
                "datatype": "FP32",
                "shape": [1, 2],
                "parameters": {"binary_data_size": 8},
            },
        ],
    }
    response = decode_response(body, length)
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "r1")
    assert response.outputs == (OUTPUTS[1], OUTPUTS[0])


@pytest.mark.parametrize("binary_default", [True, False])
def test_without_a_list_all_outputs_come(binary_default: bool) -> None:
    """In the model's order; without raw bytes there is no header length, and no id unless given."""
    request = InferRequest(binary_default=binary_default)
    body, length = encode_response("m", "1", None, OUTPUTS, request)
    assert (length is not None) is binary_default
    assert b'"id"' not in body
    assert decode_response(body, length).outputs == tuple(OUTPUTS)
    empty = from_numpy("e", np.empty((0, 2), np.float32))
    body, length = encode_response("m", 1, None, [empty], request)
    assert length is None
    assert decode_response(body, length).outputs == (empty,)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (from_numpy("y", np.zeros(1, np.float16)), "FP16 via JSON is not supported"),
        (from_numpy("y", np.zeros(1, np.float32), "BF16"), "BF16 via JSON is not supported"),
        (from_numpy("y", np.array([np.nan])), "no NaN"),
        (from_numpy("y", np.array([np.inf], np.float32)), "no NaN and no infinity"),
        (from_numpy("y", np.array([b"\xff"], object)), "not UTF-8"),
        (from_numpy("other", np.zeros(1)), "'y' is requested, the model gives 'other'"),
    ],
)
def test_what_cannot_be_answered_so_is_refused(output: Tensor, says: str) -> None:
    """What JSON cannot say, and outputs that are not there."""
    request = InferRequest(outputs=(RequestedOutput("y", binary=False),))
    with pytest.raises(InvalidRequest, match=says) as caught:
        encode_response("m", 1, None, [output], request)
    assert "'y'" in str(caught.value)


def test_a_reply_beyond_the_limit_is_too_large() -> None:
    """It would not pass the broker."""
    big = from_numpy("y", np.zeros(1000))
    for binary_default in (True, False):
        request = InferRequest(binary_default=binary_default)
        with pytest.raises(TooLarge, match="the reply has"):
            encode_response("m", 1, None, [big], request, Limits(body_bytes=1000))


def test_errors_are_bodies_too() -> None:
    """Any text, even one that is not Unicode."""
    assert json.loads(error_body('a "b"\n\ud800')) == {"error": 'a "b"\n?'}
    assert error_message(error_body("no")) == "no"
    assert error_message(b"[" * 100_000) is None
    assert error_message(b"\xff") is None


# --- check_inputs ---------------------------------------------------------------------------

SPEC = ModelSpec(
    inputs=(
        TensorSpec("ids", "INT64", (-1,)),
        TensorSpec("mask", "BOOL", (3,)),
        TensorSpec("bias", "FP32", (), optional=True),
    ),
    max_batch_size=4,
)


def tensor(name: str, datatype: Datatype, *shape: int, value: int = 0) -> Tensor:
    return from_numpy(name, np.full(shape, value, NUMPY[datatype]))


def test_rows_are_the_common_first_dimension() -> None:
    """Up to the model's largest batch; an optional input may be left out or given."""
    ids, mask = tensor("ids", "INT64", 4, 7), tensor("mask", "BOOL", 4, 3)
    assert check_inputs(InferRequest(inputs=(ids, mask)), SPEC) == 4
    bias = tensor("bias", "FP32", 4)
    assert check_inputs(InferRequest(inputs=(bias, mask, ids)), SPEC) == 4


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([IDS], "'mask' is missing: expected BOOL of shape [rows, 3]"),
        (
            [IDS, MASK, tensor("more", "FP32", 1)],
            "'more' is unknown: the model takes 'ids', 'mask'",
        ),
        ([IDS, MASK, IDS], "'ids' is given more than once"),
        (
            [tensor("ids", "INT32", 1, 3), MASK],
            "'ids': expected INT64 of shape [rows, -1], got INT32",
        ),
        ([IDS, tensor("mask", "BOOL", 1, 4)], "'mask': expected BOOL of shape [rows, 3], got"),
        ([IDS, tensor("mask", "BOOL", 3)], "got BOOL of shape [3]"),
        ([IDS, MASK, tensor("bias", "FP32")], "'bias': expected FP32 of shape [rows], got"),
        ([IDS, tensor("mask", "BOOL", 2, 3)], "'mask' has 2 rows, input 'ids' has 1"),
        (
            [tensor("ids", "INT64", 5, 1), tensor("mask", "BOOL", 5, 3)],
            "5 rows, the model takes 1 to 4",
        ),
        ([tensor("ids", "INT64", 0, 1), tensor("mask", "BOOL", 0, 3)], "0 rows, the model takes 1"),
        ([IDS, Tensor("mask", "BOOL", (1, 3), b"\0\1\2")], "'mask': BOOL element 2 must be 0 or 1"),
    ],
)
def test_inputs_that_do_not_suit_the_model_are_refused(inputs: list[Tensor], says: str) -> None:
    """The message names the input and what the manifest declares."""
    with pytest.raises(InvalidRequest) as caught:
        check_inputs(InferRequest(inputs=tuple(inputs)), SPEC)
    assert says in str(caught.value)


def test_a_model_that_does_not_batch_takes_one_request_at_a_time() -> None:
    """Its shapes have no batch dimension, and its rows are 1."""
    spec = ModelSpec(inputs=(TensorSpec("ids", "INT64", (1, -1)),))
    assert check_inputs(InferRequest(inputs=(IDS,)), spec) == 1
    assert check_inputs(InferRequest(), ModelSpec(inputs=())) == 1
    with pytest.raises(InvalidRequest, match="the model takes no inputs"):
        check_inputs(InferRequest(inputs=(IDS,)), ModelSpec(inputs=()))


def test_an_unknown_signature_is_checked_for_rows_and_values_alone() -> None:
    """Names and shapes are the worker's to check, against the file."""
    unknown = ModelSpec(max_batch_size=2)
    assert check_inputs(InferRequest(inputs=(tensor("a", "FP32"),)), ModelSpec()) == 1
    assert check_inputs(InferRequest(inputs=(tensor("a", "FP32", 2, 9),)), unknown) == 2
    for inputs in (
        (),
        (tensor("a", "FP32"),),
        (tensor("a", "FP32", 1), tensor("b", "FP32", 2)),
        (Tensor("a", "BOOL", (1,), b"\2"),),
    ):
        with pytest.raises(InvalidRequest):
            check_inputs(InferRequest(inputs=inputs), unknown)


# --- tritonclient -----------------------------------------------------------------------------

EVERY = {
    "BOOL": np.array([[True, False]]),
    "BYTES": np.array([[b"a\0", "grüß".encode()]], dtype=object),
    **{t: np.array([[0, 1]], dtype=d) for t, d in NUMPY.items() if t != "BOOL"},
}


@pytest.fixture
def triton() -> Any:
    """The reference client's module."""
    reason = "the lean environment has no tritonclient"
    # Without its [http] extra tritonclient raises RuntimeError, for which pytest does not skip.
    pytest.importorskip("geventhttpclient", reason=reason)
    return pytest.importorskip("tritonclient.http", reason=reason)


@pytest.mark.parametrize("raw_bytes", [True, False])
def test_tritonclients_requests_are_understood(triton: Any, raw_bytes: bool) -> None:
    """Every datatype numpy knows, as raw bytes and as JSON, with parameters and outputs."""
    inputs = []
    for datatype, array in EVERY.items():
        if datatype == "FP16" and not raw_bytes:
            continue
        one = triton.InferInput(datatype.lower(), list(array.shape), datatype)
        inputs.append(one.set_data_from_numpy(array, binary_data=raw_bytes))
    body, length = triton.InferenceServerClient.generate_request_body(
        inputs,
        outputs=[triton.InferRequestedOutput("y", binary_data=raw_bytes)],
        request_id="7",
        priority=2,
        timeout=5000,
        parameters={"tenant": "ä"},
    )
    request = decode_request(body, length)
    assert (request.id, request.outputs) == ("7", (RequestedOutput("y", binary=raw_bytes),))
    assert request.parameters == {"priority": 2, "timeout": 5000, "tenant": "ä"}
    for got in request.inputs:
        np.testing.assert_array_equal(to_numpy(got), EVERY[got.datatype], strict=True)


def test_tritonclient_without_outputs_wants_raw_bytes(triton: Any) -> None:
    """Empty tensors and mixed ones are understood as well."""
    empty = triton.InferInput("e", [0, 2], "FP32")
    empty.set_data_from_numpy(np.empty((0, 2), np.float32))
    mixed = triton.InferInput("m", [1], "INT8")
    mixed.set_data_from_numpy(np.array([1], np.int8), binary_data=False)
    body, length = triton.InferenceServerClient.generate_request_body([empty, mixed])
    request = decode_request(body, length)
    assert request.binary_default
    assert request.outputs is None
    assert [t.shape for t in request.inputs] == [(0, 2), (1,)]


@pytest.mark.parametrize("raw_bytes", [True, False])
def test_tritonclient_understands_our_responses(triton: Any, raw_bytes: bool) -> None:
    """Every datatype, an empty one among them, mixed with one of the other kind."""
    outputs = [from_numpy(t, a) for t, a in EVERY.items() if raw_bytes or t != "FP16"]
    outputs += [from_numpy("empty", np.empty((0, 2), np.int32)), from_numpy("mix", np.ones(2))]
    wanted = [RequestedOutput(t.name, binary=raw_bytes) for t in outputs[:-1]]
    request = InferRequest(outputs=(RequestedOutput("mix", binary=not raw_bytes), *wanted))
    body, length = encode_response("m", 1, "9", outputs, request)
    result = triton.InferenceServerClient.parse_response_body(body, header_length=length)
    assert result.get_response()["id"] == "9"
    for output in outputs:
        got, want = result.as_numpy(output.name), to_numpy(output)
        if output.datatype == "BYTES" and not raw_bytes:
            got = np.array([[item.encode() for item in got[0]]], dtype=object)
        np.testing.assert_array_equal(got, want, strict=True)


def test_bf16_agrees_with_tritonclient(triton: Any) -> None:
    """Its arrays are of ml_dtypes' type; ours are made from float32."""
    from tritonclient.utils import triton_to_np_dtype

    bfloat16 = np.dtype(triton_to_np_dtype("BF16"))
    if bfloat16.name != "bfloat16":
        pytest.skip("this tritonclient has no bfloat16 of its own")
    values = np.linspace(-3, 3, 7, dtype=np.float32).reshape(1, 7)
    one = triton.InferInput("x", [1, 7], "BF16").set_data_from_numpy(values.astype(bfloat16))
    request = decode_request(*triton.InferenceServerClient.generate_request_body([one]))
    assert request.inputs[0] == from_numpy("x", values, "BF16")
    assert request.inputs[0] == from_numpy("x", values.astype(bfloat16))
    body, length = encode_response("m", 1, None, request.inputs, InferRequest(binary_default=True))
    result = triton.InferenceServerClient.parse_response_body(body, header_length=length)
    np.testing.assert_array_equal(result.as_numpy("x"), values.astype(bfloat16))
