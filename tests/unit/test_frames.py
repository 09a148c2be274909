"""Frames as read and as written, without a broker."""

from __future__ import annotations

import asyncio
import struct
import time

import aiormq.connection
import pamqp.frame
import pytest
from aiormq.exceptions import AMQPConnectionError, InvalidFrameError
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from shared.broker import encode, frames
from shared.broker.port import HeaderValue, Message
from shared.errors import InvalidRequest
from tests.hostile import HOSTILE

FRAME_MAX = 4096


def split(data: bytes) -> list[tuple[int, int, bytes, bytes]]:
    """Kind, channel, head and payload (with its end mark) of each frame."""
    found = []
    while data:
        kind, channel, size = struct.unpack(">BHI", data[:7])
        found.append((kind, channel, data[:7], data[7 : 8 + size]))
        data = data[8 + size :]
    return found


def header_frame(properties: bytes, body_size: int = 7) -> tuple[bytes, bytes]:
    payload = struct.pack(">HHQ", 60, 0, body_size) + properties
    return struct.pack(">BHI", 2, 5, len(payload)), payload + b"\xce"


async def read(data: bytes) -> frames.TolerantFrameReceiver:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return frames.TolerantFrameReceiver(reader)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_properties_become_a_malformed_header(case: str) -> None:
    """The body size survives, so that the stream stays in step, and so do the raw bytes."""
    started = time.perf_counter()
    header = frames.decode_header(*header_frame(HOSTILE[case]))
    assert isinstance(header, frames.MalformedHeader)
    assert header.body_size == 7
    assert header.raw == HOSTILE[case]
    assert header.reason
    assert header.properties.headers is None
    assert time.perf_counter() - started < 1.0


@given(st.binary(max_size=200))
def test_any_properties_yield_a_header(properties: bytes) -> None:
    """No bytes whatever raise."""
    assert frames.decode_header(*header_frame(properties)).body_size == 7


@given(st.binary(max_size=255), st.binary(max_size=255), st.integers(0, 2**64 - 1), st.booleans())
def test_any_deliver_is_read(exchange: bytes, key: bytes, tag: int, redelivered: bool) -> None:
    """A delivery keeps its tag whatever stands in its names."""
    payload = struct.pack(">HH", 60, 60) + b"\x03tag" + struct.pack(">QB", tag, redelivered)
    payload += bytes([len(exchange)]) + exchange + bytes([len(key)]) + key
    frame = frames.decode(1, struct.pack(">BHI", 1, 1, len(payload)), payload + b"\xce")
    assert isinstance(frame, spec.Basic.Deliver)
    assert (frame.consumer_tag, frame.delivery_tag) == ("tag", tag)
    assert frame.redelivered is redelivered
    try:
        assert (frame.exchange, frame.routing_key) == (exchange.decode(), key.decode())
        assert not isinstance(frame, frames.MangledDeliver)
    except UnicodeDecodeError:
        assert isinstance(frame, frames.MangledDeliver)
        frame.routing_key.encode()


def test_deliver_and_return_are_read_as_pamqp_reads_them() -> None:
    """The hand-written decoders agree with the library on what it can read."""
    for sent in (
        spec.Basic.Deliver("ctag", 77, True, "roost.infer", "bert/1"),
        spec.Basic.Return(312, "NO_ROUTE", "roost.infer", "bert"),
    ):
        (kind, _, head, payload), *_ = split(pamqp.frame.marshal(sent, 3))
        got = frames.decode(kind, head, payload)
        assert type(got) is type(sent)
        assert dict(got) == dict(sent)


async def test_receiver_reads_a_stream() -> None:
    """Frames come in order with their channel, good and bad ones alike, until the end."""
    head, payload = header_frame(HOSTILE["correlation_id"])
    stream = b"".join(
        [
            pamqp.frame.marshal(Heartbeat(), 0),
            pamqp.frame.marshal(spec.Basic.Deliver("c", 1, False, "", "q"), 5),
            head + payload,
            pamqp.frame.marshal(ContentBody(b"1234567"), 5),
        ]
    )
    receiver = await read(stream)
    got = [frame async for frame in receiver]
    kinds = [type(frame) for _, _, frame in got]
    assert kinds == [Heartbeat, spec.Basic.Deliver, frames.MalformedHeader, ContentBody]
    assert [channel for _, channel, _ in got] == [0, 5, 5, 5]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x01\x00", AMQPConnectionError),
        (b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x0a\x00", InvalidFrameError),
        (b"\x09\x00\x00\x00\x00\x00\x01\x00\xce", InvalidFrameError),
        (b"\x01\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff\xce", InvalidFrameError),
        (b"\x02\x00\x00\x00\x00\x00\x01\x00\xce", InvalidFrameError),
        (b"AMQP\x00\x00\x09\x01", Exception),
    ],
)
async def test_what_is_not_amqp_ends_the_connection(data: bytes, error: type[Exception]) -> None:
    """A truncated or foreign stream raises what aiormq understands."""
    receiver = await read(data)
    with pytest.raises(error):
        await receiver.get_frame()


async def test_tap_hears_of_alarms() -> None:
    """Blocked and unblocked reach the owner of the connection."""
    heard: list[str | None] = []
    tap = frames.Tap(heard.append)
    token = frames.tap.set(tap)
    try:
        receiver = await read(
            pamqp.frame.marshal(spec.Connection.Blocked("low on memory"), 0)
            + pamqp.frame.marshal(spec.Connection.Unblocked(), 0)
        )
    finally:
        frames.tap.reset(token)
    assert [_ async for _ in receiver]
    assert tap.attached
    assert heard == ["low on memory", None]


async def test_aiormq_uses_the_receiver() -> None:
    """The hook is effective: a connection of this aiormq reads with our receiver. When this
    fails, a new aiormq reads frames otherwise, and hostile messages would close connections."""
    frames.install()
    tap = frames.Tap(lambda _: None)
    closed = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        writer.close()
        await writer.wait_closed()
        closed.set()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    token = frames.tap.set(tap)
    try:
        with pytest.raises(AMQPConnectionError):
            await aiormq.connect(f"amqp://guest:guest@127.0.0.1:{port}/")
    finally:
        frames.tap.reset(token)
        server.close()
        await server.wait_closed()
    await asyncio.wait_for(closed.wait(), 5)
    assert tap.attached


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
values: st.SearchStrategy[HeaderValue] = st.one_of(
    text, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(),
    st.binary(max_size=60), st.none(),
)  # fmt: skip
optional = st.one_of(st.none(), text.filter(lambda each: 0 < len(each.encode()) < 256))
messages = st.builds(
    Message,
    body=st.binary(max_size=3 * FRAME_MAX),
    headers=st.dictionaries(text.filter(lambda each: len(each.encode()) < 128), values, max_size=5),
    reply_to=optional,
    correlation_id=optional,
    content_type=optional,
    expiration_ms=st.one_of(st.none(), st.integers(0, 2**31)),
    priority=st.one_of(st.none(), st.integers(0, 255)),
    persistent=st.booleans(),
)


@given(messages, st.booleans())
def test_published_frames_are_what_pamqp_reads(message: Message, mandatory: bool) -> None:
    """The hand-built publish decodes, by the library, into what was meant."""
    data = encode.publish_frames(
        9, "roost.infer", "bert/1", message,
        headers=message.headers, message_id="id.9.1", mandatory=mandatory, frame_max=FRAME_MAX,
    )  # fmt: skip
    parts = split(data)
    assert all(channel == 9 and len(payload) + 7 <= FRAME_MAX for _, channel, _, payload in parts)
    decoded = [pamqp.frame.unmarshal(head + payload)[2] for _, _, head, payload in parts]
    publish, header, *body = decoded
    assert isinstance(publish, spec.Basic.Publish)
    assert (publish.exchange, publish.routing_key) == ("roost.infer", "bert/1")
    assert publish.mandatory is mandatory
    assert isinstance(header, ContentHeader)
    assert header.body_size == len(message.body)
    assert b"".join(each.value for each in body) == message.body
    got = header.properties
    assert (got.headers or {}) == message.headers
    assert (got.reply_to, got.correlation_id) == (message.reply_to, message.correlation_id)
    assert (got.content_type, got.priority) == (message.content_type, message.priority)
    assert got.delivery_mode == (2 if message.persistent else 1)
    assert got.message_id == "id.9.1"
    wanted = None if message.expiration_ms is None else str(message.expiration_ms)
    assert got.expiration == wanted


@pytest.mark.parametrize(
    "message",
    [
        Message(body=b"", correlation_id="ü" * 128),
        Message(body=b"", headers={"n": 2**63}),
        Message(body=b"", headers={"x" * 256: 1}),
        Message(body=b"", headers={"k": "x" * frames.MAX_PROPERTIES_BYTES}),
        Message(body=b"", headers={"k": [1]}),  # type: ignore[dict-item]
        Message(body=b"", priority=256),
        Message(body=b"", reply_to="\ud800"),
    ],
)
def test_properties_that_do_not_fit_are_refused(message: Message) -> None:
    """They are refused before anything is sent: the broker would close the channel."""
    with pytest.raises(InvalidRequest):
        encode.publish_frames(
            1, "", "q", message,
            headers=message.headers, message_id="1", mandatory=True, frame_max=131072,
        )  # fmt: skip


def test_answers_are_what_pamqp_reads() -> None:
    """The hand-built ack and reject name the one delivery."""
    ack = pamqp.frame.unmarshal(encode.ack_frame(7, 2**40))
    assert ack[1] == 7
    assert dict(ack[2]) == {"delivery_tag": 2**40, "multiple": False}
    reject = pamqp.frame.unmarshal(encode.requeue_frame(7, 3))[2]
    assert isinstance(reject, spec.Basic.Reject)
    assert dict(reject) == {"delivery_tag": 3, "requeue": True}
