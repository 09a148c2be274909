"""Packs: messages of one model that travel as one, and are single messages again where they
arrive (docs/adr/0019).

A pack's body is the length of its index (4 bytes, big-endian), the index (msgpack, one `_Member`
for each) and the members' bodies in that order. What all members must have in common (`reply_to`,
`priority`) are the pack's own properties. A pack may come from anybody: what is not one costs
that message (`BadPack`), nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec

from shared.broker.port import HeaderValue, Message
from shared.errors import RoostError
from shared.names import HEADER_DEADLINE, HEADER_MEMBERS

CONTENT_TYPE: Final = "application/vnd.roost.pack"
MAX_MEMBERS: Final = 1024
MAX_BYTES: Final = 1024 * 1024
"""Of the bodies in one pack that we make. Copying what is large saves nothing, and a large
message holds up those behind it; requests near this size travel alone."""
_MAX_ID_BYTES: Final = 255
"""As of a property of AMQP."""
_LENGTH: Final = struct.Struct(">I")

_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None)})
_MAX_INT: Final = 2**63 - 1
"""AMQP has no greater ones."""
_Name = Annotated[str, msgspec.Meta(max_length=60)]
"""Of a header; in AMQP up to 255 bytes."""


class BadPack(RoostError):
    """What calls itself a pack is none; the message says why."""

    code = "invalid_argument"


class _Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message in the index. Later fields get defaults."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    """Bytes of its body."""
    correlation_id: str | None
    headers: dict[_Name, Any] = {}
    expiration_ms: Annotated[int, msgspec.Meta(ge=0, le=2**31)] | None = None


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(
    Annotated[list[_Member], msgspec.Meta(min_length=1, max_length=MAX_MEMBERS)]
).decode


def is_pack(message: Message) -> bool:
    """Whether it says that it is one."""
    return message.content_type == CONTENT_TYPE


def count(message: Message) -> int:
    """How many members it says it has; 1 for a single message. Without reading it."""
    told = message.headers.get(HEADER_MEMBERS) if is_pack(message) else 1
    return told if isinstance(told, int) and 0 < told <= MAX_MEMBERS else 1


def pack(messages: Sequence[Message]) -> Message:
    """One message of 1 to `MAX_MEMBERS`, which have `reply_to` and `priority` in common. A single
    one is returned as it is. The broker may drop the pack once all members have expired."""
    first = messages[0]
    if len(messages) == 1:
        return first
    if len(messages) > MAX_MEMBERS:
        raise ValueError(f"{len(messages)} messages in one pack")
    index = _encode([(len(m.body), m.correlation_id, m.headers, m.expiration_ms) for m in messages])
    headers: dict[str, HeaderValue] = {HEADER_MEMBERS: len(messages)}
    deadlines = [m.headers.get(HEADER_DEADLINE) for m in messages]
    numbers = [at for at in deadlines if isinstance(at, int)]
    if len(numbers) == len(messages):
        headers[HEADER_DEADLINE] = max(numbers)
    expirations = [m.expiration_ms for m in messages if m.expiration_ms is not None]
    return Message(
        body=b"".join((_LENGTH.pack(len(index)), index, *(m.body for m in messages))),
        headers=headers,
        reply_to=first.reply_to,
        content_type=CONTENT_TYPE,
        expiration_ms=max(expirations) if len(expirations) == len(messages) else None,
        priority=first.priority,
        persistent=any(message.persistent for message in messages),
    )


def members(message: Message) -> list[Message]:
    """The messages of a pack, as they were when it was made, but for what the broker or the
    placer has changed of the pack since. Raises `BadPack`."""
    body = message.body
    try:
        (length,) = _LENGTH.unpack_from(body)
        at = _LENGTH.size + length
        if at > len(body):
            raise BadPack("the index is longer than the pack")
        found = _decode(memoryview(body)[_LENGTH.size : at])
    except (struct.error, ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        raise BadPack(f"its index cannot be read: {error}") from None
    reply_to, priority, persistent = message.reply_to, message.priority, message.persistent
    singles: list[Message] = []
    for member in found:
        end = at + member.size
        id_ = member.correlation_id
        if id_ is not None and len(id_) * 4 > _MAX_ID_BYTES and len(id_.encode()) > _MAX_ID_BYTES:
            raise BadPack(f"a correlation_id of more than {_MAX_ID_BYTES} bytes")
        for value in member.headers.values():
            if type(value) not in _PLAIN or (type(value) is int and value > _MAX_INT):
                raise BadPack("a header's value is not one of AMQP's plain ones")
        singles.append(
            Message(
                body=body[at:end],
                headers=member.headers,
                reply_to=reply_to,
                correlation_id=id_ or None,
                expiration_ms=member.expiration_ms,
                priority=priority,
                persistent=persistent,
            )
        )
        at = end
    if at != len(body):
        raise BadPack(f"its members take {at} bytes, it has {len(body)}")
    return singles
