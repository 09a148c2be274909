"""What a network does to TCP connections, done in one process: a proxy that can be slow, lose
packets, stop, forget its connections, or cut them.

As Toxiproxy has it, in the terms that a network has: what is lost TCP sends again, so that loss is
seen as delay; a connection that a firewall has forgotten is half-open: neither end hears more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Final, cast

import numpy as np

from roost.local.ports import LOOPBACK

_RETRANSMIT_S: Final = 0.2
"""Linux's shortest time until what was lost is sent again (TCP_RTO_MIN)."""


class Proxy:
    """Listens on a port of its own and passes everything on to another of this machine."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.port = 0
        """Its own, from `start` on."""
        self.target_port = 0
        self.latency_s = 0.0
        """Each way, for what comes from now on."""
        self.loss = 0.0
        """The share of pieces that are lost once, and sent again."""
        self._rng = rng
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()
        self._stopped = False
        self._connecting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _End(self), LOOPBACK, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Nothing passes, and nobody is told: a cable is out. New connections are as silent."""
        self._stopped = True
        for end in self._ends:
            end.hold(True)

    def go_on(self) -> None:
        """What waited passes now, in order."""
        self._stopped = False
        for end in self._ends:
            end.hold(False)

    def forget(self) -> int:
        """Makes the connections of now half-open, for ever; returns how many. New ones are well."""
        forgotten = [end for end in self._ends if not end.forgotten]
        for end in forgotten:
            end.forgotten = True
        return len(forgotten) // 2

    def cut(self) -> None:
        """Resets all connections."""
        for end in list(self._ends):
            end.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in self._connecting:
            task.cancel()

    # --- what ends call -----------------------------------------------------------------------

    def delay_s(self) -> float:
        """Of the piece that has just come."""
        lost = self.loss > 0 and self._rng.random() < self.loss
        return self.latency_s + _RETRANSMIT_S * lost

    def made(self, end: _End) -> None:
        self._ends.add(end)
        end.hold(self._stopped or end.other is None)
        if end.other is None:
            task = asyncio.create_task(self._connect(end))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, near: _End) -> None:
        far = _End(self)
        far.other = near
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: far, LOOPBACK, self.target_port
            )
        except OSError:
            near.abort()
            return
        if near.lost:
            far.abort()
            return
        near.joined(far)
        near.hold(self._stopped)

    def gone(self, end: _End) -> None:
        self._ends.discard(end)


class _End(asyncio.Protocol):
    """One end of a connection: what comes in here goes out at the other."""

    def __init__(self, proxy: Proxy) -> None:
        self.other: _End | None = None
        self.forgotten = False
        self.lost = False
        self._proxy = proxy
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[float, bytes]] = deque()
        """What came in and is delayed, and until when, on the loop's clock."""
        self._full = False
        self._held = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._proxy.made(self)

    def data_received(self, data: bytes) -> None:
        if self.forgotten:
            return
        if self.other is None:  # uvloop reads on, whatever `connection_made` asked
            self._waiting.append((0.0, data))
            return
        delay_s = self._proxy.delay_s()
        if not (delay_s or self._waiting):
            self.other.write(data)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_s
        if self._waiting:
            due = max(due, self._waiting[-1][0])  # in order
        self._waiting.append((due, data))
        loop.call_at(due, self._let_go)

    def joined(self, other: _End) -> None:
        """Now there is somebody to pass on to."""
        self.other = other
        self._let_go()

    def _let_go(self) -> None:
        now = asyncio.get_running_loop().time()
        while self._waiting and self._waiting[0][0] <= now + 1e-4:
            _, data = self._waiting.popleft()
            if self.other is not None and not self.forgotten:
                self.other.write(data)

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def hold(self, held: bool) -> None:
        """Whether nothing is taken from here: the kernel's buffers fill up, as a network's do."""
        self._held = held
        self._look()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.crowded(True)

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.crowded(False)

    def crowded(self, full: bool) -> None:
        """The other end takes no more for now."""
        self._full = full
        self._look()

    def _look(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        with contextlib.suppress(RuntimeError):  # paused or reading already
            if self._held or self._full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.lost = True
        self._proxy.gone(self)
        other = self.other
        if other is None or self.forgotten:
            return  # the other end of a half-open connection does not hear of it
        for _, data in self._waiting:
            other.write(data)
        self._waiting.clear()
        other.close()

    def close(self) -> None:
        """Once all that was written has gone out."""
        if self._transport is not None:
            self._transport.close()
