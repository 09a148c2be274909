"""An engine without torch and without a process: it speaks wire.py over the same socket and
the same regions. What a model does follows from its name and its input `x` (FP32):

    …            y = 2·x          fail…    the model raises for a negative x
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
from shared.models import Manifest
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

    async def launch(self, control: socket.socket, inbox: Arena, outbox: Arena) -> Life:
        life = Life(self, control.dup(), os.dup(inbox.fd), os.dup(outbox.fd))
        self.lives.append(life)
        return life

    @property
    def life(self) -> Life:
        return self.lives[-1]


class Life:
    pid = os.getpid()

    def __init__(self, engine: FakeEngine, control: socket.socket, inbox: int, outbox: int) -> None:
        self.engine = engine
        self.models: dict[ModelId, Manifest] = {}
        self.task = asyncio.create_task(self._serve(control, inbox, outbox), name="fake engine")

    async def wait(self) -> int:
        await asyncio.wait([self.task])
        return 0 if self.task.cancelled() else 1

    def kill(self) -> None:
        self.task.cancel()

    async def _serve(self, control: socket.socket, inbox: int, outbox: int) -> None:
        inputs, outputs = Arena.attach(inbox), Arena.attach(outbox)
        self.room, self.blocks = Allocator(outputs.capacity), {}
        reader, writer = await asyncio.open_unix_connection(sock=control)
        try:
            writer.write(wire.pack(wire.EngineStarted("fake", "Fake 3000", "", 1 << 30, 0, "0")))
            while True:
                size = int.from_bytes(await reader.readexactly(4), "little")
                command = wire.unpack_command(await reader.readexactly(size))
                event = await self._do(command, inputs.view, outputs.view)
                if isinstance(command, wire.Stop):
                    return
                if event is not None:
                    writer.write(wire.pack(event))
        except asyncio.IncompleteReadError:
            return
        except EngineDiesError:
            return
        finally:
            writer.close()
            inputs.close()
            outputs.close()

    async def _do(
        self, command: wire.Command, inputs: memoryview, outputs: memoryview
    ) -> wire.Event | None:
        match command:
            case wire.LoadModel():
                self.engine.loads.append(command)
                if command.model.startswith("deadly"):
                    raise EngineDiesError
                if command.model.startswith("stuck"):
                    await self.engine.gate.wait()
                if command.model.startswith("broken"):
                    return wire.LoadFailed(command.model, "model_failed", "not a program")
                self.models[command.model] = command.manifest
                weights = command.manifest.size_bytes
                return wire.ModelLoaded(
                    command.model, command.manifest.inputs or (), weights, {1: 64}, {1: 0.001}, 0.01
                )
            case wire.EvictModel():
                del self.models[command.model]
                self.engine.evictions.append(command.model)
                return wire.ModelEvicted(command.model)
            case wire.RunBatch():
                return await self._run(command, inputs, outputs)
            case wire.Release():
                for batch in command.batches:
                    for offset in self.blocks.pop(batch, ()):
                        self.room.free(offset)
        return None

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
            raise EngineDiesError
        if name.startswith("fail") and (x < 0).any():
            return wire.BatchFailed(command.batch, "model_failed", "x is negative")
        y = from_numpy("y", (2 * x).astype(np.float32))
        if name.startswith("short"):
            y = from_numpy("y", (2 * x).astype(np.float32)[:-1])
        offset = self.room.alloc(len(y.data))
        assert offset is not None
        self.blocks[command.batch] = [offset]
        outputs[offset : offset + len(y.data)] = y.data
        out = wire.TensorRef("y", "FP32", y.shape, offset, len(y.data))
        if name.startswith(("garbled", "hollow")):
            size = len(y.data) if name.startswith("garbled") else 0
            out = wire.TensorRef("y", "BYTES", y.shape, offset, size)
        return wire.BatchRan(command.batch, (out,), 0.001, 0)


class EngineDiesError(Exception):
    """As a segmentation fault would."""
