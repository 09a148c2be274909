"""Reading AMQP frames so that what a hostile producer wrote costs one message, not a connection.

RabbitMQ forwards properties without decoding all of them; pamqp then raises (a correlation id
that is not UTF-8, a timestamp beyond 2⁶³, tables nested thousands deep), and aiormq drops the
whole connection: the message returns to its queue and takes down whoever reads it next. Here a
header that cannot be decoded becomes a `MalformedHeader` with the right body size, and a
routing key that is not text becomes a `MangledDeliver`; the stream goes on.

aiormq has no hook for this, so `install` replaces its `FrameReceiver`. Each receiver announces
itself to the `Tap` in whose context it was made: an aiormq that no longer uses it is noticed at
the first connection (see `session.Link`), not at the first hostile message.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

import aiormq.connection
import pamqp.frame
from aiormq.exceptions import AMQPConnectionError, InvalidFrameError, ProtocolSyntaxError
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.frame import FrameTypes
from pamqp.header import ContentHeader

MAX_PROPERTIES_BYTES: Final = 16 * 1024
"""Beyond this, properties are not decoded at all but called malformed: pamqp takes time by the
square of an array's length, one or two seconds for the 128 KiB that fit a frame."""

METHOD_FRAME: Final = 1
HEADER_FRAME: Final = 2
BODY_FRAME: Final = 3
FRAME_END: Final = 0xCE

_HEAD: Final = struct.Struct(">BHI")  # type, channel, size
_CONTENT: Final = struct.Struct(">HHQ")  # class, weight, body size
_TAG: Final = struct.Struct(">QB")  # delivery tag, redelivered
_TLS_ALERT: Final = b"\x15\x03"
_DELIVER: Final = struct.pack(">HH", 60, 60)
_RETURN: Final = struct.pack(">HH", 60, 50)


class MalformedHeader(ContentHeader):
    """Stands for a content header whose properties could not be decoded; they are empty."""

    def __init__(self, body_size: int, raw: bytes, reason: str) -> None:
        super().__init__(body_size=body_size)
        self.raw = raw
        """The properties as they came: flags, then values."""
        self.reason = reason


class MangledDeliver(spec.Basic.Deliver):
    """A delivery whose exchange or routing key is not UTF-8; its bytes are then escaped."""


class Tap:
    """What the receiver of one connection tells the connection's owner."""

    def __init__(self, on_blocked: Callable[[str | None], None]) -> None:
        self.attached = False
        """Whether a receiver was made for the connection, i.e. the hook is effective."""
        self.on_blocked = on_blocked
        """Called with the reason when the broker's alarm blocks us, with None when it ends."""


tap: ContextVar[Tap | None] = ContextVar("roost-frame-tap", default=None)
"""Set by whoever connects; aiormq makes its receiver in a copy of that context."""


class TolerantFrameReceiver(aiormq.connection.FrameReceiver):
    """Reads the frames of one connection."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self._tap = tap.get()
        if self._tap is not None:
            self._tap.attached = True

    async def get_frame(self) -> tuple[int, int, FrameTypes]:
        """The next frame: its size, channel and content. Raises `AMQPConnectionError` at the
        end of the stream and `InvalidFrameError` when it is no longer AMQP."""
        if self.reader.at_eof():
            raise StopAsyncIteration
        try:
            head = await self.reader.readexactly(_HEAD.size)
            if not self.started and head.startswith(b"AMQP"):
                raise ProtocolSyntaxError("Unexpected AMQP protocol header")
            if not self.started and head.startswith(_TLS_ALERT):
                raise ProtocolSyntaxError("TLS is spoken there: the URL must begin with amqps://")
            self.started = True
            kind, channel, size = _HEAD.unpack(head)
            payload = await self.reader.readexactly(size + 1)
        except asyncio.IncompleteReadError as error:
            raise AMQPConnectionError("Server connection unexpectedly closed") from error
        except OSError as error:
            raise AMQPConnectionError(f"Server connection failed: {error!r}") from error
        if payload[-1] != FRAME_END:
            raise InvalidFrameError("Last byte error")
        frame = decode(kind, head, payload)
        if self._tap is not None:
            if isinstance(frame, spec.Connection.Blocked):
                self._tap.on_blocked(frame.reason or "no reason given")
            elif isinstance(frame, spec.Connection.Unblocked):
                self._tap.on_blocked(None)
        return _HEAD.size + size + 1, channel, frame


def decode(kind: int, head: bytes, payload: bytes) -> FrameTypes:
    """One frame from its 7 first bytes and the rest (its end mark included). Raises
    `InvalidFrameError` only for what a broker would not send."""
    if kind == BODY_FRAME:
        return ContentBody(payload[:-1])
    if kind == HEADER_FRAME:
        return decode_header(head, payload)
    try:
        if kind == METHOD_FRAME and payload.startswith(_DELIVER):
            return _decode_deliver(payload)
        if kind == METHOD_FRAME and payload.startswith(_RETURN):
            return _decode_return(payload)
        return pamqp.frame.unmarshal(head + payload)[2]
    except Exception as error:
        raise InvalidFrameError(repr(error)) from error


def decode_header(head: bytes, payload: bytes) -> ContentHeader:
    """A content header; a `MalformedHeader` when its properties are beyond decoding."""
    raw = payload[_CONTENT.size : -1]
    try:
        body_size = _CONTENT.unpack_from(payload)[2]
    except struct.error as error:
        raise InvalidFrameError(repr(error)) from error
    if len(raw) > MAX_PROPERTIES_BYTES:
        reason = f"properties of {len(raw)} bytes, more than {MAX_PROPERTIES_BYTES}"
        return MalformedHeader(body_size, raw, reason)
    try:
        frame = pamqp.frame.unmarshal(head + payload)[2]
        assert isinstance(frame, ContentHeader)
        return frame
    except Exception as error:  # noqa: BLE001 - whatever the decoder raises, the sender caused it
        cause = error.__cause__ or error
        return MalformedHeader(body_size, raw, f"{type(cause).__name__}: {str(cause)[:200]}")


def _decode_deliver(payload: bytes) -> spec.Basic.Deliver:
    consumer_tag, at, _ = _short_text(payload, 4)
    delivery_tag, redelivered = _TAG.unpack_from(payload, at)
    exchange, at, exchange_is_text = _short_text(payload, at + _TAG.size)
    routing_key, _, key_is_text = _short_text(payload, at)
    is_text = exchange_is_text and key_is_text
    frame = spec.Basic.Deliver() if is_text else MangledDeliver()
    # Set one by one: the constructor refuses exchange names that a broker may well have.
    frame.consumer_tag = consumer_tag
    frame.delivery_tag = delivery_tag
    frame.redelivered = bool(redelivered & 1)
    frame.exchange = exchange
    frame.routing_key = routing_key
    return frame


def _decode_return(payload: bytes) -> spec.Basic.Return:
    frame = spec.Basic.Return()
    frame.reply_code = int.from_bytes(payload[4:6], "big")
    frame.reply_text, at, _ = _short_text(payload, 6)
    frame.exchange, at, _ = _short_text(payload, at)
    frame.routing_key, _, _ = _short_text(payload, at)
    return frame


def _short_text(payload: bytes, at: int) -> tuple[str, int, bool]:
    """The short string at `at`, the offset behind it, and whether it was UTF-8."""
    start = at + 1
    end = start + payload[at]
    try:
        return payload[start:end].decode(), end, True
    except UnicodeDecodeError:
        return payload[start:end].decode(errors="backslashreplace"), end, False


def install() -> None:
    """Makes every later aiormq connection of this process read with the tolerant receiver.
    Idempotent. It affects other users of aiormq in the process only where they would fail."""
    aiormq.connection.FrameReceiver = TolerantFrameReceiver  # type: ignore[misc]
