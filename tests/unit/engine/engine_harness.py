"""The agent's half of an engine, as small as it can be: a process, a socket, two regions."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from services.worker.arena import Allocator, Arena
from services.worker.wire import (
    BatchFailed,
    BatchRan,
    EngineStarted,
    EvictModel,
    LoadFailed,
    LoadModel,
    MeasureMemory,
    MemoryMeasured,
    ModelEvicted,
    ModelLoaded,
    Release,
    RunBatch,
    TensorRef,
    pack,
    unpack_event,
)
from shared.models import Datatype, Manifest, TensorSpec
from shared.names import split_model_id
from shared.tensors import Tensor, from_numpy, to_numpy

ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0


class EngineProcess:
    """Starts an engine and speaks the wire with it. Every wait has a deadline."""

    def __init__(
        self, *, device="cpu", budget_bytes=1 << 30, inbox_bytes=1 << 22, outbox_bytes=1 << 22
    ):
        self.inbox = Arena.create("inbox", inbox_bytes)
        self.outbox = Arena.create("outbox", outbox_bytes)
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(DEADLINE_S)
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 — closed in __exit__
        fds = (theirs.fileno(), self.inbox.fd, self.outbox.fd)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "services.worker.engine"),
                *("--control-fd", str(fds[0]), "--inbox-fd", str(fds[1])),
                *("--outbox-fd", str(fds[2]), "--device", device),
                *("--budget-bytes", str(budget_bytes), "--threads", "1"),
            ],
            pass_fds=fds,
            stderr=self.stderr,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
        )
        theirs.close()
        self._allocator = Allocator(inbox_bytes)
        self._inputs: dict[int, list[int]] = {}
        self._batches = itertools.count(1)
        self._buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.sock.close()
        self.stderr.close()
        self.inbox.close()
        self.outbox.close()

    # --- messages

    def send(self, message) -> None:
        self.sock.sendall(pack(message))

    def event(self) -> Any:
        """The engine's next message. Raises `EOFError` when it is gone."""
        size = int.from_bytes(self._read(4), "little")
        return unpack_event(self._read(size))

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            chunk = self.sock.recv(1 << 16)
            if not chunk:
                raise EOFError(self.errors())
            self._buffer += chunk
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def errors(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read().decode(errors="replace")

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)

    def started(self) -> EngineStarted:
        event = self.event()
        assert isinstance(event, EngineStarted), event
        return event

    # --- one thing and its answer

    def load(self, model: str, path, warm_rows=(), **spec) -> ModelLoaded | LoadFailed:
        name, version = split_model_id(model)
        manifest = Manifest(
            name=name,
            version=version,
            digest="sha256:" + "0" * 64,
            size_bytes=Path(path).stat().st_size if Path(path).exists() else 0,
            created_at=0.0,
            **spec,
        )
        self.send(LoadModel(model, str(path), manifest, tuple(warm_rows)))
        return self.event()

    def evict(self, model: str) -> None:
        self.send(EvictModel(model))
        event = self.event()
        assert event == ModelEvicted(model), event

    def submit(self, model: str, inputs: dict[str, Any], rows=1) -> int:
        """Hands a batch over without waiting; returns its number. Inputs are arrays or tensors."""
        batch = next(self._batches)
        refs = []
        offsets = self._inputs[batch] = []
        for name, value in inputs.items():
            tensor = value if isinstance(value, Tensor) else from_numpy(name, np.asarray(value))
            offset = self._allocator.alloc(len(tensor.data))
            assert offset is not None, "the test's inbox is too small"
            offsets.append(offset)
            self.inbox.view[offset : offset + len(tensor.data)] = bytes(tensor.data)
            refs.append(TensorRef(name, tensor.datatype, tensor.shape, offset, len(tensor.data)))
        self.send(RunBatch(batch, model, rows, tuple(refs)))
        return batch

    def answer(self) -> BatchRan | BatchFailed:
        event = self.event()
        assert isinstance(event, BatchRan | BatchFailed), event
        for offset in self._inputs.pop(event.batch, []):
            self._allocator.free(offset)
        return event

    def outputs(self, event: BatchRan) -> dict[str, Tensor]:
        """Copies of a batch's outputs; its bytes are given back."""
        copies = {
            ref.name: Tensor(
                ref.name,
                ref.datatype,
                ref.shape,
                bytes(self.outbox.view[ref.offset : ref.offset + ref.nbytes]),
            )
            for ref in event.outputs
        }
        self.send(Release((event.batch,)))
        return copies

    def run(self, model: str, inputs: dict[str, Any], rows=1) -> dict[str, np.ndarray]:
        """Runs one batch to its outputs; fails the test when the engine does not."""
        self.submit(model, inputs, rows)
        event = self.answer()
        assert isinstance(event, BatchRan), event
        return {name: to_numpy(tensor) for name, tensor in self.outputs(event).items()}

    def refused(self, model: str, inputs: dict[str, Any], rows=1) -> BatchFailed:
        """Runs one batch that is expected to fail."""
        self.submit(model, inputs, rows)
        event = self.answer()
        assert isinstance(event, BatchFailed), event
        return event

    def used_bytes(self) -> int:
        self.send(MeasureMemory())
        event = self.event()
        assert isinstance(event, MemoryMeasured), event
        return event.used_bytes

    def kill(self, number=signal.SIGKILL) -> None:
        self.process.send_signal(number)


def spec(name: str, datatype: Datatype, *shape: int, optional=False) -> TensorSpec:
    return TensorSpec(name, datatype, shape, optional)
