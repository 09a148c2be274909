"""A client that costs next to nothing: one keep-alive connection that asks one thing at a time.

Where a benchmark shares its cores with what it measures, a usual client (a millisecond of CPU for
each request) would be a large part of the figures.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple, cast

from shared.names import HEADER_BATCH, HEADER_LENGTH

_PATIENCE_S: Final = 60.0
_BATCH: Final = HEADER_BATCH.lower().encode()


class Answer(NamedTuple):
    status: int
    batch_rows: int = 0
    """Of the batch in which the request ran."""
    body: bytes = b""


_NONE: Final = Answer(0)


class Connection(asyncio.Protocol):
    """One client's, which asks one thing at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self._answer: asyncio.Future[Answer] | None = None
        self._read = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's has no such base

    def data_received(self, data: bytes) -> None:
        self._read += data
        head, ends, body = bytes(self._read).partition(b"\r\n\r\n")
        if not ends:
            return
        head = head.lower()
        if len(body) >= _number(head, b"content-length") and self._answer is not None:
            self._read.clear()
            status, rows = int(head.split(None, 2)[1]), _number(head, _BATCH)
            self._answer.set_result(Answer(status, rows, body))
            self._answer = None

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(_NONE)
            self._answer = None

    async def ask(self, request: bytes, timeout_s: float = _PATIENCE_S) -> Answer:
        """What came back; its status is 0 when nothing did. Raises `TimeoutError`."""
        if self.lost or self.transport is None:
            return _NONE
        answer = self._answer = asyncio.Future()
        self.transport.write(request)
        async with asyncio.timeout(timeout_s):
            return await answer

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


async def connect(host: str, port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
    return connection


def head(model: str, length: int, header_length: int | None = None) -> bytes:
    """Of a request with a body of so many bytes."""
    binary = "" if header_length is None else f"{HEADER_LENGTH}: {header_length}\r\n"
    kind = "json" if header_length is None else "octet-stream"
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: roost\r\n{binary}"
        f"Content-Type: application/{kind}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """A whole one; a body is JSON."""
    return (
        f"{method} {path} HTTP/1.1\r\nHost: roost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _number(head: bytes, name: bytes) -> int:
    """Of a header, in lower case; 0 when it is not there."""
    return int(head.partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0] or 0)
