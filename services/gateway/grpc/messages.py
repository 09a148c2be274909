"""Inference messages between protobuf and the protocol's v2 bytes, which travel to the worker.

Nothing is judged twice: a message becomes v2 bytes, and whatever reads those for HTTP reads them
here. Only what a protobuf message alone can get wrong is refused in this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
import numpy as np

from services.gateway.grpc import inference_pb2 as pb
from shared import v2
from shared.errors import InvalidRequest, TooLarge
from shared.models import Datatype, Scalar
from shared.tensors import ITEMSIZE, NUMPY, frame_bytes, from_numpy, shown

_RAW_OUTPUT: Final = b"\x32"
"""Tag of `raw_output_contents`: field 6, with a length before it."""
_CONTENTS: Final[dict[str, tuple[str, Datatype]]] = {
    "BOOL": ("bool_contents", "BOOL"),
    "INT8": ("int_contents", "INT32"),
    "INT16": ("int_contents", "INT32"),
    "INT32": ("int_contents", "INT32"),
    "INT64": ("int64_contents", "INT64"),
    "UINT8": ("uint_contents", "UINT32"),
    "UINT16": ("uint_contents", "UINT32"),
    "UINT32": ("uint_contents", "UINT32"),
    "UINT64": ("uint64_contents", "UINT64"),
    "FP32": ("fp32_contents", "FP32"),
    "FP64": ("fp64_contents", "FP64"),
    "BYTES": ("bytes_contents", "BYTES"),
}
"""Where a tensor's elements stand in `InferTensorContents`, and as what."""

_ELEMENT_BYTES: Final = 16


class _Input(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Scalar]


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    parameters: dict[str, Scalar] | None = None


class _Request(msgspec.Struct, omit_defaults=True):
    inputs: list[_Input]
    parameters: dict[str, Scalar]
    id: str | None = None
    outputs: list[_Output] | None = None


_encode: Final = msgspec.json.Encoder().encode


def infer_body(message: pb.ModelInferRequest, limits: v2.Limits) -> tuple[bytes, int | None]:
    """The request as a v2 body and its header length (None: there are no raw tensors). Every
    output is asked for as raw bytes. Raises `InvalidRequest`, `TooLarge`."""
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} tensors, inputs has {len(message.inputs)}"
        )
    inputs, pieces, size = [], [], 0
    for index, tensor in enumerate(message.inputs):
        parameters = parameters_of(tensor.parameters)
        where = f"input {shown(tensor.name)}"
        if raw and tensor.HasField("contents"):
            raise InvalidRequest(f"{where}: both contents and raw_input_contents")
        if len(tensor.shape) > limits.rank:  # before they are multiplied
            raise InvalidRequest(f"{where}: a shape has at most {limits.rank} dimensions")
        data = raw[index] if raw else _typed(where, tensor, limits)
        size += len(data)
        if size > limits.body_bytes:
            raise TooLarge(f"the tensors have more than {limits.body_bytes} bytes")
        parameters["binary_data_size"] = len(data)
        inputs.append(_Input(tensor.name, tensor.datatype, list(tensor.shape), parameters))
        pieces.append(data)
    parameters = parameters_of(message.parameters)
    parameters["binary_data_output"] = True
    outputs = [_output(output) for output in message.outputs] or None
    header = _encode(_Request(inputs, parameters, message.id or None, outputs))
    return b"".join((header, *pieces)), len(header) if size else None


def typed_bytes(message: pb.ModelInferRequest) -> int:
    """What the elements in `contents` take as parsed: a byte on the wire may be eight here, and an
    empty text sixteen."""
    total = 0
    for tensor in message.inputs:
        if tensor.HasField("contents"):
            for field, _ in _CONTENTS.values():
                total += _ELEMENT_BYTES * len(getattr(tensor.contents, field))
    return total


def infer_response(body: bytes, header_length: int | None) -> bytes:
    """A serialised `ModelInferResponse` of a good reply's body."""
    # What a worker says is within the limit that the broker sets.
    response = v2.decode_response(body, header_length, v2.Limits(body_bytes=len(body)))
    head: bytes = pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id or "",
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
            )
            for tensor in response.outputs
        ],
    ).SerializeToString()
    # Joined by hand: protobuf would copy every tensor twice more.
    parts: list[bytes | memoryview] = [head]
    for tensor in response.outputs:
        parts += (_RAW_OUTPUT, _varint(len(tensor.data)), tensor.data)
    return b"".join(parts)


def parameters_of(given: Mapping[str, Any]) -> dict[str, Scalar]:
    """Of a request, a tensor or a `load`: names and plain values. Raises `InvalidRequest`."""
    parameters: dict[str, Scalar] = {}
    for key in given:
        parameter = given[key]
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise InvalidRequest(f"parameter {shown(key)} has no value")
        value = getattr(parameter, choice)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"parameter {shown(key)} must be finite, got {value}")
        parameters[key] = value
    return parameters


def _output(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> _Output:
    parameters = parameters_of(output.parameters)
    parameters.pop("binary_data", None)  # HTTP's; an answer over gRPC is raw
    return _Output(output.name, parameters or None)


def _typed(
    where: str, tensor: pb.ModelInferRequest.InferInputTensor, limits: v2.Limits
) -> bytes | memoryview:
    """The elements in `contents` as raw bytes. Nothing is fine for a tensor without elements."""
    datatype = cast("Datatype", tensor.datatype)
    if datatype not in ITEMSIZE:
        raise InvalidRequest(
            f"{where}: unknown datatype {shown(datatype)}, expected one of " + ", ".join(ITEMSIZE)
        )
    if not tensor.HasField("contents"):
        return b""
    contents = tensor.contents
    if datatype not in _CONTENTS:
        raise InvalidRequest(f"{where}: {datatype} has no contents, use raw_input_contents")
    field, wide = _CONTENTS[datatype]
    for other, _ in contents.ListFields():
        if other.name != field:
            raise InvalidRequest(f"{where}: {datatype} stands in {field}, not in {other.name}")
    elements = getattr(contents, field)
    count = len(elements)
    most = limits.bytes_elements if datatype == "BYTES" else limits.json_elements
    if count > most:
        raise TooLarge(f"{where}: {count} elements, the limit is {most}; use raw_input_contents")
    wanted = math.prod(tensor.shape)
    if count != wanted:
        raise InvalidRequest(
            f"{where}: {field} has {count} elements, shape {list(tensor.shape)} holds {wanted}"
        )
    if datatype == "BYTES":
        return frame_bytes(elements)
    array = np.fromiter(elements, NUMPY[wide], count=count)
    try:
        return from_numpy(tensor.name, array, datatype).data
    except InvalidRequest as error:
        raise InvalidRequest(error.message.replace("tensor", "input", 1)) from None


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
