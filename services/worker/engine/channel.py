"""The engine's ends of its two sockets: one about models, one about batches."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from services.worker.frames import BadFrame, Frames
from services.worker.wire import (
    BatchCommand,
    BatchEvent,
    Command,
    Event,
    pack,
    unpack_batch_command,
    unpack_command,
)

_SPIN_S: Final = 200e-6
"""While batches follow each other within this time, the wait for the next one is spent asking for
it: waking a thread costs as much as running a small model. Others on the same core go first."""


class Channel:
    """The control socket. One thread reads; any thread may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, event: Event) -> None:
        """Whole frames, one after the other. Raises `OSError` when the agent is gone."""
        frame = pack(event)
        with self._sending:
            self._sock.sendall(frame)

    def commands(self) -> Iterator[Command]:
        """Ends when the agent closes its end or is gone. Raises `BadFrame`."""
        frames = Frames(self._sock)
        while True:
            try:
                if not frames.receive():
                    return
            except ConnectionError:
                return
            while (body := frames.take()) is not None:
                try:
                    command = unpack_command(body)
                except msgspec.MsgspecError as error:
                    raise BadFrame(str(error)) from error
                yield command


class BatchChannel:
    """The batches' socket. One thread reads, which any other thread may wake; any may send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._frames = Frames(sock)
        self._sending = threading.Lock()
        self._spin_s = 0.0
        self._awake, self._waker = socket.socketpair()
        for end in (self._awake, self._waker):
            end.setblocking(False)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._awake, select.POLLIN)

    def send(self, event: BatchEvent) -> None:
        """Raises `OSError` when the agent is gone."""
        frame = pack(event)
        with self._sending:
            self._sock.sendall(frame)

    def wake(self) -> None:
        """The reader's wait ends, this one or else the next."""
        with contextlib.suppress(BlockingIOError):  # it has thousands to hear of already
            self._waker.send(b"\0")

    def receive(self, *, wait: bool) -> list[BatchCommand]:
        """What has arrived; with `wait` not before there is something, or a `wake`.

        Raises `BadFrame`, and `ConnectionError` when the agent is gone.
        """
        if not (self._read() or (wait and self._wait())):
            return []
        commands: list[BatchCommand] = []
        while (body := self._frames.take()) is not None:
            try:
                commands.append(unpack_batch_command(body))
            except msgspec.MsgspecError as error:
                raise BadFrame(str(error)) from error
        return commands

    def close(self) -> None:
        for sock in (self._sock, self._awake, self._waker):
            sock.close()

    def _read(self) -> bool:
        """Whether there was anything."""
        try:
            if self._frames.receive(socket.MSG_DONTWAIT):
                return True
        except BlockingIOError:
            return False
        raise ConnectionResetError("the agent is gone")

    def _wait(self) -> bool:
        """Until something arrives, or somebody wakes us; whether anything was read."""
        began = time.perf_counter()
        while not (ready := self._poll.poll(0)):
            if time.perf_counter() > began + self._spin_s:
                ready = self._poll.poll()
                break
            os.sched_yield()
        self._spin_s = _SPIN_S if time.perf_counter() < began + _SPIN_S else 0.0
        if any(fd == self._awake.fileno() for fd, _ in ready):
            self._awake.recv(1 << 12)
        return self._read()
