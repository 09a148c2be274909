"""Starting an engine: a process with three descriptors of ours, and no credential."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Protocol

import structlog

from services.worker.arena import Arena

log = structlog.get_logger(__name__)

_KEPT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "PYTHONPATH", "VIRTUAL_ENV",
)  # fmt: skip
_KEPT_PREFIXES: Final = ("CUDA_", "NVIDIA_", "MALLOC_", "OMP_", "MKL_", "PYTORCH_", "TORCH_")
_PR_SET_DUMPABLE: Final = 4
_ROOT: Final = Path(__file__).parents[2]


class EngineProcess(Protocol):
    """One life of an engine, seen from outside."""

    pid: int

    async def wait(self) -> int:
        """Its exit status, once it has ended."""

    def kill(self) -> None:
        """At once. Nothing when it has ended already."""


Launch = Callable[[socket.socket, Arena, Arena], Awaitable[EngineProcess]]
"""Starts an engine on its end of the control socket, the inbox and the outbox."""


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
    # Few arenas of malloc: what an evicted model leaves behind in many is hardly given back.
    defaults = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": str(threads)}
    return defaults | kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def launcher(device: str, budget_bytes: int, threads: int) -> Launch:
    """Starts `python -m services.worker.engine`."""

    async def launch(control: socket.socket, inbox: Arena, outbox: Arena) -> EngineProcess:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.worker.engine",
            "--control-fd", str(control.fileno()),
            "--inbox-fd", str(inbox.fd),
            "--outbox-fd", str(outbox.fd),
            "--device", device,
            "--budget-bytes", str(budget_bytes),
            "--threads", str(threads),
            pass_fds=(control.fileno(), inbox.fd, outbox.fd),
            env=engine_environment(threads),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        return _Process(process)

    return launch


class _Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self._listening = asyncio.create_task(self._listen(), name=f"engine {self.pid} output")

    async def wait(self) -> int:
        status = await self._process.wait()
        await self._listening
        return status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _listen(self) -> None:
        """What the engine, or a model in it, prints becomes log lines."""
        stream = self._process.stdout
        assert stream is not None
        pending = b""
        while chunk := await stream.read(1 << 16):
            *lines, pending = (pending + chunk)[-(1 << 16) :].split(b"\n")
            for line in lines:
                self._log(line)
        self._log(pending)

    def _log(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip()[:2000]:
            log.info("engine_said", engine=self.pid, line=text)
