"""Which files an engine may touch, in the words of Landlock (Linux 5.13, if switched on at boot).

A domain holds for the thread that enters it and for all that it starts. So the engine enters
it while it has one thread, and torch and the CUDA driver are loaded inside: what CUDA is known
to need besides (its devices, the names of its own threads, its daemon's socket) is allowed for.

Rules hang on what a path leads to now: a folder that is replaced later is another one.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from services.worker.confinement.plan import Confinement

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE, _MAKE_CHAR, _MAKE_DIR, _MAKE_REG = 0x10 | 0x20, 0x40, 0x80, 0x100
_ABI_1: Final = (1 << 13) - 1
_REFER: Final = 1 << 13
"""ABI 2: between folders, within what is allowed."""
_TRUNCATE: Final = 1 << 14
"""ABI 3."""
_TCP: Final = 1 | 2
"""ABI 4: to bind, to connect."""
_IOCTL_DEV: Final = 1 << 15
"""ABI 5."""
_SCOPE: Final = 1 | 2
"""ABI 6: no abstract socket and no signal to a process outside of the domain."""

_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""The rights that a rule for something other than a folder may have."""

READ: Final = _READ_FILE | _READ_DIR
WRITE: Final = READ | _WRITE_FILE | _TRUNCATE
OWN: Final = WRITE | _REMOVE | _MAKE_DIR | _MAKE_REG | _REFER
DEVICE: Final = READ | _WRITE_FILE | _IOCTL_DEV

_SYSTEM: Final = (
    "/usr", "/lib", "/lib32", "/lib64", "/opt", "/nix/store", "/sys",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone",
    "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/os-release", "/etc/nvidia",
    "/proc/cpuinfo", "/proc/devices", "/proc/driver", "/proc/filesystems", "/proc/loadavg",
    "/proc/meminfo", "/proc/modules", "/proc/stat", "/proc/sys", "/proc/uptime", "/proc/version",
)  # fmt: skip
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_CUDA_DEVICES: Final = ("nvidia*", "nvhost*", "nvmap", "dxg")
_CUDA: Final = ("/run/nvidia-persistenced", "/var/run/nvidia-persistenced")
"""Its library gives up where it may not look whether the daemon is there."""
_LIBRARY_PATHS: Final = ("LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "TORCH_HOME")


class Rule(NamedTuple):
    path: str
    rights: int


class Handled(NamedTuple):
    """What is forbidden unless a rule allows it."""

    files: int
    network: int
    scope: int


def handled(abi: int) -> Handled:
    """All that this version of the interface knows."""
    files = _ABI_1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        files |= right if abi >= since else 0
    return Handled(files, _TCP if abi >= 4 else 0, _SCOPE if abi >= 6 else 0)


def described(abi: int) -> str:
    kinds = ["files"]
    kinds += ["TCP"] if abi >= 4 else []
    kinds += ["devices"] if abi >= 5 else []
    kinds += ["signals and abstract sockets"] if abi >= 6 else []
    return f"ABI {abi}: {', '.join(kinds)}"


def attributes(abi: int) -> bytes:
    """`struct landlock_ruleset_attr`, as long as this version has it."""
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    return struct.pack("=QQQ", *handled(abi))[:size]


def attached(rights: int, descriptor: int) -> bytes:
    """`struct landlock_path_beneath_attr`."""
    return struct.pack("=Qi", rights, descriptor)


def granted(rights: int, abi: int, mode: int) -> int:
    """Of the rights those that can be given: to what has this file mode, in this version."""
    if not stat.S_ISDIR(mode):
        rights &= _OF_FILES
    return rights & handled(abi).files


def rules(
    confinement: Confinement,
    device: str,
    root: Path,
    search: Iterable[str],
    prefixes: Iterable[str],
    environment: Mapping[str, str],
) -> Iterator[Rule]:
    """For an engine that runs from `root`, finds its modules in `search` (`sys.path`), and whose
    interpreter lives under `prefixes`. Nothing is both writable and executable, and nothing is
    executable at all: a library that is loaded is only read."""
    for path in (*_SYSTEM, *prefixes):
        yield Rule(path, READ)
    # Of a checkout not what lies beside the code: data of a trial, secrets in files.
    for path in search:
        if path and Path(path) != root:
            yield Rule(path, READ)
    for package in ("services", "shared"):
        yield Rule(str(root / package), READ)
    for name in _LIBRARY_PATHS:
        for path in filter(None, environment.get(name, "").split(os.pathsep)):
            yield Rule(path, READ)
    for path in confinement.readable:
        yield Rule(path, READ)
    if confinement.scratch:
        yield Rule(confinement.scratch, OWN)
    for path in _DEVICES:
        yield Rule(path, DEVICE)
    yield Rule("/proc/self", WRITE)  # its figures, its peak's reset, the names of its threads
    if device != "cpu":
        for pattern in _CUDA_DEVICES:
            for found in Path("/dev").glob(pattern):
                yield Rule(str(found), DEVICE)
        for path in _CUDA:
            yield Rule(path, READ)
        if pipes := environment.get("CUDA_MPS_PIPE_DIRECTORY"):
            yield Rule(pipes, WRITE)
