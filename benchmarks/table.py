"""A device that computes nothing and takes its time: service times come from a table.

Where the machine has fewer cores than the experiment has devices, real models measure the cores.
This engine speaks the agent's own protocol (services/worker/wire.py), sleeps on one device for
what the table says of each batch and on one copier for each load, and answers `y = 2·x`. All
else (agent, core, broker, store, placer, gateway) is the real thing. Nothing here needs torch.

The table of a model stands in its manifest's parameters: who has the model has its times.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import zipfile
from bisect import bisect_left
from typing import Final

import msgspec
import numpy as np

from services.worker import wire
from services.worker.arena import Allocator, Arena
from shared.models import Case, ModelSpec, Profile, TensorSpec
from shared.names import ModelId
from shared.repository import Repository
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from sim.model import SimModel

DEVICE_KIND: Final = "table"
WIDTH: Final = 4
"""Elements of the input `x` and of the output `y`."""
_PARAMETER: Final = "table"


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What one model is to take."""

    cases: tuple[tuple[int, float], ...]
    """Rows and seconds of a batch, ascending; between two of them linear."""
    weights_bytes: int = 1 << 20
    load_seconds: float = 0.1
    """From the disk to the device."""
    swap_seconds: float = 0.01
    """From the host's memory to the device."""

    def seconds(self, rows: int) -> float:
        """Of a batch of so many rows; beyond the table by the cost of a row of its greatest."""
        sizes = [each for each, _ in self.cases]
        at = bisect_left(sizes, rows)
        if at == 0:
            return self.cases[0][1]
        if at == len(sizes):
            return self.cases[-1][1] * rows / sizes[-1]
        (low, first), (high, second) = self.cases[at - 1], self.cases[at]
        return first + (second - first) * (rows - low) / (high - low)

    @classmethod
    def of(cls, manifest: ModelSpec) -> Table:
        """Raises `KeyError` for a model that has none."""
        return msgspec.json.decode(str(manifest.parameters[_PARAMETER]), type=cls)

    def measured(self) -> tuple[Case, ...]:
        return tuple(Case(rows, 0, seconds) for rows, seconds in self.cases)


def spec_of(table: Table, target_ms: float) -> ModelSpec:
    """What is registered of a model of that table."""
    tensor = TensorSpec("x", "FP32", (WIDTH,))
    return ModelSpec(
        inputs=(tensor,),
        outputs=(msgspec.structs.replace(tensor, name="y"),),
        max_batch_size=table.cases[-1][0],
        target_ms=target_ms,
        parameters={_PARAMETER: msgspec.json.encode(table).decode()},
    )


def put_file(repository: Repository) -> str:
    """The file of all of them; returns its digest."""
    return repository.files.put([_FILE])[0]


def register(repository: Repository, name: str, table: Table, *, target_ms: float) -> SimModel:
    """Registers a model of that table, measured already, so that nobody must guess its size.
    Returns it as the simulator knows it."""
    spec = spec_of(table, target_ms)
    manifest = repository.register(name, None, spec, put_file(repository))
    profile = Profile(
        device_kind=DEVICE_KIND,
        weights_bytes=table.weights_bytes,
        cases=table.measured(),
        load_seconds=table.load_seconds,
        swap_seconds=table.swap_seconds,
    )
    repository.profiles.put(manifest.id, profile)
    return SimModel(
        manifest=manifest,
        cases=table.measured(),
        weights_bytes=table.weights_bytes,
        load_seconds=table.load_seconds,
        swap_seconds=table.swap_seconds,
    )


def request() -> tuple[bytes, int | None]:
    """The body of one request to any of them, and the length of its header."""
    x = from_numpy("x", np.ones((1, WIDTH), np.float32))
    return encode_request(InferRequest(inputs=(x,)))


class TableEngine:
    """Its `launch` is handed to the worker in place of `services.worker.launch.launcher`'s. It
    lives in the agent's own process: an executor that sleeps needs no core of its own."""

    async def launch(
        self, control: socket.socket, batches: socket.socket, inbox: Arena, outbox: Arena
    ) -> _Life:
        return _Life(control.dup(), batches.dup(), os.dup(inbox.fd), os.dup(outbox.fd))


class _Stopped(Exception):
    """The agent told the engine to end."""


class _Life:
    """One life of the engine, as `services.worker.launch.EngineProcess`."""

    def __init__(
        self, control: socket.socket, batches: socket.socket, inbox: int, outbox: int
    ) -> None:
        self.pid = os.getpid()
        self._inbox, self._outbox = Arena.attach(inbox), Arena.attach(outbox)
        self._room = Allocator(self._outbox.capacity)
        self._blocks: dict[int, int] = {}
        self._tables: dict[ModelId, Table] = {}
        """On the device."""
        self._host: dict[ModelId, Table] = {}
        self._free_at = 0.0
        """When the device will have done all it was given, in the loop's time."""
        self._task = asyncio.create_task(self._serve(control, batches), name="table engine")

    async def wait(self) -> int:
        await asyncio.wait([self._task])
        return 0 if self._task.cancelled() or self._task.exception() is None else 1

    def hush(self) -> None: ...

    def kill(self) -> None:
        self._task.cancel()

    async def _serve(self, control: socket.socket, batches: socket.socket) -> None:
        commands, self._control = await asyncio.open_unix_connection(sock=control)
        orders, self._answers = await asyncio.open_unix_connection(sock=batches)
        self._say(wire.EngineStarted(DEVICE_KIND, "a table of times", "", 1 << 40, 0, "none"))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve_models(commands))
                group.create_task(self._serve_batches(orders))
        except* (_Stopped, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for each in (self._control, self._answers, self._inbox, self._outbox):
                each.close()

    def _say(self, *events: wire.Event) -> None:
        for event in events:
            self._control.write(wire.pack(event))

    # --- the copier -------------------------------------------------------------------------

    async def _serve_models(self, reader: asyncio.StreamReader) -> None:
        while True:
            match wire.unpack_command(await _body(reader)):
                case wire.LoadModel() as command:
                    answer: wire.Event = await self._load(command)
                case wire.EvictModel() as command:
                    tier = self._host if command.tier == "host" else self._tables
                    tier.pop(command.model, None)
                    answer = wire.ModelEvicted(command.model, command.tier)
                case wire.Stop():
                    raise _Stopped
            self._say(self._memory(), answer)

    async def _load(self, command: wire.LoadModel) -> wire.Event:
        try:
            table = Table.of(command.manifest)
        except (KeyError, msgspec.MsgspecError) as error:
            return wire.LoadFailed(command.model, "model_failed", f"it has no table: {error!r}")
        from_host = command.model in self._host
        seconds = table.swap_seconds if from_host else table.load_seconds
        await asyncio.sleep(seconds)
        if command.tier == "device":
            self._tables[command.model] = table
        if command.tier == "host" or command.keep_host:
            self._host[command.model] = table
        return wire.ModelLoaded(
            command.model,
            command.manifest.inputs or (),
            table.weights_bytes,
            seconds,
            table.measured() if command.tier == "device" else (),
            command.tier,
            "host" if from_host else "disk",
        )

    def _memory(self) -> wire.MemoryMeasured:
        device, host = (
            sum(table.weights_bytes for table in tier.values())
            for tier in (self._tables, self._host)
        )
        return wire.MemoryMeasured(device, 0, host)

    # --- the device -------------------------------------------------------------------------

    async def _serve_batches(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        while True:
            command = wire.unpack_batch_command(await _body(reader))
            if isinstance(command, wire.Release):
                for batch in command.batches:
                    self._room.free(self._blocks.pop(batch))
                continue
            table = self._tables.get(command.model)
            if table is None:
                lost = wire.BatchFailed(command.batch, "not_found", f"{command.model} is not here")
                self._answers.write(wire.pack(lost))
                continue
            # What was handed over ahead begins when the device frees, not when a timer fires:
            # timers are milliseconds late, and a device is not.
            seconds = table.seconds(command.rows)
            self._free_at = max(self._free_at, loop.time()) + seconds
            loop.call_at(self._free_at, self._ran, command, seconds)

    def _ran(self, command: wire.RunBatch, seconds: float) -> None:
        if self._answers.is_closing():
            return
        x = next(ref for ref in command.inputs if ref.name == "x")
        data = bytes(self._inbox.view[x.offset : x.offset + x.nbytes])
        y = from_numpy("y", 2 * np.frombuffer(data, "<f4").reshape(x.shape))
        offset = self._room.alloc(len(y.data))
        if offset is None:
            event: wire.BatchEvent = wire.BatchFailed(command.batch, "too_large", "outbox full")
        else:
            self._blocks[command.batch] = offset
            self._outbox.view[offset : offset + len(y.data)] = y.data
            out = wire.TensorRef("y", "FP32", y.shape, offset, len(y.data))
            event = wire.BatchRan(command.batch, (out,), seconds, 0)
        self._answers.write(wire.pack(event))


async def _body(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))


def _file() -> bytes:
    """The least that the repository takes for TorchScript: nobody will ever load it."""
    members = {
        "data.pkl": b"\x80\x02.",
        "constants.pkl": b"\x80\x02).",
        "code/__torch__.py": b"class M(Module):\n  pass\n",
        "version": b"3\n",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"table/{name}"), data)
    return buffer.getvalue()


_FILE: Final = _file()
