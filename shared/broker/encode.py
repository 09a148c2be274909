"""The AMQP frames that Roost sends most, built by hand: publish, ack, reject.

pamqp builds any frame from descriptions of its fields, at some tens of microseconds each; one
gateway core answers about twice as many requests with these. Everything rarer goes through
aiormq. Sizes: strings of a frame have at most 255 bytes, integers 64 bits.
"""

from __future__ import annotations

import struct
from typing import Final

from shared.broker.frames import (
    BODY_FRAME,
    FRAME_END,
    HEADER_FRAME,
    MAX_PROPERTIES_BYTES,
    METHOD_FRAME,
)
from shared.broker.port import HeaderValue, Message
from shared.errors import InvalidRequest

_HEAD: Final = struct.Struct(">BHI")
_END: Final = bytes([FRAME_END])
_CONTENT: Final = struct.Struct(">HHQ")
_ANSWER: Final = struct.Struct(">BHIHHQBB")
_BASIC: Final = 60
_PUBLISH: Final = struct.pack(">HHH", _BASIC, 40, 0)
_ACK: Final = 80
_REJECT: Final = 90
_FRAME_OVERHEAD: Final = 8
_MAX_EXPIRATION_MS: Final = 2**31

_CONTENT_TYPE: Final = 1 << 15
_HEADERS: Final = 1 << 13
_DELIVERY_MODE: Final = 1 << 12
_PRIORITY: Final = 1 << 11
_CORRELATION_ID: Final = 1 << 10
_REPLY_TO: Final = 1 << 9
_EXPIRATION: Final = 1 << 8
_MESSAGE_ID: Final = 1 << 7


def ack_frame(channel: int, delivery_tag: int) -> bytes:
    """basic.ack of one delivery."""
    return _ANSWER.pack(METHOD_FRAME, channel, 13, _BASIC, _ACK, delivery_tag, 0, FRAME_END)


def requeue_frame(channel: int, delivery_tag: int) -> bytes:
    """basic.reject of one delivery, back into its queue."""
    return _ANSWER.pack(METHOD_FRAME, channel, 13, _BASIC, _REJECT, delivery_tag, 1, FRAME_END)


def publish_frames(
    channel: int,
    exchange: str,
    routing_key: str,
    message: Message,
    *,
    headers: dict[str, HeaderValue],
    message_id: str,
    mandatory: bool,
    frame_max: int,
) -> bytes:
    """basic.publish, content header and body. `headers` and `message_id` take the place of the
    message's own. Raises `InvalidRequest` when a property does not fit its AMQP type."""
    try:
        method = b"".join(
            (_PUBLISH, _short(exchange), _short(routing_key), b"\x01" if mandatory else b"\x00")
        )
        header = _CONTENT.pack(_BASIC, 0, len(message.body)) + _properties(
            message, headers, message_id
        )
    except (struct.error, UnicodeEncodeError, TypeError) as error:
        raise InvalidRequest(f"a message property cannot be sent: {error}") from error
    room = frame_max - _FRAME_OVERHEAD
    limit = min(MAX_PROPERTIES_BYTES, room - _CONTENT.size)
    if len(header) - _CONTENT.size > limit:
        raise InvalidRequest(f"message properties take more than {limit} bytes")
    parts: list[bytes | memoryview] = [
        _HEAD.pack(METHOD_FRAME, channel, len(method)),
        method,
        _END,
        _HEAD.pack(HEADER_FRAME, channel, len(header)),
        header,
        _END,
    ]
    body = memoryview(message.body)
    for start in range(0, len(body), room):
        piece = body[start : start + room]
        parts += (_HEAD.pack(BODY_FRAME, channel, len(piece)), piece, _END)
    return b"".join(parts)


def _properties(message: Message, headers: dict[str, HeaderValue], message_id: str) -> bytes:
    """Flags and values, in the order of the flags."""
    flags = _DELIVERY_MODE | _MESSAGE_ID
    parts = []
    if message.content_type is not None:
        flags |= _CONTENT_TYPE
        parts.append(_short(message.content_type))
    if headers:
        flags |= _HEADERS
        parts.append(_table(headers))
    parts.append(b"\x02" if message.persistent else b"\x01")
    if message.priority is not None:
        flags |= _PRIORITY
        parts.append(struct.pack(">B", message.priority))
    if message.correlation_id is not None:
        flags |= _CORRELATION_ID
        parts.append(_short(message.correlation_id))
    if message.reply_to is not None:
        flags |= _REPLY_TO
        parts.append(_short(message.reply_to))
    if message.expiration_ms is not None:
        flags |= _EXPIRATION
        # Beyond these bounds the broker closes the channel.
        parts.append(_short(str(min(max(message.expiration_ms, 0), _MAX_EXPIRATION_MS))))
    parts.append(_short(message_id))
    return flags.to_bytes(2, "big") + b"".join(parts)


def _table(headers: dict[str, HeaderValue]) -> bytes:
    fields = b"".join(_short(key) + _field(value) for key, value in headers.items())
    return struct.pack(">I", len(fields)) + fields


def _field(value: HeaderValue) -> bytes:
    """A typed value; the type letters are those of RabbitMQ."""
    match value:
        case str():
            text = value.encode()
            return b"S" + struct.pack(">I", len(text)) + text
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int():
            return b"l" + struct.pack(">q", value)
        case float():
            return b"d" + struct.pack(">d", value)
        case bytes():
            return b"x" + struct.pack(">I", len(value)) + value
        case None:
            return b"V"
    raise TypeError(f"a header of type {type(value).__name__}")


def _short(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">B", len(raw)) + raw
