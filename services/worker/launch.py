"""Starting an engine: a process with four descriptors of ours, and no credential. What else keeps
it in, it does by itself (`confinement/confine.py`), while nobody else's code is in it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec
import structlog

from services.worker.arena import Arena
from services.worker.confinement.plan import Confinement
from services.worker.confining import Scratch, make_device_files
from services.worker.threads import in_thread

log = structlog.get_logger(__name__)

_KEPT: Final = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "PYTHONPATH", "VIRTUAL_ENV",
)  # fmt: skip
_KEPT_PREFIXES: Final = ("CUDA_", "NVIDIA_", "MALLOC_", "OMP_", "MKL_", "PYTORCH_", "TORCH_")
_SECRETS: Final = ("KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL")
"""In a name of the environment: `NVIDIA_API_KEY` begins as what an engine needs."""
_PR_SET_DUMPABLE: Final = 4
_PERIOD_S: Final = 10.0
_PERIOD_LINES: Final = 500
"""In so long: a model may print for ever, and a disk is not that large."""
_LAST_OUTPUT_S: Final = 1.0
"""For what was printed just before the end."""
_ROOT: Final = Path(__file__).parents[2]
_FREE: Final = Confinement()


class EngineProcess(Protocol):
    """One life of an engine, seen from outside."""

    pid: int

    async def wait(self) -> int:
        """Its exit status, once it has ended."""

    def kill(self) -> None:
        """At once. Nothing when it has ended already."""

    def hush(self) -> None:
        """From now on its output may be a stranger's, and hold what the stranger was asked: it is
        logged at `debug`, and nowhere else."""


Launch = Callable[[socket.socket, socket.socket, Arena, Arena], Awaitable[EngineProcess]]
"""Starts an engine on its ends of the two sockets (about models, about batches), the inbox and
the outbox."""


def hide_from_engines() -> None:
    """Keeps this process's environment and memory, where the credentials are, from processes of
    the same user: `/proc/<pid>/environ` and the like are root's from now on, and nobody may
    attach. An engine does not inherit it, so that we can still measure its memory. Linux only,
    and as far as it goes: root reads everything, but for a confined engine, which has its
    user's name and none of its rights."""
    if sys.platform == "linux":
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is None or prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            log.warning("environment_not_hidden")


def engine_environment(threads: int) -> dict[str, str]:
    """What an engine needs, and nothing that opens a door: it runs programs of strangers."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT
        or (name.startswith(_KEPT_PREFIXES) and not any(word in name for word in _SECRETS))
    }
    paths = [str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    defaults = {"OMP_NUM_THREADS": str(threads)}
    return defaults | kept | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def launcher(
    device: str,
    budget_bytes: int,
    threads: int,
    *,
    host_bytes: int = 0,
    share: bool = True,
    confinement: Confinement = _FREE,
) -> Launch:
    """Starts `python -m services.worker.engine`. `host_bytes` is for weights that wait in the
    host's memory; with `share`, models that have a tensor in common keep one copy. A confined one
    has a folder of its own for each life, which ends with it."""

    async def launch(
        control: socket.socket, batches: socket.socket, inbox: Arena, outbox: Arena
    ) -> EngineProcess:
        if confinement.mode != "off" and device != "cpu":
            await in_thread(make_device_files, "device files")
        scratch = None
        if confinement.mode != "off":
            scratch = await in_thread(lambda: Scratch(confinement), "an engine's folder")
        asked = msgspec.structs.replace(confinement, scratch=scratch.path if scratch else "")
        own = scratch.environment() if scratch else {}
        remove = scratch.remove if scratch else None
        return await start(
            # -P: what lies in the folder that the worker was started in is none of its modules.
            sys.executable, "-P", "-m", "services.worker.engine",
            "--control-fd", str(control.fileno()),
            "--batch-fd", str(batches.fileno()),
            "--inbox-fd", str(inbox.fd),
            "--outbox-fd", str(outbox.fd),
            "--device", device,
            "--budget-bytes", str(budget_bytes),
            "--host-bytes", str(host_bytes),
            "--share", str(int(share)),
            "--threads", str(threads),
            "--confinement", msgspec.json.encode(asked).decode(),
            pass_fds=(control.fileno(), batches.fileno(), inbox.fd, outbox.fd),
            env=engine_environment(threads) | own,
            on_end=remove,
        )  # fmt: skip

    return launch


async def start(
    *command: str,
    pass_fds: tuple[int, ...] = (),
    env: Mapping[str, str] | None = None,
    on_end: Callable[[], None] | None = None,
) -> EngineProcess:
    """Starts a process whose output becomes log lines. `on_end` is called in a thread, once it has
    ended or could not be started. Raises `OSError`."""
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
        if on_end is not None:
            on_end()
        raise
    finally:
        os.close(theirs)
    return _Process(process, output, on_end)


class _Process:
    def __init__(
        self,
        process: asyncio.subprocess.Process,
        output: IO[bytes],
        on_end: Callable[[], None] | None,
    ) -> None:
        self._process = process
        self._on_end = on_end
        self._say = log.info
        self._said = (0.0, 0)
        """When the present `_PERIOD_S` began, and the lines in it."""
        self.pid = process.pid
        listening = self._listen(output)
        self._listening = asyncio.create_task(listening, name=f"engine {self.pid} output")

    async def wait(self) -> int:
        status = await self._process.wait()
        await asyncio.wait((self._listening,), timeout=_LAST_OUTPUT_S)
        self._listening.cancel()
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            await in_thread(on_end, f"after engine {self.pid}")
        return status

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def hush(self) -> None:
        self._say = log.debug

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
        text = line.decode(errors="replace").strip()[:2000]
        if not text:
            return
        began, lines = self._said
        if (now := time.monotonic()) - began > _PERIOD_S:
            if lines > _PERIOD_LINES:
                log.info("engine_said_more", engine=self.pid, lines=lines - _PERIOD_LINES)
            began, lines = now, 0
        self._said = began, lines + 1
        if lines < _PERIOD_LINES:
            self._say("engine_said", engine=self.pid, line=text)
