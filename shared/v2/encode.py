"""Requests and responses into bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from shared.errors import InvalidRequest, TooLarge
from shared.models import Datatype, Scalar
from shared.tensors import Tensor, shown
from shared.v2.jsondata import encode_data
from shared.v2.messages import DEFAULT, ErrorBody, InferRequest, Limits


class _Tensor(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    parameters: dict[str, bool] | None = None


class _Request(msgspec.Struct, omit_defaults=True):
    inputs: list[_Tensor]
    id: str | None = None
    parameters: dict[str, Scalar] | None = None
    outputs: list[_Output] | None = None


class _Response(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_Tensor]
    id: str | None = None


_encoder: Final = msgspec.json.Encoder()


def encode_request(request: InferRequest, *, binary: bool = True) -> tuple[bytes, int | None]:
    """The body and its header length (None: all of it is JSON).

    Inputs travel as raw bytes, or with `binary=False` as JSON, which raises `InvalidRequest`
    for what JSON cannot say.
    """
    raw: list[bytes | memoryview] = []
    inputs = [_listed("input", tensor, raw, binary=binary) for tensor in request.inputs]
    parameters = dict(request.parameters)
    if request.binary_default:
        parameters["binary_data_output"] = True
    outputs = None
    if request.outputs is not None:
        outputs = [
            _Output(wanted.name, None if wanted.binary is None else {"binary_data": wanted.binary})
            for wanted in request.outputs
        ]
    header = _encoder.encode(_Request(inputs, request.id, parameters or None, outputs))
    return _joined(header, raw)


def encode_response(
    model: str,
    version: str | int,
    request_id: str | None,
    outputs: Sequence[Tensor],
    request: InferRequest,
    limits: Limits = DEFAULT,
) -> tuple[bytes, int | None]:
    """The reply to `request`, with the outputs it asks for, in its order, each as raw bytes or
    as JSON as it wishes.

    Raises `InvalidRequest` when it asks for an output that is not there or wants as JSON what
    JSON cannot say, and `TooLarge` when the reply is beyond `limits.body_bytes`.
    """
    raw: list[bytes | memoryview] = []
    if request.outputs is None:
        listed = [
            _listed("output", tensor, raw, binary=request.binary_default) for tensor in outputs
        ]
    else:
        by_name = {tensor.name: tensor for tensor in outputs}
        listed = []
        for wanted in request.outputs:
            tensor = by_name.get(wanted.name)
            if tensor is None:
                raise InvalidRequest(
                    f"output {shown(wanted.name)} is requested, the model gives "
                    + ", ".join(shown(name) for name in by_name)
                )
            binary = request.binary_default if wanted.binary is None else wanted.binary
            listed.append(_listed("output", tensor, raw, binary=binary))
    header = _encoder.encode(_Response(model, str(version), listed, request_id))
    size = len(header) + sum(map(len, raw))
    if size > limits.body_bytes:
        raise TooLarge(f"the reply has {size} bytes, the limit is {limits.body_bytes}")
    if raw and len(header) > limits.header_bytes:
        raise TooLarge(
            f"the reply's JSON has {len(header)} bytes, the limit before raw tensors is "
            f"{limits.header_bytes}"
        )
    return _joined(header, raw)


def error_body(message: str) -> bytes:
    """The protocol's error: `{"error": message}`."""
    return _encoder.encode(ErrorBody(message.encode(errors="replace").decode()))


def _listed(kind: str, tensor: Tensor, raw: list[bytes | memoryview], *, binary: bool) -> _Tensor:
    """The tensor's entry in the header; its bytes, if they go raw, are added to `raw`."""
    if binary:
        data = tensor.data
        if len(data):
            raw.append(data)
        return _Tensor(tensor.name, tensor.datatype, tensor.shape, {"binary_data_size": len(data)})
    data_list = encode_data(f"{kind} {shown(tensor.name)}", tensor)
    return _Tensor(tensor.name, tensor.datatype, tensor.shape, None, data_list)


def _joined(header: bytes, raw: list[bytes | memoryview]) -> tuple[bytes, int | None]:
    if not raw:  # nor is a length told when every raw tensor is empty, as Triton does it
        return header, None
    return b"".join((header, *raw)), len(header)
