"""A private process: started in its own session, gone when it is told to or its parent dies."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from roost.local import launcher


class ServiceFailed(RuntimeError):
    """A private service did not start; the message ends with what it last wrote."""


class OwnedProcess:
    """One program and its process group. Not restartable: make another one."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        output: Path,
    ) -> None:
        """Starts it. Standard output and error are appended to `output`."""
        self.name = name
        self.output = output
        argv = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command]
        with output.open("ab") as log:

            def start() -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    argv,
                    env=dict(env),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

            self._process = _in_immortal_thread(start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.poll()

    def wait_ready(self, probe: Callable[[], bool], timeout_s: float) -> None:
        """Returns once `probe()` says yes. Raises `ServiceFailed` when the process ends or the
        time is over before that."""
        deadline = time.monotonic() + timeout_s
        while not probe():
            if self.returncode is not None:
                raise ServiceFailed(f"{self.name} ended with status {self.returncode}")
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{self.name} was not ready within {timeout_s:.0f} s")
            time.sleep(0.05)

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, and kills it when it has not after `timeout_s`. Idempotent."""
        if self.returncode is None:
            # A suspended process would sleep through the request.
            self.signal(signal.SIGCONT)
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """Kills the whole group and returns when its leader is gone. Idempotent."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group."""
        # The group's number stays taken while any member lives, so it cannot be another's
        # group; once all are gone nobody has it, unless process ids have gone full circle.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def tail(*files: Path, lines: int = 15) -> str:
    """The last lines of each file, for an error message; files that are missing or empty are
    left out."""
    parts = []
    for file in files:
        with suppress(OSError):
            text = file.read_text(errors="replace").rstrip()
            if text:
                parts.append(f"--- {file}\n" + "\n".join(text.splitlines()[-lines:]))
    return "\n".join(parts)


_jobs: queue.SimpleQueue[
    tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]
] = queue.SimpleQueue()
_starter: threading.Thread | None = None
_starter_lock = threading.Lock()


def _in_immortal_thread(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Forks in a thread that lives as long as this process: the kernel sends the parent-death
    signal when the *thread* that forked ends, and ours may be an executor's."""
    global _starter  # noqa: PLW0603
    with _starter_lock:
        # After a fork of this very process the thread exists in the parent alone.
        if _starter is None or not _starter.is_alive():
            _starter = threading.Thread(target=_serve_jobs, name="roost-starter", daemon=True)
            _starter.start()
    future: Future[subprocess.Popen[bytes]] = Future()
    _jobs.put((start, future))
    return future.result()


def _serve_jobs() -> None:
    while True:
        start, future = _jobs.get()
        try:
            future.set_result(start())
        except BaseException as error:  # noqa: BLE001  (it is raised in the caller's thread)
            future.set_exception(error)
