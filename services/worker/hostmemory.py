"""How much of this machine's memory is free for copies of weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """What could be taken now without swapping: the machine's word, and the container's where
    that allows less. 0 when nobody tells."""
    free = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        most = int((cgroup / "memory.max").read_text())  # else "max", which is no number
        free = min(free, most - int((cgroup / "memory.current").read_text()) + _cached(cgroup))
    return max(free, 0)


def _cached(cgroup: Path) -> int:
    """Of files, in the container's account: given back when somebody needs it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (cgroup / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0
