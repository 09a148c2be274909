"""Starting an engine: a process with four descriptors of ours, and no credential."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Final, Protocol

import structlog

from services.worker.arena import Arena

log = structlog.get_logger(__name__)

_KEPT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "PYTHONPATH", "VIRTUAL_ENV",
)  # fmt: skip
_KEPT_PREFIXES: Final = ("CUDA_", "NVIDIA_", "MALLOC_", "OMP_", "MKL_", "PYTORCH_", "TORCH_")
_PR_SET_DUMPABLE: Final = 4
_LAST_OUTPUT_S: Final = 1.0
"""For what was printed just before the end."""
_ROOT: Final = Path(__file__).parents[2]


class EngineProcess(Protocol):
    """One life of an engine, seen from outside."""

    pid: int

    async def wait(self) -> int:
        """Its exit status, once it has ended."""

    def kill(self) -> None:
        """At once. Nothing when it has ended already."""


Launch = Callable[[socket.socket, socket.socket, Arena, Arena], Awaitable[EngineProcess]]
"""Starts an engine on its ends of the two sockets (about models, about batches), the inbox and
the outbox."""


def hide_from_engines() -> None:
    """Keeps this process's environment and memory, where the credentials are, from processes of
    the same user: `/proc/<pid>/environ` and the like are root's from now on, and nobody may
    attach. An engine does not inherit it, so that we can still measure its memory. Linux only,
    and as far as it goes: root reads everything, so a worker should not run as root."""
    if sys.platform == "linux":
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is None or prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            log.warning("environment_not_hidden")


def engine_environment(threads: int) -> dict[str, str]:
    """What an engine needs, and nothing that opens a door: it runs programs of strangers."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }
    paths = [str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    defaults = {"OMP_NUM_THREADS": str(threads)}
    return defaults | kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def launcher(
    device: str, budget_bytes: int, threads: int, *, host_bytes: int = 0, share: bool = True
) -> Launch:
    """Starts `python -m services.worker.engine`. `host_bytes` is for weights that wait in the
    host's memory; with `share`, models that have a tensor in common keep one copy."""

    async def launch(
        control: socket.socket, batches: socket.socket, inbox: Arena, outbox: Arena
    ) -> EngineProcess:
        return await start(
            sys.executable, "-m", "services.worker.engine",
            "--control-fd", str(control.fileno()),
            "--batch-fd", str(batches.fileno()),
            "--inbox-fd", str(inbox.fd),
            "--outbox-fd", str(outbox.fd),
            "--device", device,
            "--budget-bytes", str(budget_bytes),
            "--host-bytes", str(host_bytes),
            "--share", str(int(share)),
            "--threads", str(threads),
            pass_fds=(control.fileno(), batches.fileno(), inbox.fd, outbox.fd),
            env=engine_environment(threads),
        )  # fmt: skip

    return launch


async def start(
    *command: str, pass_fds: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> EngineProcess:
    """Starts a process whose output becomes log lines. Raises `OSError`."""
    # A pipe of our own: with asyncio's a process has not ended before the pipe has, and a
    # process that a model left behind may hold it.
    ours, theirs = os.pipe()
    output = os.fdopen(ours, "rb", buffering=0)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            pass_fds=pass_fds,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=theirs,
            stderr=asyncio.subprocess.STDOUT,
        )
    except BaseException:
        output.close()
        raise
    finally:
        os.close(theirs)
    return _Process(process, output)


class _Process:
    def __init__(self, process: asyncio.subprocess.Process, output: IO[bytes]) -> None:
        self._process = process
        self.pid = process.pid
        listening = self._listen(output)
        self._listening = asyncio.create_task(listening, name=f"engine {self.pid} output")

    async def wait(self) -> int:
        status = await self._process.wait()
        await asyncio.wait((self._listening,), timeout=_LAST_OUTPUT_S)
        self._listening.cancel()
        return status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _listen(self, output: IO[bytes]) -> None:
        """What the engine, or a model in it, prints becomes log lines."""
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), output
        )
        pending = b""
        with contextlib.closing(transport):
            while chunk := await stream.read(1 << 16):
                *lines, pending = (pending + chunk)[-(1 << 16) :].split(b"\n")
                for line in lines:
                    self._log(line)
        self._log(pending)

    def _log(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip()[:2000]:
            log.info("engine_said", engine=self.pid, line=text)
