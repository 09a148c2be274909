"""Drives the engine: starts it, feeds it through shared memory, starts another when it dies.

The runtime decides nothing: it tells the core what happened and does what the core wants. Each
life of an engine has its own socket and its own regions, so nothing of a dead one can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import structlog

from services.worker import wire
from services.worker.arena import ALIGNMENT, Allocator, Arena, aligned
from services.worker.core.events import EngineLost, Fact, RunBatch
from services.worker.launch import EngineProcess, Launch
from shared.models import Datatype, Manifest
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
        """Offset of a batch's inputs in the inbox."""
        self.waiting: deque[tuple[RunBatch, Sequence[InferRequest]]] = deque()
        """For room in the inbox."""
        self.process: EngineProcess | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.started: wire.EngineStarted | None = None
        self.killed: str | None = None
        """Why we ended it."""

    def send(self, command: wire.Command) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(wire.pack(command))

    async def end(self) -> int | None:
        """The exit status."""
        if self.writer is not None:
            self.writer.close()
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

    # --- what the core wants --------------------------------------------------------------

    def load(
        self, model: ModelId, path: str, manifest: Manifest, warm_rows: tuple[int, ...]
    ) -> None:
        self._send(wire.LoadModel(model, path, manifest, warm_rows))

    def evict(self, model: ModelId) -> None:
        self._send(wire.EvictModel(model))

    def run_batch(self, order: RunBatch, requests: Sequence[InferRequest]) -> None:
        """Copies the inputs into the inbox, the rows of several requests one after the other,
        and hands the batch over; as soon as there is room, and in order."""
        life = self._life
        if life is None:
            return  # the engine died meanwhile: the core is about to hear of it
        life.waiting.append((order, requests))
        self._hand_over(life)

    def kill(self, reason: str) -> None:
        """Ends the engine at once, and only it: `EngineLost` follows, then another engine."""
        life = self._life
        if life is None or life.process is None or life.writer is None:
            return  # it is ending, or has not begun
        life.killed = reason
        life.process.kill()
        # A process that a model left behind may hold the other end: do not wait for it.
        life.writer.transport.abort()

    def outputs(self, batch: int) -> list[Tensor]:
        """Views into the outbox of a batch that ran, valid until `release`, even if the engine
        dies before."""
        return self._ran[batch][1]

    def release(self) -> None:
        """All outputs told of so far have been copied, or nobody wants them."""
        if not self._ran:
            return
        batches = tuple(batch for batch, (life, _) in self._ran.items() if life is self._life)
        self._ran.clear()
        self._send(wire.Release(batches))

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
                self._life = None
                status = await asyncio.shield(life.end())
            reason = life.killed or reason
            if self._stopping:
                await asyncio.Event().wait()  # for whoever cancels this task
            log.error("engine_lost", reason=reason, status=status)
            self._tell(EngineLost(reason))
            if time.monotonic() - began > _STABLE_S:
                self._backoff.reset()
            await asyncio.sleep(self._backoff.next())

    async def close(self) -> None:
        """Ends the engine for good, in its own time first."""
        self._stopping = True
        life = self._life
        if life is None or life.process is None:
            return
        life.send(wire.Stop())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await life.process.wait()
        life.process.kill()

    async def _live(self, life: _Life) -> str:
        """Until the engine ends, however it does; says why."""
        ours, theirs = socket.socketpair()
        try:
            life.process = await self._launch(theirs, life.inbox, life.outbox)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, life.writer = await asyncio.open_unix_connection(sock=ours)
        reason = "it ended"
        buffer = bytearray()
        while True:
            timeout = None if life.started else _START_TIMEOUT_S
            try:
                async with asyncio.timeout(timeout):
                    chunk = await reader.read(1 << 18)
            except TimeoutError:
                return f"it did not start within {_START_TIMEOUT_S:.0f} s"
            except ConnectionError as error:
                return str(error)
            if not chunk:
                return reason
            buffer += chunk
            try:
                for event in _events(buffer):
                    if isinstance(event, wire.EngineFailed):
                        reason = event.message
                    else:
                        self._heard(life, event)
            except (msgspec.MsgspecError, _NotAnEngine) as error:
                return f"it speaks nonsense: {error}"

    def _heard(self, life: _Life, event: wire.Event) -> None:
        match event:
            case wire.EngineStarted():
                life.started = event
                assert life.process is not None
                self._on_started(event, life.process.pid)
            case wire.BatchRan():
                self._free(life, event.batch)
                outputs = [_output(ref, life.outbox.view) for ref in event.outputs]
                self._ran[event.batch] = (life, outputs)
                self._tell(event)
            case wire.BatchFailed():
                self._free(life, event.batch)
                self._tell(event)
            case wire.ModelLoaded() | wire.LoadFailed() | wire.ModelEvicted():
                self._tell(event)
            case _:
                log.debug("engine_event", event=event)

    # --- the inbox ------------------------------------------------------------------------

    def _free(self, life: _Life, batch: int) -> None:
        offset = life.blocks.pop(batch, None)
        if offset is None:
            raise _NotAnEngine(f"batch {batch} is not under way")
        life.room.free(offset)
        self._hand_over(life)

    def _hand_over(self, life: _Life) -> None:
        while life.waiting:
            order, requests = life.waiting[0]
            columns = _columns(requests)
            size = sum(aligned(sum(len(data) for data in column)) for *_, column in columns)
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
            refs = _copy(columns, life.inbox.view, offset)
            life.send(wire.RunBatch(order.batch, order.model, order.rows, refs))


class _NotAnEngine(Exception):
    """What came over the socket cannot be true: the engine's memory is not to be trusted."""


_Column = tuple[str, Datatype, tuple[int, ...], list[bytes | memoryview]]
"""Name, datatype, shape, and the pieces of one input of a batch."""


def _columns(requests: Sequence[InferRequest]) -> list[_Column]:
    """The inputs of a batch. Several requests have the same inputs, in whatever order, and
    each a first dimension of rows."""
    first, *others = requests
    if not others:
        return [(t.name, t.datatype, t.shape, [t.data]) for t in first.inputs]
    by_name = [{tensor.name: tensor for tensor in request.inputs} for request in others]
    columns: list[_Column] = []
    for tensor in first.inputs:
        same = [tensor, *(inputs[tensor.name] for inputs in by_name)]
        shape = (sum(each.shape[0] for each in same), *tensor.shape[1:])
        columns.append((tensor.name, tensor.datatype, shape, [each.data for each in same]))
    return columns


def _copy(columns: list[_Column], view: memoryview, offset: int) -> tuple[wire.TensorRef, ...]:
    refs = []
    for name, datatype, shape, pieces in columns:
        at = offset
        for data in pieces:
            view[at : at + len(data)] = data
            at += len(data)
        refs.append(wire.TensorRef(name, datatype, shape, offset, at - offset))
        offset += aligned(at - offset)
    return tuple(refs)


def _events(buffer: bytearray) -> list[wire.Event]:
    """Takes the whole frames out of the buffer."""
    events: list[wire.Event] = []
    start = 0
    while len(buffer) - start >= 4:
        end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
        if end - start - 4 > wire.MAX_FRAME:
            raise _NotAnEngine(f"a frame of {end - start - 4:,} bytes")
        if len(buffer) < end:
            break
        events.append(wire.unpack_event(bytes(buffer[start + 4 : end])))
        start = end
    del buffer[:start]
    return events


def _output(ref: wire.TensorRef, view: memoryview) -> Tensor:
    """The engine runs strangers' programs: what it says of our memory is checked."""
    end = ref.offset + ref.nbytes
    inside = min(ref.offset, ref.nbytes, *ref.shape, 0) == 0 and end <= len(view)
    if not inside or (ITEMSIZE[ref.datatype] and ref.nbytes != nbytes(ref.datatype, ref.shape)):
        raise _NotAnEngine(f"an output that cannot be: {ref}")
    return Tensor(ref.name, ref.datatype, ref.shape, view[ref.offset : end])
