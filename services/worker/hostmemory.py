"""What the system says of this machine's memory and of what a process takes of it. No torch:
both the agent and the engine ask."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def machine_bytes(cgroup: Path = _CGROUP) -> int:
    """All that there is: the machine's, or the container's where that allows less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(machine, int((cgroup / "memory.max").read_text()))
    return machine


def process_bytes(field: str, pid: int | str = "self") -> int:
    """One of the figures in a process' status (`RssAnon`: its own pages, neither shared regions
    nor libraries). 0 when the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


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
