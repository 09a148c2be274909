"""What the protocol's messages say, and the limits put on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from shared.errors import InvalidRequest
from shared.models import Scalar
from shared.tensors import Tensor, shown


class Limits(msgspec.Struct, frozen=True):
    """What a body may ask of us. Each is checked before the memory it bounds is taken."""

    body_bytes: int = 15 * 1024 * 1024
    """RabbitMQ 4 takes 16 MiB a message; the rest is for properties and packing."""
    header_bytes: int = 1024 * 1024
    """JSON in front of raw tensors only describes them. Without raw tensors it holds the data
    and is bounded by `body_bytes`."""
    depth: int = 32
    """Nesting of JSON; the protocol itself needs 4 and the rank of a tensor."""
    tensors: int = 256
    """Inputs, requested outputs, and parameters at one place: this many of each."""
    rank: int = 8
    name_chars: int = 256
    """Of a tensor's name and of the request's id."""
    elements: int = 2**31 - 1
    """Of a shape, with its zeros taken as ones, so that strides cannot overflow either."""
    json_elements: int = 4 * 1024 * 1024
    """Of one tensor whose data stand in the JSON: each costs some 32 bytes while decoding."""
    bytes_elements: int = 1024 * 1024
    """Of one BYTES tensor: each is an object, and is visited in turn."""


DEFAULT: Final = Limits()


class RequestedOutput(msgspec.Struct, frozen=True):
    name: str
    binary: bool | None = None
    """None: as the request's `binary_default` says."""


class InferRequest(msgspec.Struct, frozen=True):
    id: str | None = None
    """Echoed in the response."""
    parameters: dict[str, Scalar] = {}
    """Of the request as a whole, without `binary_data_output`."""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[RequestedOutput, ...] | None = None
    """None: all that the model gives."""
    binary_default: bool = False
    """Whether outputs that do not say otherwise are wanted as raw bytes."""


class InferResponse(msgspec.Struct, frozen=True):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Scalar] = {}
    outputs: tuple[Tensor, ...] = ()


class ErrorBody(msgspec.Struct, frozen=True):
    error: str


_errors = msgspec.json.Decoder(ErrorBody)
_LENGTH: Final = re.compile(r"[0-9]{1,12}\Z")
_MAX_TIMEOUT_US: Final = 2**53


def error_message(body: bytes | memoryview) -> str | None:
    """What an error body says, or None when the body is none."""
    try:
        return _errors.decode(body).error
    except (ValueError, RecursionError):
        return None


def parse_header_length(value: object) -> int | None:
    """The header length from an HTTP or AMQP header's value; None when there is none.

    Raises `InvalidRequest` for what is not a whole number from 0.
    """
    if value is None:
        return None
    if isinstance(value, bytes | bytearray):
        value = bytes(value[:40]).decode("latin-1")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and _LENGTH.match(value):
        return int(value)
    raise InvalidRequest(
        f"the inference header length must be a whole number from 0, got {shown(str(value))}"
    )


def timeout_us(parameters: Mapping[str, Scalar]) -> int | None:
    """How many microseconds the caller will wait, or None when he does not say (0 is that too).

    Raises `InvalidRequest`.
    """
    return _whole(parameters, "timeout", _MAX_TIMEOUT_US) or None


def priority(parameters: Mapping[str, Scalar]) -> int:
    """The request's priority: 1 is the highest, 0 means the default. Raises `InvalidRequest`."""
    return _whole(parameters, "priority", 2**64 - 1)


def message_priority(level: int) -> int:
    """AMQP's `priority` of a request: 9 for the highest level, which the protocol calls 1, down
    to 1 for the ninth and all below; 0, the default, for 0."""
    return max(10 - level, 1) if level else 0


def priority_level(message_priority: int | None) -> int:
    """The protocol's level for AMQP's `priority`; 0, the default, for none and for 0, which
    clients send who think nothing of it."""
    return 10 - min(message_priority, 9) if message_priority else 0


def _whole(parameters: Mapping[str, Scalar], key: str, most: int) -> int:
    value = parameters.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise InvalidRequest(
            f"parameter {key!r} must be a whole number from 0 to {most}, got {shown(str(value))}"
        )
    return value
