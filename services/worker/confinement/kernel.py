"""The calls that confine a process, of Linux alone. Each raises `OSError` with what the kernel
said."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from services.worker.confinement import landlock

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000

PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_SECUREBITS: Final = 28
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_SECUREBITS_NOROOT_LOCKED: Final = 0b11
"""User 0 is nobody special any more, for good."""
_CAPABILITIES_3: Final = 0x20080522

_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MS_SLAVE: Final = 1 << 19
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_MOUNT_RDONLY: Final = 1
_MOUNT_NOSUID: Final = 2

# The same numbers on all processors, as of all calls since Linux 5.1.
_MOUNT_SETATTR: Final = 442
_LANDLOCK_CREATE: Final = 444
_LANDLOCK_ADD: Final = 445
_LANDLOCK_ENTER: Final = 446
_LANDLOCK_VERSION: Final = 1
_LANDLOCK_PATH: Final = 1

_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_SECCOMP_FILTER: Final = 1
_SECCOMP_ALL_THREADS: Final = 1
_SECCOMP_SPECULATE: Final = 4
"""Without it older kernels slow all computing down, to keep a process from what its own
memory holds: here it holds no other side."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _call(function: Callable[..., int], *arguments: object) -> int:
    result = function(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    """As the kernel takes them: a word each."""
    words = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    return _call(_libc.syscall, ctypes.c_long(number), *words)


def prctl(option: int, *arguments: int) -> int:
    words = [ctypes.c_ulong(each) for each in (*arguments, 0, 0, 0, 0)[:4]]
    return _call(_libc.prctl, option, *words)


def unshare(flags: int) -> None:
    _call(_libc.unshare, flags)


def map_own_ids(uid: int, gid: int) -> None:
    """In a fresh user namespace: who we were, and nobody else."""
    own = Path("/proc/self")
    (own / "setgroups").write_bytes(b"deny")
    (own / "uid_map").write_bytes(b"%d %d 1" % (uid, uid))
    (own / "gid_map").write_bytes(b"%d %d 1" % (gid, gid))


def mount_read_only(writable: str) -> None:
    """In a mount namespace of our own: everything but this folder. Devices stay what they are,
    and /proc, where a process tells the kernel of itself. What is mounted outside later appears
    here too. Linux 5.12."""
    _call(_libc.mount, None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None)
    folder = os.fsencode(writable)
    _call(_libc.mount, folder, folder, None, ctypes.c_ulong(_MS_BIND), None)
    proc_was = os.statvfs("/proc").f_flag
    _change_mount(b"/", _MOUNT_RDONLY | _MOUNT_NOSUID, 0, _AT_RECURSIVE)
    _change_mount(folder, 0, _MOUNT_RDONLY, 0)
    if not proc_was & os.ST_RDONLY:
        _change_mount(b"/proc", 0, _MOUNT_RDONLY, 0)


def _change_mount(path: bytes, add: int, remove: int, flags: int) -> None:
    attributes = struct.pack("=QQQQ", add, remove, 0, 0)
    _syscall(_MOUNT_SETATTR, _AT_FDCWD, path, flags, attributes, len(attributes))


def become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def drop_capabilities() -> None:
    """All of them, and the ways to come by any. What is not there cannot be dropped, and is
    refused in silence."""
    capability = 0
    while True:
        try:
            held = prctl(_PR_CAPBSET_READ, capability)
        except OSError:  # the kernel knows no more of them
            break
        if held:
            try:
                prctl(_PR_CAPBSET_DROP, capability)
            except PermissionError:
                break
        capability += 1
    for option, value in (
        (_PR_SET_SECUREBITS, _SECUREBITS_NOROOT_LOCKED),
        (_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL),
    ):
        with contextlib.suppress(OSError):  # without a capability there is no need for it
            prctl(option, value)
    header = struct.pack("=Ii", _CAPABILITIES_3, 0)
    _call(_libc.capset, header, bytes(24))


def forbid_new_privileges() -> None:
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def landlock_abi() -> int:
    """The version of the interface; raises `OSError` where there is none, or it is off."""
    return _syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)


def enter_landlock(abi: int, rules: Iterable[landlock.Rule]) -> list[int]:
    """This thread, and all that it starts. What is not there needs no rule. The descriptors are to
    be kept open: of what /proc has, the kernel forgets that it is the same as before."""
    attributes = landlock.attributes(abi)
    ruleset = _syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    kept: list[int] = []
    try:
        for path, rights in rules:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            kept.append(descriptor)
            given = landlock.granted(rights, abi, os.fstat(descriptor).st_mode)
            if given:
                rule = landlock.attached(given, descriptor)
                _syscall(_LANDLOCK_ADD, ruleset, _LANDLOCK_PATH, rule, 0)
        _syscall(_LANDLOCK_ENTER, ruleset, 0)
    except BaseException:
        for descriptor in kept:
            os.close(descriptor)
        raise
    finally:
        os.close(ruleset)
    return kept


def filter_calls(program: bytes) -> None:
    """Of all threads of this process, for good. Needs `forbid_new_privileges` before."""
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    flags = _SECCOMP_ALL_THREADS | _SECCOMP_SPECULATE
    stubborn = _syscall(_SECCOMP[os.uname().machine], _SECCOMP_FILTER, flags, head)
    if stubborn:
        raise OSError(f"thread {stubborn} has a filter of its own")
