"""The JSON header: its structs, and decoding it without trusting it."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
import numpy as np

from shared.errors import InvalidRequest, TooLarge
from shared.models import Scalar
from shared.tensors import shown
from shared.v2.messages import Limits

Parameters = dict[str, Scalar]


class TensorHead(msgspec.Struct):
    """An input of a request or an output of a response."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: Parameters | None = None
    data: msgspec.Raw = msgspec.Raw()
    """Undecoded: what it must be follows from datatype and shape, which may stand after it."""


class OutputHead(msgspec.Struct):
    """An output that a request asks for."""

    name: str
    parameters: Parameters | None = None


class RequestHead(msgspec.Struct):
    inputs: list[TensorHead]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[OutputHead] | None = None


class ResponseHead(msgspec.Struct):
    model_name: str
    outputs: list[TensorHead]
    model_version: str | None = None
    id: str | None = None
    parameters: Parameters | None = None


class _Named(msgspec.Struct):
    name: str = ""


class _Names(msgspec.Struct):
    """Only names: to tell which tensor an error is about."""

    inputs: list[_Named] = []
    outputs: list[_Named] = []


request_heads: Final = msgspec.json.Decoder(RequestHead)
response_heads: Final = msgspec.json.Decoder(ResponseHead)
_names: Final = msgspec.json.Decoder(_Names)
_PLACE: Final = re.compile(r"^(.*?)(?: - at `\$(?:\.(inputs|outputs)\[(\d+)\])?(.*)`)?$", re.DOTALL)


def split(
    body: bytes | memoryview, length: object, limits: Limits
) -> tuple[bytes, memoryview | None]:
    """The JSON header, and the raw tensors after it (None where no length announces them)."""
    size = len(body)
    if size > limits.body_bytes:
        raise TooLarge(f"the body has {size} bytes, the limit is {limits.body_bytes}")
    if length is None:
        return bytes(body), None
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= size:
        raise InvalidRequest(
            f"the inference header length must be from 0 to the body's {size} bytes, "
            f"got {shown(str(length))}"
        )
    if length > limits.header_bytes and length < size:
        raise TooLarge(
            f"the JSON header has {length} bytes, the limit before raw tensors is "
            f"{limits.header_bytes}"
        )
    return bytes(body[:length]), memoryview(body)[length:]


def decode(decoder: msgspec.json.Decoder[Any], header: bytes, limits: Limits) -> Any:
    """Decodes a header. Raises `InvalidRequest` that names the tensor where there is one."""
    if header.count(b"[") + header.count(b"{") > limits.depth and _too_deep(header, limits.depth):
        raise InvalidRequest(f"the JSON is nested more than {limits.depth} deep")
    try:
        return decoder.decode(header)
    except (ValueError, RecursionError) as error:  # msgspec's errors, and UTF-8's, are ValueErrors
        raise InvalidRequest(_explained(header, error)) from None


_UNMARKED: Final = bytes(sorted(set(range(256)) - set(b'[]{}"')))
_CHUNK: Final = 1024 * 1024
_STEP: Final = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def _too_deep(header: bytes, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than `limit`. Vectorised, in chunks: a body
    of brackets alone must cost neither seconds nor many times its size."""
    if b"\\" in header:  # take escaped quotes away, minding escaped backslashes before them
        header = header.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = header.translate(None, _UNMARKED)
    depth = quotes = 0
    for start in range(0, len(marks), _CHUNK):
        piece = np.frombuffer(marks[start : start + _CHUNK], dtype=np.uint8)
        seen = np.cumsum(piece == ord('"'), dtype=np.int32) + quotes
        levels = np.cumsum(np.where(seen & 1, 0, _STEP[piece]), dtype=np.int32) + depth
        if int(levels.max()) > limit:
            return True
        depth, quotes = int(levels[-1]), int(seen[-1])
    return False


def _explained(header: bytes, error: Exception) -> str:
    """The error in the caller's terms: `$.inputs[3].shape` becomes the tensor's own name."""
    if isinstance(error, UnicodeError):
        return "the JSON header is not UTF-8"
    if isinstance(error, RecursionError):
        return "the JSON is nested too deep"
    if not isinstance(error, msgspec.ValidationError):
        detail = str(error).removeprefix("JSON is malformed: ")[:200]
        return f"the JSON header is malformed: {detail}"
    place = _PLACE.match(str(error))
    assert place is not None, "the pattern matches any text"
    what, kind, index, rest = place.groups(default="")
    what = what[:200].replace("`", "")
    at = rest.lstrip(".")
    where = f", at {at}" if at else ""
    if not kind:
        return f"the JSON header is not valid: {what}{where}"
    return f"{kind[:-1]} {_name_at(header, kind, int(index))}: {what}{where}"


def _name_at(header: bytes, kind: str, index: int) -> str:
    try:
        name: str = getattr(_names.decode(header), kind)[index].name
    except (ValueError, RecursionError, IndexError):
        name = ""
    return shown(name) if name else f"number {index}"
