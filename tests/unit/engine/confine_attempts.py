"""A process that confines itself as an engine does, and then tries what an engine must not.

    python -m tests.unit.engine.confine_attempts SCRATCH READABLE SECRET UID [REFUSED…]

REFUSED are calls of `kernel.py` that this host is not to grant. Prints JSON: the measures, and
what became of each attempt: the error's name, `done`, or `skipped` where the host did not grant any
of the measures that are to stop it. Signals are all 0, which only asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from services.worker.confinement import kernel
from services.worker.confinement.confine import Confined
from services.worker.confinement.plan import Confinement

libc = ctypes.CDLL(None, use_errno=True)
AGENT = os.getppid()
BUDGET = 64 << 20
SELF = Path("/proc/self")


def call(function, *arguments) -> None:
    ctypes.set_errno(0)
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def syscall(x86: int, arm: int, *arguments: int) -> None:
    number = x86 if os.uname().machine == "x86_64" else arm
    call(libc.syscall, ctypes.c_long(number), *(ctypes.c_long(each) for each in arguments))


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def write(path: Path) -> None:
    path.write_text("written")


def start_a_thread() -> None:
    ran = threading.Event()
    thread = threading.Thread(target=ran.set)
    thread.start()
    thread.join()
    assert ran.is_set()


def in_a_thread(attempt: Callable[[], None]) -> None:
    """Raises what it raised there."""
    caught: list[OSError] = []

    def run() -> None:
        try:
            attempt()
        except OSError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def pin_to_where_it_may_run() -> None:
    """As OpenMP does, from another thread in its case: by number."""
    os.sched_setaffinity(threading.get_native_id(), os.sched_getaffinity(0))


def fork() -> None:
    if not os.fork():
        os._exit(0)


def take_memory() -> None:
    taken = bytearray(16 << 30)
    del taken


def capabilities() -> None:
    status = (SELF / "status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "CapPrm:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status


def name_a_thread() -> None:
    """As a CUDA driver does."""
    (SELF / "task" / str(threading.get_native_id()) / "comm").write_text("worker")


def main() -> None:
    scratch, readable, secret = map(Path, sys.argv[1:4])
    uid = int(sys.argv[4])
    home = Path("/home" if uid else "/root")
    for name in sys.argv[5:]:
        setattr(kernel, name, refuse)
    if uid:  # as a worker that is not started as root; modules are all imported by now
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    confinement = Confinement("auto", str(scratch), (str(readable),))
    confined = Confined(confinement, "cpu", BUDGET)
    before = threading.Event(), threading.Event()
    confined.enter()
    # One that was there before the filter, as torch's and CUDA's are.
    old: list[str] = []

    def wait() -> None:
        before[0].wait()
        old.append(tried(lambda: socket.socket().close()))
        before[1].set()

    threading.Thread(target=wait, daemon=True).start()
    confined.seal()
    held = {each.name for each in confined.measures if each.held}
    files, calls = {"landlock", "mounts"}, {"seccomp"}
    descriptor = os.open("/dev/null", os.O_RDONLY)
    attempts: dict[str, tuple[set[str], Callable[[], object]]] = {
        # what an engine does all the time
        "write to scratch": (set(), lambda: write(scratch / "file")),
        "rename in scratch": (set(), lambda: (scratch / "file").rename(scratch / "other")),
        "read a model": (set(), (readable / "model").read_text),
        "read its own figures": (set(), (SELF / "status").read_text),
        "reset its own peak": (set(), lambda: (SELF / "clear_refs").write_text("5")),
        "name a thread": (set(), name_a_thread),
        "start a thread": (set(), start_a_thread),
        "pin a thread": (set(), lambda: in_a_thread(pin_to_where_it_may_run)),
        "raise a signal": (set(), lambda: os.kill(os.getpid(), 0)),
        "a pipe": (set(), lambda: [os.close(each) for each in os.pipe()]),
        "memory by descriptor": (set(), lambda: os.close(os.memfd_create("m"))),
        "no capabilities": ({"capabilities"}, capabilities),
        # files
        "write beside a model": (files, lambda: write(readable / "planted")),
        "write over a model": (files, lambda: write(readable / "model")),
        "delete a model": (files, (readable / "model").unlink),
        "write elsewhere": (files, lambda: write(secret.parent / "planted")),
        "write to the temporary folder": (files, lambda: write(scratch.parent / "planted")),
        "write over its code": (files, lambda: write(Path(__file__))),
        "read a secret": ({"landlock"}, secret.read_text),
        "read a secret in a thread": ({"landlock"}, lambda: in_a_thread(secret.read_text)),
        "read the agent's environment": (
            {"landlock"}, Path(f"/proc/{AGENT}/environ").read_bytes,
        ),
        "read the agent's memory": ({"landlock"}, Path(f"/proc/{AGENT}/maps").read_bytes),
        "look for processes": ({"landlock"}, lambda: list(Path("/proc").iterdir())),
        "look into homes": ({"landlock"}, lambda: list(home.iterdir())),
        "change a mode": (calls, lambda: (scratch / "other").chmod(0o777)),
        "change times": (calls, lambda: os.utime(scratch / "other")),
        "make a device": (calls, lambda: os.mknod(scratch / "device", 0o020666, 0x101)),
        # the network
        "open a socket": (calls, lambda: socket.socket().close()),
        "open a local socket": (calls, lambda: socket.socket(socket.AF_UNIX).close()),
        "datagrams by a pair": (
            calls, lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
        ),
        "connect": (calls, lambda: call(libc.connect, descriptor, bytes(16), 16)),
        # programs and processes
        "execute": (calls, lambda: os.execv("/bin/sh", ["sh", "-c", "exit 3"])),
        "run a program": (calls, lambda: subprocess.run(["/bin/true"], check=False)),
        "fork": (calls, fork),
        "trace the agent": (calls, lambda: call(libc.ptrace, 16, AGENT, 0, 0)),
        "read the agent's memory directly": (
            calls, lambda: syscall(310, 270, AGENT, 0, 0, 0, 0, 0),
        ),
        "signal the agent": (calls | {"landlock"}, lambda: os.kill(AGENT, 0)),
        "signal its group": (calls, lambda: os.kill(0, 0)),
        "signal everybody": (calls, lambda: os.kill(-1, 0)),
        "limit the agent": (
            calls, lambda: resource.prlimit(AGENT, resource.RLIMIT_CORE),
        ),
        "slow the agent down": (calls, lambda: os.setpriority(os.PRIO_PROCESS, AGENT, 5)),
        "send signals by a file": (
            calls, lambda: fcntl.fcntl(descriptor, fcntl.F_SETOWN, AGENT),
        ),
        "outlive the agent": (calls, lambda: kernel.prctl(kernel.PR_SET_PDEATHSIG, 0)),
        # the kernel
        "a namespace": (calls, lambda: call(libc.unshare, kernel.CLONE_NEWUSER)),
        "a mount": (calls, lambda: call(libc.mount, b"x", b"/", b"tmpfs", 0, None)),
        "bpf": (calls, lambda: syscall(321, 280, 0, 0, 0)),
        "io_uring": (calls, lambda: syscall(425, 425, 1, 0)),
        "userfaultfd": (calls, lambda: syscall(323, 282, 0)),
        "keys": (calls, lambda: syscall(250, 219, 0, 0, 0, 0, 0)),
        "a call of tomorrow": (calls, lambda: syscall(463, 463, 0, 0, 0, 0, 0, 0)),
        # limits
        "take all memory": ({"memory"}, take_memory),
        "raise a limit": (
            {"limits"}, lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20)),
        ),
    }  # fmt: skip
    results: dict[str, str] = {}
    for name, (guards, attempt) in attempts.items():
        guarded = not guards or guards & held
        results[name] = tried(attempt) if guarded else "skipped"
    before[0].set()
    before[1].wait(10)
    results["open a socket in an old thread"] = old[0] if "seccomp" in held else "skipped"
    measures = [[each.name, each.held, each.detail] for each in confined.measures]
    print(json.dumps({"measures": measures, "results": results}))  # noqa: T201


def tried(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except (MemoryError, AssertionError, ValueError) as error:
        return type(error).__name__
    return "done"


with contextlib.suppress(BrokenPipeError):
    main()
