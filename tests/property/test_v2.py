"""Laws of the v2 codec: what is encoded comes back, and no bytes whatever break the decoder."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import InvalidRequest, RoostError, TooLarge
from shared.models import ModelSpec, TensorSpec
from shared.tensors import ITEMSIZE, Tensor, frame_bytes, from_numpy, split_rows, to_numpy
from shared.v2 import (
    InferRequest,
    RequestedOutput,
    check_inputs,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    error_body,
)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
PARAMETERS = st.dictionaries(NAMES.map(lambda name: f"p.{name}"), SCALARS, max_size=4)


@st.composite
def tensors(draw: st.DrawFn, *, json_safe: bool = False) -> Tensor:
    """A tensor of any datatype and shape; `json_safe` ones can be said in JSON."""
    left_out = {"FP16", "BF16"} if json_safe else set()
    datatype = draw(st.sampled_from(sorted(set(ITEMSIZE) - left_out)))
    shape = draw(SHAPES)
    count = int(np.prod(shape, dtype=np.int64))
    itemsize = ITEMSIZE[datatype]
    data: bytes
    if itemsize is None:
        text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5).map(str.encode)
        element = text if json_safe else st.binary(max_size=5)
        data = frame_bytes(draw(st.lists(element, min_size=count, max_size=count)))
    else:
        size = count * itemsize
        data = draw(st.binary(min_size=size, max_size=size))
        if datatype == "BOOL":
            data = bytes(byte & 1 for byte in data)
        if json_safe and datatype in {"FP32", "FP64"}:
            array = to_numpy(Tensor("x", datatype, shape, data))
            data = np.where(np.isfinite(array), array, array.dtype.type(1)).tobytes()
    return Tensor(draw(NAMES), datatype, shape, data)


def requests(*, json_safe: bool = False) -> st.SearchStrategy[InferRequest]:
    return st.builds(
        InferRequest,
        id=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        parameters=PARAMETERS,
        inputs=st.lists(tensors(json_safe=json_safe), max_size=4, unique_by=lambda t: t.name).map(
            tuple
        ),
        outputs=st.none()
        | st.lists(
            st.builds(RequestedOutput, NAMES, st.none() | st.booleans()),
            min_size=1,
            max_size=3,
            unique_by=lambda o: o.name,
        ).map(tuple),
        binary_default=st.booleans(),
    )


@given(requests())
def test_any_request_comes_back_from_raw_bytes(request: InferRequest) -> None:
    """Every datatype and shape, parameters and wishes."""
    assert decode_request(*encode_request(request)) == request


@given(requests(json_safe=True))
def test_any_request_comes_back_from_json(request: InferRequest) -> None:
    """Bit by bit, of what JSON can say; floats, negative zeros too."""
    body, length = encode_request(request, binary=False)
    assert length is None
    assert decode_request(body, None) == request


@given(requests(json_safe=True))
def test_nested_data_mean_the_same_as_flat(request: InferRequest) -> None:
    """A list nested as the shape is, is the flat one."""
    body, _ = encode_request(request, binary=False)
    head = json.loads(body)
    for tensor in head["inputs"]:
        array = np.empty(len(tensor["data"]), dtype=object)
        array[:] = tensor["data"]
        if tensor["shape"]:
            tensor["data"] = array.reshape(tensor["shape"]).tolist()
    assert decode_request(json.dumps(head).encode(), None) == request


@given(st.lists(tensors(), max_size=4, unique_by=lambda t: t.name), st.none() | NAMES)
def test_any_response_comes_back(outputs: list[Tensor], request_id: str | None) -> None:
    """Outputs in order, with the model's name and the request's id."""
    request = InferRequest(binary_default=True)
    response = decode_response(*encode_response("m", 2, request_id, outputs, request))
    assert (response.model_name, response.model_version) == ("m", "2")
    assert (response.id, response.outputs) == (request_id, tuple(outputs))


@given(tensors(), st.data())
def test_split_rows_join_to_the_whole(tensor: Tensor, data: st.DataObject) -> None:
    """Whatever the cuts, no byte is lost or doubled."""
    if not tensor.shape:
        return
    cuts = sorted(data.draw(st.lists(st.integers(0, tensor.shape[0]), max_size=3)))
    edges = [0, *cuts, tensor.shape[0]]
    pieces = split_rows(tensor, [b - a for a, b in pairwise(edges)])
    assert b"".join(piece.data for piece in pieces) == tensor.data
    for piece in pieces:
        assert to_numpy(piece).shape == piece.shape


SPECS = [
    ModelSpec(),
    ModelSpec(max_batch_size=4),
    ModelSpec(inputs=(TensorSpec("a", "INT16", (-1,)), TensorSpec("b", "BYTES", (2,)))),
]
VALID = InferRequest(
    id="r",
    parameters={"timeout": 7, "tenant": "t"},
    inputs=(
        from_numpy("a", np.array([1, 2, 3], np.int16)),
        from_numpy("b", np.array(["x", "yz"])),
        from_numpy("c", np.array([[True, False]])),
        from_numpy("d", np.array([1.5, -2e30], np.float32)),
    ),
    outputs=(RequestedOutput("y", binary=True), RequestedOutput("z")),
)
BODIES = [encode_request(VALID), encode_request(VALID, binary=False)]
PIECES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [b"[", b"]", b"{", b"}", b'"', b",", b":", b"-", b"1e", b"9" * 30, b"null", b"true",
         b"0.5", b"\\u0000", b"\\ud800", b"\\udc00", b'"data":[', b"[" * 40, b"BYTES", b"FP64",
         b'"binary_data_size":', b'{"name":"a",', b"\xff\xff\xff\xff", b"\0\0\0\0", b"[-1",
         b"1e999"]
    ),
)  # fmt: skip


def assert_sayable(error: RoostError) -> None:
    """A refusal's message can be sent, and is never long."""
    assert len(error_body(error.message)) < 10_000


def survive(body: bytes, length: int | None) -> None:
    """Decodes, checks and looks at every value, if the body is one."""
    for decode in (decode_request, decode_response):
        try:
            message: Any = decode(body, length)
        except (InvalidRequest, TooLarge) as error:
            assert_sayable(error)
            continue
        for tensor in message.inputs if isinstance(message, InferRequest) else message.outputs:
            assert to_numpy(tensor).shape == tensor.shape
        if isinstance(message, InferRequest):
            encode_request(message)
            for spec in SPECS:
                try:
                    check_inputs(message, spec)
                except InvalidRequest as error:
                    assert_sayable(error)


@given(
    st.sampled_from(BODIES),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 12), PIECES), max_size=4),
    st.integers(-4, 4) | st.none(),
)
def test_no_mutation_of_a_request_breaks_the_decoder(
    start: tuple[bytes, int | None], edits: list[tuple[int, int, bytes]], shift: int | None
) -> None:
    """Bytes replaced, put in and left out, the length told wrong: a value or a refusal."""
    body, length = start
    for at, gone, piece in edits:
        at %= len(body) + 1  # noqa: PLW2901
        if length is not None and at + gone <= length:
            length += len(piece) - gone
        body = body[:at] + piece + body[at + gone :]
    survive(body, None if length is None or shift is None else length + shift)


JSON = st.recursive(
    st.none() | SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)


@st.composite
def plausible(draw: st.DrawFn) -> bytes:
    """JSON with the protocol's keys and any values."""

    def tensor() -> dict[str, Any]:
        fields: dict[str, Any] = {
            "name": st.sampled_from(["a", "b", ""]) | JSON,
            "shape": st.lists(st.integers(-2, 3) | st.integers(), max_size=9) | JSON,
            "datatype": st.sampled_from([*ITEMSIZE, "NO"]) | JSON,
            "parameters": st.dictionaries(
                st.sampled_from(["binary_data_size", "shared_memory_region", "k"]), JSON, max_size=2
            ),
            "data": st.lists(SCALARS, max_size=4) | JSON,
        }
        kept = draw(st.sets(st.sampled_from(sorted(fields)), min_size=3))
        return {key: draw(fields[key]) for key in sorted(kept)}

    head = {
        "model_name": "m",
        "inputs": [tensor() for _ in range(draw(st.integers(0, 2)))],
        "outputs": [tensor() for _ in range(draw(st.integers(0, 2)))],
        "parameters": draw(JSON),
    }
    return json.dumps(head).encode()


@given(plausible())
def test_no_plausible_json_breaks_the_decoder(body: bytes) -> None:
    """The right keys with the wrong values: a value or a refusal."""
    survive(body, None)
    survive(body, len(body))


HUGE = b"9" * 4300
"""The longest number that Python reads."""


@given(st.binary(max_size=200), st.none() | st.integers(-1, 201))
@example(b'{"inputs":[{"name":"a","shape":[' + HUGE + b'],"datatype":"INT8"}]}', None)
@example(b'{"inputs":[],"parameters":{"timeout":' + HUGE + b"}}", None)
@example(b'{"inputs":[{"name":"a","shape":[1],"datatype":"INT8","data":[' + HUGE + b"]}]}", None)
def test_no_garbage_breaks_the_decoder(body: bytes, length: int | None) -> None:
    """Bytes without any sense."""
    survive(body, length)
