"""Drives the engine: starts it, feeds it through shared memory, starts another when it dies.

The runtime decides nothing: it tells the core what happened and does what the core wants. Each
life of an engine has its own sockets and its own regions, so nothing of a dead one can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec
import structlog

from services.worker import columns, wire
from services.worker.arena import ALIGNMENT, Allocator, Arena
from services.worker.columns import Column
from services.worker.core.events import EngineLost, Fact, RunBatch
from services.worker.frames import BadFrame
from services.worker.launch import EngineProcess, Launch
from services.worker.line import Line
from shared.layout import Extent, Layout
from shared.models import Manifest, ModelSpec
from shared.names import ModelId
from shared.supervise import Backoff
from shared.tensors import ITEMSIZE, Tensor, nbytes
from shared.v2 import InferRequest

log = structlog.get_logger(__name__)

_START_TIMEOUT_S = 180.0
"""Importing torch takes seconds, opening a CUDA context more, on a busy machine much more."""
_STABLE_S = 30.0
"""An engine that lived so long is started again without waiting."""
_STOP_TIMEOUT_S = 5.0


class _Life:
    """One engine, from its start to its end."""

    def __init__(self, inbox_bytes: int, outbox_bytes: int) -> None:
        self.inbox = Arena.create("roost-inbox", inbox_bytes)
        self.outbox = Arena.create("roost-outbox", outbox_bytes)
        self.room = Allocator(self.inbox.capacity)
        self.blocks: dict[int, int] = {}
        """Offset of the inputs in the inbox, of each batch in the engine."""
        self.waiting: deque[tuple[RunBatch, list[Column]]] = deque()
        """For room in the inbox."""
        self.process: EngineProcess | None = None
        self.control: Line | None = None
        self.batches: Line | None = None
        self.started: wire.EngineStarted | None = None
        self.models: set[ModelId] = set()
        """Of which it was told: it has nothing to say of others."""
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why it ended."""
        self.last_words = ""
        self._released: list[int] = []
        self._unsent = bytearray()
        self._flushing = False

    def send(self, command: wire.Command) -> None:
        if self.control is not None:
            self.control.send(wire.pack(command))

    def send_batch(self, command: wire.RunBatch) -> None:
        """At once if the engine has nothing to do. Else with what else this turn of the event
        loop brings, in one piece: each piece costs both sides a wake-up."""
        self._unsent += wire.pack(command)
        if len(self.blocks) > 1:
            self._flush_soon()
        else:
            self._flush()

    def release(self, batches: Iterable[int]) -> None:
        self._released += batches
        if self.blocks:  # else nobody waits for the room, and the next batch tells
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        frames = bytes(self._unsent)
        self._unsent.clear()
        if self._released:
            frames = wire.pack(wire.Release(tuple(self._released))) + frames
            self._released.clear()
        if frames and self.batches is not None:
            self.batches.send(frames)

    def fail(self, reason: str) -> None:
        """The first reason counts."""
        if not self.over.done():
            self.over.set_result(reason)

    async def end(self) -> int | None:
        """The exit status."""
        for line in (self.control, self.batches):
            if line is not None:
                line.close()
        status = None
        if self.process is not None:
            self.process.kill()
            status = await self.process.wait()
        self.inbox.close()
        self.outbox.close()
        return status


class Runtime:
    """The engine of one worker, in as many lives as it takes."""

    def __init__(
        self,
        launch: Launch,
        tell: Callable[[Fact], None],
        on_started: Callable[[wire.EngineStarted, int], None],
        *,
        inbox_bytes: int,
        outbox_bytes: int,
        backoff: Backoff | None = None,
    ) -> None:
        """`on_started` gets what a fresh engine says of its device, and its process id."""
        self._launch = launch
        self._tell = tell
        self._on_started = on_started
        self._inbox_bytes = inbox_bytes
        self._outbox_bytes = outbox_bytes
        self._backoff = backoff or Backoff(0.1, 10.0)
        self._life: _Life | None = None
        self._ran: dict[int, tuple[_Life, list[Tensor]]] = {}
        self._stopping = False
        self.memory: wire.MemoryMeasured | None = None
        """What the engine last said of its memory; None before its first word."""

    # --- what the core wants --------------------------------------------------------------

    def load(
        self,
        model: ModelId,
        file: tuple[Extent, ...],
        manifest: Manifest,
        layout: Layout | None = None,
        warm: tuple[wire.WarmUp, ...] = (),
        tier: Literal["host", "device"] = "device",
        *,
        keep_host: bool = False,
    ) -> None:
        life = self._life
        if life is not None:
            life.models.add(model)
            if life.process is not None:
                life.process.hush()
        self._send(wire.LoadModel(model, file, manifest, layout, warm, tier, keep_host))

    def evict(self, model: ModelId, tier: Literal["host", "device"] = "device") -> None:
        self._send(wire.EvictModel(model, tier))

    def run_batch(self, order: RunBatch, requests: Sequence[InferRequest], spec: ModelSpec) -> None:
        """Copies the inputs into the inbox, the rows of several requests one after the other,
        and hands the batch over; as soon as there is room, and in order."""
        life = self._life
        if life is None:
            return  # the engine died meanwhile: the core is about to hear of it
        life.waiting.append((order, columns.gather(requests, spec.padding, order.size)))
        self._hand_over(life)

    def kill(self, reason: str) -> None:
        """Ends the engine at once, and only it: `EngineLost` follows, then another engine."""
        life = self._life
        if life is None or life.process is None or life.control is None:
            return  # it is ending, or has not begun
        life.process.kill()
        # A process that a model left behind may hold the other ends: do not wait for it.
        life.fail(reason)

    def outputs(self, batch: int) -> list[Tensor]:
        """Views into the outbox of a batch that ran, valid until `release`, even if the engine
        dies before."""
        return self._ran[batch][1]

    def release(self) -> None:
        """All outputs told of so far have been copied, or nobody wants them."""
        if not self._ran:
            return
        life = self._life
        if life is not None:
            life.release(batch for batch, (of, _) in self._ran.items() if of is life)
        self._ran.clear()

    def _send(self, command: wire.Command) -> None:
        if self._life is not None:
            self._life.send(command)

    # --- lives ----------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: an engine lives, dies, and the next one is started."""
        while True:
            began = time.monotonic()
            life = self._life = _Life(self._inbox_bytes, self._outbox_bytes)
            try:
                reason = await self._live(life)
            except OSError as error:
                reason = f"could not be started: {error}"
            finally:
                self._life = self.memory = None
                status = await asyncio.shield(life.end())
            if self._stopping:
                await asyncio.Event().wait()  # for whoever cancels this task
            log.error("engine_lost", reason=reason, status=status)
            self._tell(EngineLost(reason))
            if time.monotonic() - began > _STABLE_S:
                self._backoff.reset()
            await asyncio.sleep(self._backoff.next())

    async def close(self, *, at_once: bool = False) -> None:
        """Ends the engine for good, in its own time first, unless it is known to hang. One that
        has not started yet has nothing to end."""
        self._stopping = True
        life = self._life
        if life is None or life.process is None:
            return
        if life.started is not None and not at_once:
            life.send(wire.Stop())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await life.process.wait()
        life.process.kill()

    async def _live(self, life: _Life) -> str:
        """Until the engine ends, however it does; says why."""
        control, their_control = socket.socketpair()
        batches, their_batches = socket.socketpair()
        try:
            life.process = await self._launch(their_control, their_batches, life.inbox, life.outbox)
        except BaseException:
            control.close()
            batches.close()
            raise
        finally:
            their_control.close()
            their_batches.close()

        def heard(body: memoryview) -> None:
            self._heard(life, wire.unpack_event(body))

        def broken(error: Exception | None) -> None:
            self._broken(life, error)

        life.control = Line(control, heard, broken)
        life.batches = Line(batches, heard, broken)

        def late() -> None:
            if life.started is None:
                life.fail(f"it did not start within {_START_TIMEOUT_S:.0f} s")

        timer = asyncio.get_running_loop().call_later(_START_TIMEOUT_S, late)
        try:
            return await life.over
        finally:
            timer.cancel()

    def _heard(self, life: _Life, event: wire.Event) -> None:
        match event:
            case wire.BatchRan():
                self._free(life, event.batch)
                outputs = [_output(ref, life.outbox.view) for ref in event.outputs]
                self._ran[event.batch] = (life, outputs)
                self._tell(event)
            case wire.BatchFailed():
                self._free(life, event.batch)
                self._tell(event)
            case wire.ModelLoaded() | wire.LoadFailed() | wire.ModelEvicted():
                if event.model not in life.models:
                    raise _NotAnEngine("it speaks of a model of which it was told nothing")
                self._tell(event)
            case wire.MemoryMeasured():
                self.memory = event
            case wire.EngineStarted():
                if life.started is not None:
                    raise _NotAnEngine("it started twice")
                life.started = event
                assert life.process is not None
                self._on_started(event, life.process.pid)
            case wire.EngineFailed():
                life.last_words = event.message

    def _broken(self, life: _Life, error: Exception | None) -> None:
        """One of the sockets is of no use any more, and so is the engine. What it had said on
        the other one before still counts."""
        if isinstance(error, BadFrame | msgspec.MsgspecError):
            life.fail(f"it speaks nonsense: {error}")
        elif error is not None and not isinstance(error, OSError) and not life.over.done():
            life.over.set_exception(error)  # our own fault
        for line in (life.control, life.batches):
            if line is not None and not life.over.done():
                line.read_rest()
        life.fail(life.last_words or "it ended")

    # --- the inbox ------------------------------------------------------------------------

    def _free(self, life: _Life, batch: int) -> None:
        offset = life.blocks.pop(batch, None)
        if offset is None:
            raise _NotAnEngine(f"batch {batch} is not under way")
        life.room.free(offset)
        if life.waiting:
            self._hand_over(life)

    def _hand_over(self, life: _Life) -> None:
        while life.waiting:
            order, inputs = life.waiting[0]
            size = columns.nbytes(inputs)
            if size > life.room.capacity:
                life.waiting.popleft()
                message = f"its inputs have {size:,} bytes, the inbox {life.room.capacity:,}"
                self._tell(wire.BatchFailed(order.batch, "too_large", message))
                continue
            offset = life.room.alloc(max(size, ALIGNMENT))
            if offset is None:
                return
            life.waiting.popleft()
            life.blocks[order.batch] = offset
            refs = columns.copy(inputs, life.inbox.view, offset)
            life.send_batch(wire.RunBatch(order.batch, order.model, order.rows, refs))


class _NotAnEngine(BadFrame):
    """What came over the socket cannot be true: the engine's memory is not to be trusted."""


def _output(ref: wire.TensorRef, view: memoryview) -> Tensor:
    """The engine runs strangers' programs: what it says of our memory is checked."""
    end = ref.offset + ref.nbytes
    inside = min(ref.offset, ref.nbytes, *ref.shape, 0) == 0 and end <= len(view)
    if not inside or (ITEMSIZE[ref.datatype] and ref.nbytes != nbytes(ref.datatype, ref.shape)):
        raise _NotAnEngine(f"an output that cannot be: {ref}")
    return Tensor(ref.name, ref.datatype, ref.shape, view[ref.offset : end])
