"""One request message: received in time, unpacked within its limit, and parsed.

gRPC's own unpacking measures a message only when all of it is in memory, and a few kilobytes can
unpack to gigabytes. So it is switched off (`server.py`), and what arrives is unpacked here as HTTP
does it. Parsing too can take far more memory than the message: fields are counted before.
"""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from services.gateway.body import Held, SlowBody, decompressed
from services.gateway.grpc.context import Context
from shared.errors import InvalidRequest, TooLarge

MessageT = TypeVar("MessageT")

_GZIP: Final = b"\x1f\x8b"
"""As a protobuf message this would begin with a wire type that does not exist."""
_FEW_BYTES: Final = 64 * 1024
"""Smaller messages are parsed as they are: they cannot become large."""
_MOST_FIELDS: Final = 4096
"""More than `v2.Limits` lets any request have. An empty one takes 2 bytes, and some 100 parsed."""


_GROUPS: Final = (3, 4)
"""Begin and end of one, as kinds of fields."""


class NoMessage(Exception):
    """The call ended before its message: it was cancelled, or refused for its size."""


async def receive(context: Context, held: Held | None, limit_bytes: int, timeout_s: float) -> bytes:
    """The call's message, unpacked; its bytes are counted in `held`. None is for small ones: what
    only asks how things are, must be answered also when memory is short.

    Raises `NoMessage`, `SlowBody`, `TooLarge`, `InvalidRequest`, `Rejected`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            message = await context.read()
    except TimeoutError:
        raise SlowBody(f"the message did not arrive within {timeout_s:g} s") from None
    if not isinstance(message, bytes):
        raise NoMessage
    if len(message) > limit_bytes:
        raise TooLarge(f"the message has {len(message)} bytes, the limit is {limit_bytes}")
    if held is not None:
        held.grow(len(message))
    encoding = _encoding(message)
    if encoding is None:
        return message
    return await decompressed(message, encoding, held, limit_bytes)


def parsed(kind: type[MessageT], message: bytes, nested: frozenset[int] = frozenset()) -> MessageT:
    """The message as one of `kind`. `nested` are the fields whose own fields count too. Raises
    `InvalidRequest`, `TooLarge`."""
    if len(message) > _FEW_BYTES:
        _count_fields(message, nested)
    try:
        found: MessageT = kind.FromString(message)  # type: ignore[attr-defined]  # of protobuf
    except DecodeError:
        raise InvalidRequest(f"the message is no {kind.__name__}") from None
    return found


def _encoding(message: bytes) -> bytes | None:
    """Whether a message is packed is not handed on by gRPC, so its first bytes tell. zlib's would
    be an unknown field 15 of number 28, 94 or so on: no request has that."""
    if message[:2] == _GZIP:
        return b"gzip"
    if len(message) >= 2 and message[0] == 0x78 and (message[0] << 8 | message[1]) % 31 == 0:
        return b"deflate"
    return None


def _count_fields(message: bytes, nested: frozenset[int]) -> None:
    """Raises `TooLarge` for too many fields. What is no protobuf, is left to the parser."""
    count = 0
    todo = [(0, len(message), nested)]
    while todo:
        at, end, inner = todo.pop()
        while at < end:
            count += 1
            if count > _MOST_FIELDS:
                raise TooLarge(f"the message has more than {_MOST_FIELDS} fields")
            tag, at = _number(message, at)
            kind = tag & 7
            if kind == 0:
                _, at = _number(message, at)
            elif kind == 1:
                at += 8
            elif kind == 2:
                size, at = _number(message, at)
                if tag >> 3 in inner:
                    todo.append((at, min(at + size, end), frozenset()))
                at += size
            elif kind == 5:
                at += 4
            elif kind in _GROUPS:
                # Older than protobuf 2: the parser would skip it, and read on behind it.
                raise InvalidRequest("the message has groups, which no request has")
            else:
                return


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where the next field begins."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at
