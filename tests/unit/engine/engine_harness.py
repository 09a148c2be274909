"""The agent's half of an engine, as small as it can be: a process, two sockets, two regions."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from services.worker.arena import Allocator, Arena
from services.worker.confinement.plan import Confinement, Mode
from services.worker.wire import (
    BatchFailed,
    BatchRan,
    EngineStarted,
    EvictModel,
    LoadFailed,
    LoadModel,
    MemoryMeasured,
    ModelEvicted,
    ModelLoaded,
    Release,
    RunBatch,
    TensorRef,
    WarmUp,
    pack,
    unpack_event,
)
from shared.layout import Extent, Layout
from shared.models import Datatype, Manifest, TensorSpec
from shared.names import split_model_id
from shared.tensors import Tensor, from_numpy, to_numpy

Tier = Literal["host", "device"]
ROOT = Path(__file__).parents[3]
DEADLINE_S = 60.0


class _Stream:
    """Frames of one socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE_S)
        self.sock = sock
        self._buffer = b""

    def event(self) -> Any:
        """The next message. Raises `EOFError` when the engine is gone."""
        size = int.from_bytes(self._read(4), "little")
        return unpack_event(self._read(size))

    def _read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            chunk = self.sock.recv(1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


class EngineProcess:
    """Starts an engine and speaks the wire with it. Every wait has a deadline.

    It is confined as workers' engines are, unless told otherwise, by whatever the host grants; the
    files of tests are where temporary files are, and those it may read.
    """

    def __init__(
        self,
        *,
        device="cpu",
        budget_bytes=1 << 30,
        host_bytes=0,
        share=True,
        inbox_bytes=1 << 22,
        outbox_bytes=1 << 22,
        confine: Mode = "auto",
        entry: Sequence[str] = ("-m", "services.worker.engine"),
    ):
        self.scratch = Path(tempfile.mkdtemp(prefix="roost-test-engine-"))
        readable = (tempfile.gettempdir(), str(ROOT))
        confinement = Confinement(confine, str(self.scratch), readable)
        self.inbox = Arena.create("inbox", inbox_bytes)
        self.outbox = Arena.create("outbox", outbox_bytes)
        self.sock, control = socket.socketpair()
        self.batch_sock, batches = socket.socketpair()
        self.memory = MemoryMeasured(0)
        """As the engine told it last."""
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115 — closed in __exit__
        fds = (control.fileno(), batches.fileno(), self.inbox.fd, self.outbox.fd)
        self.process = subprocess.Popen(
            [
                *(sys.executable, *entry),
                *("--control-fd", str(fds[0]), "--batch-fd", str(fds[1])),
                *("--inbox-fd", str(fds[2]), "--outbox-fd", str(fds[3])),
                *("--device", device, "--threads", "1"),
                *("--budget-bytes", str(budget_bytes), "--host-bytes", str(host_bytes)),
                *("--share", str(int(share))),
                *("--confinement", msgspec.json.encode(confinement).decode()),
            ],
            pass_fds=fds,
            stderr=self.stderr,
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TMPDIR": str(self.scratch)},
        )
        control.close()
        batches.close()
        self._control = _Stream(self.sock)
        self._batch_events = _Stream(self.batch_sock)
        self._allocator = Allocator(inbox_bytes)
        self._inputs: dict[int, list[int]] = {}
        self._batches = itertools.count(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.sock.close()
        self.batch_sock.close()
        self.stderr.close()
        self.inbox.close()
        self.outbox.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    # --- messages

    def send(self, message) -> None:
        of_batches = isinstance(message, RunBatch | Release)
        (self.batch_sock if of_batches else self.sock).sendall(pack(message))

    def event(self) -> Any:
        """The engine's next message about models; what it says of memory is only noted."""
        while True:
            event = self._event(self._control)
            if not isinstance(event, MemoryMeasured):
                return event
            self.memory = event

    def _event(self, stream: _Stream) -> Any:
        try:
            return stream.event()
        except EOFError:
            raise EOFError(self.errors()) from None

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

    def load(self, *arguments, **options) -> ModelLoaded | LoadFailed:
        """See `command`."""
        self.send(command(*arguments, **options))
        event = self.event()
        assert isinstance(event, ModelLoaded | LoadFailed), event
        return event

    def hold(self, *arguments, **options) -> ModelLoaded | LoadFailed:
        return self.load(*arguments, tier="host", **options)

    def evict(self, model: str, tier: Tier = "device") -> None:
        self.send(EvictModel(model, tier))
        event = self.event()
        assert event == ModelEvicted(model, tier), event

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
        event = self._event(self._batch_events)
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
        """What the engine says now: it does so with every eviction, were it of nothing."""
        self.evict("nobody/1")
        return self.memory.used_bytes

    def settled(self) -> MemoryMeasured:
        """What the engine says once nothing is reserved any more."""
        while self.memory.spare_bytes or self.memory.host_spare_bytes:
            event = self._event(self._control)
            assert isinstance(event, MemoryMeasured), event
            self.memory = event
        return self.memory

    def resident_bytes(self) -> int:
        """What the system says that the engine takes of the machine by itself."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (each for each in status.splitlines() if each.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def kill(self, number=signal.SIGKILL) -> None:
        self.process.send_signal(number)


def spec(name: str, datatype: Datatype, *shape: int, optional=False) -> TensorSpec:
    return TensorSpec(name, datatype, shape, optional)


def command(
    model: str,
    path,
    warm: Sequence[WarmUp] = (),
    *,
    layout: Layout | None = None,
    tier: Tier = "device",
    keep_host=False,
    **spec,
) -> LoadModel:
    """A load of the file; `spec` is of the manifest's."""
    name, version = split_model_id(model)
    size = Path(path).stat().st_size if Path(path).exists() else 1
    manifest = Manifest(
        name=name,
        version=version,
        digest="sha256:" + "0" * 64,
        size_bytes=size,
        created_at=0.0,
        **spec,
    )
    file = (Extent(str(path), 0, size),)
    return LoadModel(model, file, manifest, layout, tuple(warm), tier, keep_host)
