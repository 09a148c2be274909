"""Bytes into requests and responses. Raw tensors stay views of the body: nothing is copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, cast

from shared.errors import InvalidRequest, TooLarge
from shared.models import Datatype, ModelSpec, TensorSpec
from shared.tensors import ITEMSIZE, Tensor, check_bytes, frame_bytes, shown
from shared.v2 import header as heads
from shared.v2.header import OutputHead, Parameters, RequestHead, ResponseHead, TensorHead
from shared.v2.jsondata import decode_data
from shared.v2.messages import (
    DEFAULT,
    InferRequest,
    InferResponse,
    Limits,
    RequestedOutput,
    priority,
    timeout_us,
)

_EMPTY: Final = memoryview(b"")
_SHARED_MEMORY: Final = frozenset(
    ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
)
_REFUSED: Final = {
    "sequence_id": "sequences are not supported",
    "sequence_start": "sequences are not supported",
    "sequence_end": "sequences are not supported",
    "headers": "it is reserved",
}


def decode_request(
    body: bytes | memoryview,
    header_length: int | None,
    limits: Limits = DEFAULT,
    *,
    raw_input: TensorSpec | None = None,
) -> InferRequest:
    """The request that a body holds; binary tensors are views of it.

    `header_length` is the number of bytes of JSON, None when the body is all JSON, and 0 for a
    raw binary request: then the body is the one input `raw_input` (see `raw_input_of`).
    Raises `InvalidRequest` or `TooLarge`, naming the tensor and what was expected of it.
    """
    header, rest = heads.split(body, header_length, limits)
    if rest is not None and not header:
        return _raw_request(rest, raw_input, limits)
    head: RequestHead = heads.decode(heads.request_heads, header, limits)
    if head.id is not None and len(head.id) > limits.name_chars:
        raise InvalidRequest(f"the request's id is longer than {limits.name_chars} characters")
    parameters = head.parameters or {}
    binary_default = _check_parameters(parameters, limits) if parameters else False
    return InferRequest(
        id=head.id,
        parameters=parameters,
        inputs=_tensors("input", head.inputs, rest, limits),
        outputs=_requested(head.outputs, limits) if head.outputs else None,
        binary_default=binary_default,
    )


def decode_response(
    body: bytes | memoryview, header_length: int | None, limits: Limits = DEFAULT
) -> InferResponse:
    """The response that a body holds; raises as `decode_request` does. For an error body see
    `error_message`."""
    header, rest = heads.split(body, header_length, limits)
    head: ResponseHead = heads.decode(heads.response_heads, header, limits)
    return InferResponse(
        model_name=head.model_name,
        model_version=head.model_version or "",
        id=head.id,
        parameters=head.parameters or {},
        outputs=_tensors("output", head.outputs, rest, limits),
    )


def raw_input_of(spec: ModelSpec) -> TensorSpec | None:
    """The input of which a raw binary request for this model consists: with a batch dimension
    of 1 where the model batches. None when the model has not exactly one known input."""
    if spec.inputs is None or len(spec.inputs) != 1:
        return None
    (only,) = spec.inputs
    shape = (1, *only.shape) if spec.max_batch_size else only.shape
    return TensorSpec(only.name, only.datatype, shape)


# --- tensors ------------------------------------------------------------------------------


def _tensors(
    kind: str, listed: Sequence[TensorHead], rest: memoryview | None, limits: Limits
) -> tuple[Tensor, ...]:
    """`rest` is cut among the tensors that claim bytes of it, in order, and must be used up."""
    if len(listed) > limits.tensors:
        raise TooLarge(f"{len(listed)} {kind}s, the limit is {limits.tensors}")
    if rest is None:
        rest = _EMPTY
    offset = 0
    tensors = []
    names = set()
    for head in listed:
        name, shape = head.name, head.shape
        if name in names:
            raise InvalidRequest(f"{kind} {shown(name)} is given more than once")
        names.add(name)
        if not 0 < len(name) <= limits.name_chars:
            raise InvalidRequest(
                f"{kind} {shown(name)}: a name must have 1 to {limits.name_chars} characters"
            )
        datatype = cast("Datatype", head.datatype)
        if datatype not in ITEMSIZE:
            raise InvalidRequest(
                f"{kind} {shown(name)}: unknown datatype {shown(datatype)}, expected one of "
                + ", ".join(ITEMSIZE)
            )
        _check_shape(kind, name, shape, limits)
        size = _binary_size(kind, head, limits) if head.parameters else None
        data: bytes | memoryview
        if size is None:
            if not head.data:
                raise InvalidRequest(f"{kind} {shown(name)}: neither data nor binary_data_size")
            where = f"{kind} {shown(name)}"
            data = decode_data(where, datatype, shape, bytes(head.data), limits)
        else:
            if head.data:
                raise InvalidRequest(f"{kind} {shown(name)}: both data and binary_data_size")
            data = rest[offset : offset + size]
            if len(data) != size:
                raise InvalidRequest(
                    f"{kind} {shown(name)}: binary_data_size is {size}, but only "
                    f"{len(data)} bytes are left in the body"
                )
            offset += size
            _check_data(kind, name, datatype, shape, data, limits)
        tensors.append(Tensor(name, datatype, shape, data))
    if offset != len(rest):
        raise InvalidRequest(
            f"{len(rest) - offset} bytes are left over after the last {kind}: "
            f"the binary_data_size of all {kind}s add up to {offset}"
        )
    return tuple(tensors)


def _check_shape(kind: str, name: str, shape: tuple[int, ...], limits: Limits) -> None:
    if len(shape) > limits.rank:
        raise InvalidRequest(
            f"{kind} {shown(name)}: a shape has at most {limits.rank} dimensions, got {len(shape)}"
        )
    elements = 1
    for size in shape:
        if size < 1:
            if size < 0:
                raise InvalidRequest(
                    f"{kind} {shown(name)}: dimensions must be 0 or more, got {_brief(shape)}"
                )
            size = 1  # noqa: PLW2901  (see Limits.elements)
        elements *= size
        if elements > limits.elements:
            raise InvalidRequest(
                f"{kind} {shown(name)}: shape {_brief(shape)} is beyond {limits.elements} elements"
            )


def _brief(shape: tuple[int, ...]) -> str:
    """A shape for a message: a dimension of a thousand digits is not written out."""
    return "[" + ", ".join(str(d) if abs(d) < 2**64 else "(huge)" for d in shape) + "]"


def _binary_size(kind: str, head: TensorHead, limits: Limits) -> int | None:
    """The tensor's `binary_data_size`, None when it has none."""
    parameters = cast("Parameters", head.parameters)
    size = parameters.get("binary_data_size")
    if len(parameters) > 1 or size is None:
        if len(parameters) > limits.tensors:
            raise TooLarge(f"{kind} {shown(head.name)}: more than {limits.tensors} parameters")
        if not _SHARED_MEMORY.isdisjoint(parameters):
            raise InvalidRequest(f"{kind} {shown(head.name)}: shared memory is not supported")
        if size is None:
            return None
    if type(size) is not int or size < 0:  # a bool is not a size
        raise InvalidRequest(
            f"{kind} {shown(head.name)}: binary_data_size must be a whole number from 0, "
            f"got {shown(str(size))}"
        )
    return size


def _check_data(
    kind: str,
    name: str,
    datatype: Datatype,
    shape: tuple[int, ...],
    data: memoryview,
    limits: Limits,
) -> None:
    """Whether raw data are what datatype and shape say."""
    count = math.prod(shape)
    itemsize = ITEMSIZE[datatype]
    if itemsize is not None:
        if len(data) != count * itemsize:
            raise InvalidRequest(
                f"{kind} {shown(name)}: {datatype} of shape {list(shape)} takes "
                f"{count * itemsize} bytes, binary_data_size is {len(data)}"
            )
        return
    if count > limits.bytes_elements:
        raise TooLarge(
            f"{kind} {shown(name)}: {count} BYTES elements, the limit is {limits.bytes_elements}"
        )
    try:
        check_bytes(data, count)
    except InvalidRequest as error:
        raise InvalidRequest(f"{kind} {shown(name)}: {error.message}") from None


def _raw_request(body: memoryview, spec: TensorSpec | None, limits: Limits) -> InferRequest:
    """A body that is one tensor without any header; all outputs are then wanted as raw bytes."""
    if spec is None:
        raise InvalidRequest(
            "an inference header length of 0 is a raw binary request, which is only for models "
            "with exactly one known input: send a JSON header"
        )
    where = f"input {shown(spec.name)}"
    fixed = math.prod(size for size in spec.shape if size >= 0)
    itemsize = ITEMSIZE[spec.datatype]
    shape = spec.shape
    data = body
    if itemsize is None:
        # The whole body is one element, without its length before it.
        if fixed != 1:
            raise InvalidRequest(f"{where}: a raw binary request holds one BYTES element")
        shape = tuple(1 for _ in spec.shape)
        data = memoryview(frame_bytes([bytes(body)]))
    elif shape.count(-1) > 1:
        raise InvalidRequest(f"{where}: shape {list(shape)} cannot follow from a raw body's size")
    elif -1 in shape:
        variable = len(body) // (fixed * itemsize) if fixed else 0
        shape = tuple(variable if size < 0 else size for size in shape)
    _check_shape("input", spec.name, shape, limits)
    if itemsize is not None and len(body) != math.prod(shape) * itemsize:
        raise InvalidRequest(
            f"{where}: {len(body)} bytes do not make {spec.datatype} of shape {list(spec.shape)}"
        )
    tensor = Tensor(spec.name, spec.datatype, shape, data)
    return InferRequest(inputs=(tensor,), binary_default=True)


# --- the rest of a request ------------------------------------------------------------------


def _check_parameters(parameters: Parameters, limits: Limits) -> bool:
    """Checks the request's parameters and takes `binary_data_output` out, which it returns."""
    if len(parameters) > limits.tensors:
        raise TooLarge(f"{len(parameters)} parameters, the limit is {limits.tensors}")
    binary = parameters.pop("binary_data_output", False)
    if not isinstance(binary, bool):
        raise InvalidRequest("parameter 'binary_data_output' must be true or false")
    if parameters:
        for key in parameters:
            if key in _REFUSED or key.startswith("triton_"):
                reason = _REFUSED.get(key, "names that begin with 'triton_' are reserved")
                raise InvalidRequest(f"parameter {shown(key)} is refused: {reason}")
        timeout_us(parameters)
        priority(parameters)
    return binary


def _requested(listed: list[OutputHead], limits: Limits) -> tuple[RequestedOutput, ...]:
    if len(listed) > limits.tensors:
        raise TooLarge(f"{len(listed)} requested outputs, the limit is {limits.tensors}")
    names = set()
    outputs = []
    for head in listed:
        if head.name in names:
            raise InvalidRequest(f"output {shown(head.name)} is requested more than once")
        names.add(head.name)
        binary = None
        if head.parameters:
            flag = head.parameters.get("binary_data")
            if flag is not None and not isinstance(flag, bool):
                raise InvalidRequest(
                    f"output {shown(head.name)}: binary_data must be true or false"
                )
            binary = flag
            if "classification" in head.parameters:
                raise InvalidRequest(f"output {shown(head.name)}: classification is not supported")
            if not _SHARED_MEMORY.isdisjoint(head.parameters):
                raise InvalidRequest(f"output {shown(head.name)}: shared memory is not supported")
        outputs.append(RequestedOutput(head.name, binary))
    return tuple(outputs)
