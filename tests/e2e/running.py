"""`roost up` as a child of the tests, and the other commands against it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


class Up:
    """A stack started by the command line in a data directory of its own."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.data = data
        self.endpoints: dict[str, str] = {}
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "roost", "up", "--port", "0", "--data", str(data), *arguments],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self, limit_s: float = 120) -> None:
        """Returns at the line `ready: URL`; fails with what it said instead."""
        deadline = time.monotonic() + limit_s
        while "ready" not in self.endpoints:
            line = self._lines.get(timeout=max(0.1, deadline - time.monotonic()))
            if line is None:
                _, errors = self.process.communicate(timeout=10)
                raise AssertionError(f"roost up ended with {self.process.returncode}: {errors}")
            name, _, value = line.strip().partition(": ")
            self.endpoints[name] = value

    @property
    def url(self) -> str:
        return self.endpoints["ready"]

    def roost(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs another `roost` command against this stack."""
        done = subprocess.run(
            [sys.executable, "-m", "roost", *arguments],
            cwd=ROOT,
            env=clean_environment()
            | {"ROOST_URL": self.url, "ROOST_PLACER_URL": self.endpoints["placer"]},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def children(self) -> set[int]:
        """Process ids of all that it started, directly or not."""
        found: set[int] = set()
        parents = {self.process.pid}
        while parents:
            children = {
                int(child)
                for parent in parents
                for task in Path(f"/proc/{parent}/task").glob("*")
                for child in (task / "children").read_text().split()
            }
            parents = children - found
            found |= children
        return found

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C, as a terminal sends it to the foreground process; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        return status

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def clean_environment() -> dict[str, str]:
    """This environment without settings of Roost's own."""
    return {k: v for k, v in os.environ.items() if not k.startswith("ROOST_")}


def save_doubler(folder: Path) -> Path:
    """A scripted model: x → y = 2·x."""

    class Doubler(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    path = folder / "doubler.pt"
    torch.jit.script(Doubler()).save(str(path))
    return path
