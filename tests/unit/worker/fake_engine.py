"""An engine without torch and without a process: it speaks wire.py over the same sockets and
the same regions. What a model does follows from its name and its input `x` (FP32):

    …            y = 2·x          fail…    the model raises for a negative x
    failtell…    likewise, and says x in its message
    crash…       the engine dies at x = 666
    oom…         out of memory above 4 rows
    broken…      cannot be loaded     deadly…  the engine dies while loading it
    slow…        waits for `gate`     short…   gives one row less than it got
    garbled…     gives BYTES without their lengths     hollow…  BYTES without a single element
    stuck…       loading it waits for `gate`
"""

from __future__ import annotations

import asyncio
import os
import socket

import numpy as np

from services.worker import wire
from services.worker.arena import Allocator, Arena
from shared.models import Case, Manifest
from shared.names import ModelId
from shared.tensors import Tensor, from_numpy, to_numpy


class FakeEngine:
    """Its `launch` is handed to the worker; each call is a new life."""

    def __init__(self) -> None:
        self.lives: list[Life] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[tuple[ModelId, int]] = []
        """Model and rows of everything that was run."""
        self.loads: list[wire.LoadModel] = []
        self.evictions: list[ModelId] = []
        """From the device."""
        self.host_evictions: list[ModelId] = []

    async def launch(
        self, control: socket.socket, batches: socket.socket, inbox: Arena, outbox: Arena
    ) -> Life:
        life = Life(self, control.dup(), batches.dup(), os.dup(inbox.fd), os.dup(outbox.fd))
        self.lives.append(life)
        return life

    @property
    def life(self) -> Life:
        return self.lives[-1]


class Life:
    pid = os.getpid()

    def __init__(
        self,
        engine: FakeEngine,
        control: socket.socket,
        batches: socket.socket,
        inbox: int,
        outbox: int,
    ) -> None:
        self.engine = engine
        self.models: dict[ModelId, Manifest] = {}
        """On the device."""
        self.host: dict[ModelId, Manifest] = {}
        self.released: list[int] = []
        self.inputs, self.outputs = Arena.attach(inbox), Arena.attach(outbox)
        self.room, self.blocks = Allocator(self.outputs.capacity), {}
        self._open = [control, batches, self.inputs, self.outputs]
        self.task = asyncio.create_task(self._serve(control, batches), name="fake engine")
        self.task.add_done_callback(self._close)  # however early it is cancelled

    async def wait(self) -> int:
        await asyncio.wait([self.task])
        return 0 if self.task.cancelled() else 1

    def hush(self) -> None: ...

    def kill(self) -> None:
        if not self.task.cancelling():  # twice would cut its tidying short
            self.task.cancel()

    def say(self, *events: wire.Event | bytes) -> None:
        """On the control socket."""
        for event in events:
            self.control.write(event if isinstance(event, bytes) else wire.pack(event))

    async def _serve(self, control: socket.socket, batches: socket.socket) -> None:
        commands, self.control = await asyncio.open_unix_connection(sock=control)
        self._open.insert(0, self.control)
        orders, self.answers = await asyncio.open_unix_connection(sock=batches)
        self._open.insert(0, self.answers)
        self.say(wire.EngineStarted("fake", "Fake 3000", "", 1 << 30, 0, "0"))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve_models(commands))
                group.create_task(self._serve_batches(orders))
        except* (EngineEndsError, asyncio.IncompleteReadError):
            pass

    def _close(self, _: asyncio.Task[None]) -> None:
        for each in self._open:
            each.close()

    async def _serve_models(self, reader: asyncio.StreamReader) -> None:
        while True:
            command = wire.unpack_command(await _body(reader))
            if isinstance(command, wire.Stop):
                raise EngineEndsError
            event = await self._do(command)
            self.say(self._memory(), *(() if event is None else (event,)))

    async def _serve_batches(self, reader: asyncio.StreamReader) -> None:
        while True:
            command = wire.unpack_batch_command(await _body(reader))
            if isinstance(command, wire.Release):
                self.released += command.batches
                for batch in command.batches:
                    self.room.free(self.blocks.pop(batch))
            else:
                event = await self._run(command, self.inputs.view, self.outputs.view)
                self.answers.write(wire.pack(event))

    async def _do(self, command: wire.Command) -> wire.Event | None:
        match command:
            case wire.LoadModel():
                self.engine.loads.append(command)
                if command.model.startswith("deadly"):
                    raise EngineEndsError
                if command.model.startswith("stuck"):
                    await self.engine.gate.wait()
                if command.model.startswith("broken"):
                    return wire.LoadFailed(command.model, "model_failed", "not a program")
                return self._load(command)
            case wire.EvictModel(tier="host"):
                self.host.pop(command.model, None)
                self.engine.host_evictions.append(command.model)
                return wire.ModelEvicted(command.model, "host")
            case wire.EvictModel():
                del self.models[command.model]
                self.engine.evictions.append(command.model)
                return wire.ModelEvicted(command.model)
        return None

    def _load(self, command: wire.LoadModel) -> wire.ModelLoaded:
        manifest = command.manifest
        source = "host" if command.model in self.host else "disk"
        if command.tier == "device":
            self.models[command.model] = manifest
        if command.tier == "host" or command.keep_host:
            self.host[command.model] = manifest
        return wire.ModelLoaded(
            command.model,
            manifest.inputs or (),
            manifest.size_bytes,
            0.01,
            (Case(1, 0, 0.001, 64),) if command.tier == "device" else (),
            command.tier,
            source,
            "none" if command.layout is None or command.layout.obstacle else "known",
        )

    def _memory(self) -> wire.MemoryMeasured:
        used, host = (
            sum(each.size_bytes for each in tier.values()) for tier in (self.models, self.host)
        )
        return wire.MemoryMeasured(used, 0, host)

    async def _run(
        self, command: wire.RunBatch, inputs: memoryview, outputs: memoryview
    ) -> wire.Event:
        name = command.model
        if name.startswith("slow"):
            await self.engine.gate.wait()
        self.engine.batches.append((name, command.rows))
        if name not in self.models:
            return wire.BatchFailed(command.batch, "not_found", f"{name} is not loaded")
        if name.startswith("oom") and command.rows > 4:
            return wire.BatchFailed(command.batch, "resource_exhausted", "out of memory")
        (ref,) = command.inputs
        data = bytes(inputs[ref.offset : ref.offset + ref.nbytes])
        x = to_numpy(Tensor(ref.name, ref.datatype, ref.shape, data))
        if name.startswith("crash") and (x == 666).any():
            raise EngineEndsError
        if name.startswith("fail") and (x < 0).any():
            told = f": {x.tolist()}" if name.startswith("failtell") else ""
            return wire.BatchFailed(command.batch, "model_failed", f"x is negative{told}")
        y = from_numpy("y", (2 * x).astype(np.float32))
        if name.startswith("short"):
            y = from_numpy("y", (2 * x).astype(np.float32)[:-1])
        offset = self.room.alloc(len(y.data))
        assert offset is not None
        self.blocks[command.batch] = offset
        outputs[offset : offset + len(y.data)] = y.data
        out = wire.TensorRef("y", "FP32", y.shape, offset, len(y.data))
        if name.startswith(("garbled", "hollow")):
            size = len(y.data) if name.startswith("garbled") else 0
            out = wire.TensorRef("y", "BYTES", y.shape, offset, size)
        return wire.BatchRan(command.batch, (out,), 0.001, 0)


class EngineEndsError(Exception):
    """As a segmentation fault would, or because it was told to."""


async def _body(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))
