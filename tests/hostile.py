"""What a hostile AMQP producer may send: frames written by hand, over a plain socket. No client
library would write these. RabbitMQ takes them all and passes them on as they are.

And what a hostile client may upload: small model files that would take much memory to understand.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Self
from urllib.parse import unquote, urlsplit

from tests.torchscript_files import Thing, archive, entries, module

CONTENT_TYPE, HEADERS, CORRELATION_ID, REPLY_TO = 1 << 15, 1 << 13, 1 << 10, 1 << 9
MESSAGE_ID, TIMESTAMP = 1 << 7, 1 << 6
NESTING = 6000


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def long(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def table(key: bytes, value: bytes) -> bytes:
    return long(short(key) + value)


def nested_tables(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"F" + table(b"k", value)
    return table(b"k", value)


def nested_arrays(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"A" + long(value)
    return table(b"k", value)


HOSTILE: dict[str, bytes] = {
    "correlation_id": struct.pack(">H", CORRELATION_ID) + short(b"\xff\xfe"),
    "reply_to": struct.pack(">H", REPLY_TO) + short(b"roost.reply.\xff"),
    "content_type": struct.pack(">H", CONTENT_TYPE) + short(b"\xc3\x28"),
    "header key": struct.pack(">H", HEADERS) + table(b"\xff\xfe", b"V"),
    "timestamp": struct.pack(">HQ", TIMESTAMP, 2**63),
    "timestamp header": struct.pack(">H", HEADERS) + table(b"t", b"T" + b"\xff" * 8),
    "nested tables": struct.pack(">H", HEADERS) + nested_tables(NESTING),
    "nested arrays": struct.pack(">H", HEADERS) + nested_arrays(NESTING),
    "message_id": struct.pack(">H", MESSAGE_ID) + short(b"\x80"),
    "header key and a good id": (
        struct.pack(">H", HEADERS | CORRELATION_ID) + table(b"\xff", b"V") + short(b"c-1")
    ),
    "long array": struct.pack(">H", HEADERS) + table(b"a", b"A" + long(b"V" * 120_000)),
}
"""Flags and values of a content header, as bytes, by what is wrong with them."""


def _code(text: str, path: str = "__torch__.g") -> bytes:
    """A file with code that nothing in it uses, beside a module that does nothing."""
    return archive(entries(Thing("__torch__.M"), {}, {"__torch__": module(), path: text}))


def _definitions(count: int, template: str = "def f{}():\n  return 1\n") -> str:
    return "".join(template.format(number) for number in range(count))


def _own(body: str) -> bytes:
    """A file whose module has this as its code."""
    return archive(entries(Thing("__torch__.M"), {}, {"__torch__": module(body=body)}))


CODE_BOMBS: dict[str, Callable[[], bytes]] = {
    "a preamble of many definitions": lambda: _code("x = 1\n" * 16_000 + _definitions(8_000)),
    "definitions without end": lambda: _code(_definitions(160_000)),
    "a long name of many definitions": lambda: _code(_definitions(19_000), "_" * 60_000),
    "functions without end": lambda: _own("    return x\n" + "  def \n" * 550_000),
    "variables without end": lambda: _own(
        "".join(f"    v{n} = 1\n" for n in range(240_000)) + "    return x\n"
    ),
    "words without end": lambda: _own(f"    y = x\n    return f({'aa y ' * 800_000})\n"),
    "lines without end": lambda: _own("    y = x\n" + "()\n" * 1_300_000),
}
"""By what there is too much of."""


class RawPublisher:
    """An AMQP connection with one channel in confirm mode."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=20)
        self.socket.sendall(b"AMQP\x00\x00\x09\x01")
        try:
            self.open(parts.username or "", parts.password or "", parts.path[1:])
        except BaseException:
            self.socket.close()
            raise

    def open(self, user: str, password: str, vhost: str) -> None:
        self.expect(10, 10)
        response = f"\0{unquote(user)}\0{unquote(password)}".encode()
        self.method(0, 10, 11, long(b"") + short(b"PLAIN") + long(response) + short(b"en_US"))
        self.expect(10, 30)
        self.method(0, 10, 31, struct.pack(">HIH", 100, 131072, 0))
        self.method(0, 10, 40, short(unquote(vhost).encode()) + b"\0\0")
        self.expect(10, 41)
        self.method(1, 20, 10, b"\0")
        self.expect(20, 11)
        self.method(1, 85, 10, b"\0")
        self.expect(85, 11)

    def publish(
        self, properties: bytes, body: bytes = b"evil", *, exchange: bytes = b"",
        routing_key: bytes = b"",
    ) -> None:  # fmt: skip
        """Sends a message and waits until the broker has confirmed it."""
        self.method(1, 60, 40, b"\0\0" + short(exchange) + short(routing_key) + b"\0")
        self.frame(2, 1, struct.pack(">HHQ", 60, 0, len(body)) + properties)
        if body:
            self.frame(3, 1, body)
        self.expect(60, 80)

    def method(self, channel: int, cls: int, method: int, arguments: bytes) -> None:
        self.frame(1, channel, struct.pack(">HH", cls, method) + arguments)

    def frame(self, kind: int, channel: int, payload: bytes) -> None:
        head = struct.pack(">BHI", kind, channel, len(payload))
        self.socket.sendall(head + payload + b"\xce")

    def expect(self, cls: int, method: int) -> bytes:
        """The arguments of the next method frame, which must be this one."""
        while True:
            kind, _, size = struct.unpack(">BHI", self.read(7))
            payload = self.read(size + 1)[:-1]
            if kind == 8:
                continue
            got = struct.unpack(">HH", payload[:4])
            assert (kind, got) == (1, (cls, method)), (kind, payload[:200])
            return payload[4:]

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            assert piece, "the broker closed the connection"
            data += piece
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
