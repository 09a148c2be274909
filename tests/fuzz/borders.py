"""Targets: what a socket brings. AMQP frames and what is in them, HTTP, its headers, its bodies."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
import zlib
from types import SimpleNamespace
from typing import Any, cast

from aiormq.exceptions import InvalidFrameError
from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from roost import deadletters
from services.gateway.asked import Tenants
from services.gateway.body import decompressed
from services.gateway.core.jobkeys import key_name, parse_key
from services.gateway.core.jobs import check_id
from services.gateway.encoding import wanted_coding
from services.gateway.http import _infer_target
from services.gateway.httpinfer import _remaining_s
from services.gateway.spans import trace_of
from services.placer.replies import deadline_ms, forwarded
from services.worker.consume import Pack
from services.worker.items import Items
from shared import packs
from shared.broker.consumer import decode_message
from shared.broker.encode import publish_frames
from shared.broker.frames import MalformedHeader, decode
from shared.broker.messages import dead_letter
from shared.broker.port import Message
from shared.errors import RoostError
from shared.http.crowd import Crowd
from shared.http.protocol import Config, HttpProtocol
from shared.models import ModelSpec, Padding, TensorSpec
from shared.names import HEADER_DEADLINE, HEADER_LENGTH, IDEMPOTENCY_KEY_CHARS, ModelId
from shared.nvmetrics import encoder
from tests.fuzz.kit import target
from tests.hostile import HEADERS, HOSTILE, long, nested_arrays, short, table

_BODY = b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","data":[1,2]}]}'
_GOOD = (
    struct.pack(">H", HEADERS | 1 << 15 | 1 << 10 | 1 << 9 | 1 << 8)
    + short(b"application/json")
    + long(short(HEADER_DEADLINE.encode()) + b"l" + struct.pack(">q", 2_000_000_000_000))
    + short(b"c-1")
    + short(b"roost.reply.t")
    + short(b"1000")
)
_PACKED = (
    struct.pack(">H", HEADERS | 1 << 15)
    + short(packs.CONTENT_TYPE.encode())
    + table(HEADER_LENGTH.encode(), b"I" + bytes(4))
)
_SPECS = (
    ModelSpec(),
    ModelSpec(
        inputs=(TensorSpec("x", "FP32", (-1,)),), max_batch_size=4,
        padding=Padding(inputs={"x": 0}, sizes=(4, 8)),
    ),
)  # fmt: skip


def _message(properties: bytes, body: bytes = _BODY) -> bytes:
    return len(properties).to_bytes(2, "big") + properties + body


@target(
    _message(_GOOD),
    _message(_PACKED, packs.pack([Message(body=b"a"), Message(body=b"b")]).body),
    *(_message(each[:20_000]) for each in HOSTILE.values()),
    _message(struct.pack(">H", HEADERS) + nested_arrays(5)),
    words=(b"roost-deadline-ms", b"F", b"A", b"S", b"T", b"l", b"x", b"D", b"d", b"V", b"t\1",
           b"CC", b"BCC", b"roost-packs", b"amq.rabbitmq.reply-to",
           b"Inference-Header-Content-Length"),
)  # fmt: skip
def amqp_message(data: bytes) -> None:
    """A delivery: its properties, then what worker, placer and `roost dead` make of it."""
    size = int.from_bytes(data[:2], "big")
    raw, body = data[2 : 2 + size], data[2 + size :]
    payload = struct.pack(">HHQ", 60, 0, len(body)) + raw
    head = struct.pack(">BHI", 2, 1, len(payload))
    header = decode(2, head, payload + b"\xce")
    received = cast("Any", SimpleNamespace(header=header, body=body))
    message = decode_message(received)
    malformed = header.reason if isinstance(header, MalformedHeader) else None
    delivery = cast("Any", SimpleNamespace(message=message, malformed=malformed))
    for spec in _SPECS:
        arrived = Items().take(delivery, ModelId("m/1"), 1, spec, now=5.0, wall=time.time())
        if arrived.fault is not None:
            assert len(arrived.fault.message) < 10_000
    if packs.is_pack(message):
        with contextlib.suppress(packs.BadPack):
            delivery.queue, delivery.routing_key, delivery.redelivered = "q", "k", False
            Pack(delivery, cast("Any", None), lambda _: None)
    deadline_ms(message)
    for published in (message, forwarded(message)):
        letter = dead_letter(published, "roost.model.m.1", "m/1", "why")
        with contextlib.suppress(RoostError):
            publish_frames(
                1, "e", "k", letter, headers=letter.headers, message_id="1", mandatory=True,
                frame_max=131072,
            )  # fmt: skip
        deadletters.header_of(letter)
        deadletters.properties_of(letter)


@target(
    b"\1" + struct.pack(">HH", 60, 60) + short(b"t") + bytes(8) + b"\0" + short(b"e") + short(b"k"),
    b"\1" + struct.pack(">HHH", 60, 50, 312) + short(b"NO_ROUTE") + short(b"") + short(b"k"),
    b"\1" + struct.pack(">HH", 10, 60) + short(b"low on memory"),
    b"\2" + struct.pack(">HHQ", 60, 0, 3) + _GOOD,
    b"\3body", b"\x08",
)  # fmt: skip
def amqp_frame(data: bytes) -> None:
    """Any frame, as a broker under an enemy's influence might pass it on."""
    kind, payload = (data[0] if data else 0), data[1:]
    with contextlib.suppress(InvalidFrameError):
        decode(kind, struct.pack(">BHI", kind, 1, len(payload)), payload + b"\xce")


# --- HTTP -------------------------------------------------------------------------------------

_LIMIT = 1 << 20


def _deflated(data: bytes) -> bytes:
    return zlib.compress(data, 9, 31)


@target(
    b"g" + _deflated(_BODY), b"g" + _deflated(bytes(30 << 20)), b"d" + _BODY,
    words=(b"\x1f\x8b\x08", b"\0\0\xff\xff"),
)  # fmt: skip
def compressed_body(data: bytes) -> None:
    """A compressed body: never more than the limit comes of it."""
    for encoding in (b"gzip", b"deflate", data[:8]):
        with contextlib.suppress(RoostError):
            plain = _run(decompressed(data[1:], encoding, None, _LIMIT))
            assert len(plain) <= _LIMIT


def _run(awaitable: Any) -> Any:
    """What never waits."""
    try:
        awaitable.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("it waits")


@target(
    b"gzip;q=1, identity", b"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1",
    b"application/openmetrics-text; version=1.0.0", b"1700000000000", b"tenant",
    b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01", b"/v2/models/m%2f/versions/1/infer",
    b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', b'"a\\"b\\\\"',
    words=(b";q=", b",", b"%2f", b"%ff", b"/versions/", b"/infer", b"escaping=", b"version=",
           b'"', b"\\", b'\\"'),
)  # fmt: skip
def http_headers(data: bytes) -> None:
    """Values of headers that are looked into, and paths."""
    wanted_coding(data)
    trace_of({b"traceparent": data, b"tracestate": data})
    encode, _ = encoder(data.decode("latin-1"))
    encode(CollectorRegistry())
    _infer_target({"raw_path": b"/v2/models/" + data + b"/infer", "path": ""})
    _infer_target({"raw_path": data, "path": ""})
    for read in (
        lambda: _remaining_s({b"roost-deadline-ms": data}),
        lambda: Tenants("x-tenant").of({b"x-tenant": data}),
        lambda: _a_key(data.decode("latin-1")),
    ):
        with contextlib.suppress(RoostError):
            read()


def _a_key(text: str) -> None:
    """What is taken for a key is one, and the same when it is sent in quotes."""
    key = parse_key(text)
    assert 1 <= len(key) <= IDEMPOTENCY_KEY_CHARS
    assert all("!" <= char <= "~" for char in key)
    assert parse_key('"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"') == key
    check_id(key_name("m", None, "", key))


class _Transport:
    """Of asyncio, as far as the server's protocol uses it."""

    def __init__(self) -> None:
        self.closed = False
        self.written = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in {"peername", "sockname"} else default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def write(self, data: bytes) -> None:
        self.written += len(data)

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_protocol(self, _: Any) -> None: ...


async def _app(_: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


@target(
    b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" * 2,
    b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    b"5\r\nhello\r\n0\r\n\r\n",
    b"GET /a HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 40 + b"\r\n",
    words=(b"\r\n", b"\r\n\r\n", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"0\r\n\r\n",
           b"Connection: close", b"HTTP/1.0", b"ffffffffffffffff\r\n", b": ", b"\0"),
)  # fmt: skip
def http_stream(data: bytes) -> None:
    """A connection's bytes, in two reads: any end, no error, and no more than they may hold."""
    with asyncio.Runner() as runner:
        runner.run(_connection(data))


async def _connection(data: bytes) -> None:
    config = Config(
        _app, crowd=Crowd(2), leaving=asyncio.Event(), max_requests=2,
        http=HttpProtocol, ws="none",
        lifespan="off", access_log=False, log_config=None, log_level="error",
    )  # fmt: skip
    config.load()
    state = ServerState()
    protocol = HttpProtocol(config, server_state=state, app_state={})
    transport = _Transport()
    protocol.connection_made(cast("Any", transport))
    middle = len(data) // 2
    for piece in (data[:middle], data[middle:]):
        if not transport.closed:
            protocol.data_received(piece)
            await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    tasks = list(state.tasks)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
