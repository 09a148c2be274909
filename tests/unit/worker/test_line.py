from __future__ import annotations

import asyncio
import socket

import pytest

from services.worker.frames import BadFrame
from services.worker.line import Line


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


class Ends:
    """A line, the far end of its socket, and what the line told."""

    def __init__(self) -> None:
        sock, self.far = socket.socketpair()
        self.far.setblocking(False)
        self.heard: list[bytes] = []
        self.broken: list[Exception | None] = []
        self.fault: Exception | None = None
        self.closing = False
        self.changed = asyncio.Event()
        self.line = Line(sock, self._hear, self._break)

    def _hear(self, body: memoryview) -> None:
        if self.fault is not None:
            raise self.fault
        self.heard.append(bytes(body))
        if self.closing:
            self.line.close()
        self.changed.set()

    def _break(self, error: Exception | None) -> None:
        self.broken.append(error)
        self.changed.set()

    async def until_told(self) -> None:
        async with asyncio.timeout(10):
            await self.changed.wait()
        self.changed.clear()


@pytest.fixture
async def ends():
    ends = Ends()
    yield ends
    ends.line.close()
    ends.far.close()


async def test_frames_go_both_ways(ends):
    """What is sent is there at once; what comes is handed on frame by frame."""
    ends.line.send(framed(b"hello"))
    assert ends.far.recv(100) == framed(b"hello")
    ends.far.send(framed(b"good") + framed(b"day"))
    await ends.until_told()
    assert ends.heard == [b"good", b"day"]


async def test_what_the_socket_does_not_take_follows_in_order(ends):
    """When nobody reads, sending neither blocks nor loses anything."""
    frames = [framed(bytes([number]) * 5000) for number in range(200)]
    for frame in frames:
        ends.line.send(frame)
    expected, loop = b"".join(frames), asyncio.get_running_loop()
    async with asyncio.timeout(10):
        got = b""
        while len(got) < len(expected):
            got += await loop.sock_recv(ends.far, 1 << 16)
    assert got == expected
    ends.line.send(framed(b"at once again"))
    assert ends.far.recv(100) == framed(b"at once again")


async def test_the_end_of_the_stream_is_told_once(ends):
    """And after it the line is closed: sending is without effect."""
    ends.far.close()
    await ends.until_told()
    assert ends.broken == [None]
    ends.line.send(b"anything")
    ends.line.read_rest()
    assert ends.broken == [None]


async def test_sending_to_nobody_is_without_effect(ends):
    """A dead engine is told of by the reading side alone."""
    ends.far.close()
    ends.line.send(b"anything")
    await ends.until_told()
    assert len(ends.broken) == 1


async def test_a_backlog_for_nobody_is_dropped(ends):
    """An engine that dies with a full socket leaves nothing behind."""
    for _ in range(200):
        ends.line.send(bytes(5000))
    ends.far.close()
    await ends.until_told()
    assert len(ends.broken) == 1


@pytest.mark.parametrize("fault", [BadFrame("nonsense"), KeyError("ours")])
async def test_a_fault_while_hearing_closes_the_line(ends, fault):
    """Whoever holds the line learns which; nothing after it is heard."""
    ends.fault = fault
    ends.far.send(framed(b"one") + framed(b"two"))
    await ends.until_told()
    assert ends.broken == [fault]


async def test_the_rest_can_be_heard_without_waiting(ends):
    """What lies in the socket when the other line breaks still counts."""
    ends.far.send(framed(b"last words"))
    ends.far.close()
    ends.line.read_rest()
    assert ends.heard == [b"last words"]
    assert ends.broken == [None]


async def test_a_line_that_is_closed_by_what_it_told_tells_no_more(ends):
    """Not even what was read already."""
    ends.closing = True
    ends.far.send(framed(b"one") + framed(b"two"))
    await ends.until_told()
    assert ends.heard == [b"one"]
    assert ends.broken == []
