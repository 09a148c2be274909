"""What is asked of the kernel, without a kernel: the filter's program is run here by hand."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.confinement import landlock, plan, seccomp
from services.worker.confinement.plan import Confinement, Measure

GIB = 1 << 30
PID = 4242
ALLOW = "allow"
HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
    "aarch64": ("/usr/include/asm-generic/unistd.h",),
}


def judge(architecture: str, number: int, *arguments: int, audit: int | None = None) -> str:
    """The name of the error, or `allow`: what the kernel would find."""
    chosen = seccomp.ARCHITECTURES[architecture]
    program = [
        struct.unpack("=HBBI", piece)
        for piece in re.findall(rb".{8}", seccomp.program(chosen, PID), re.DOTALL)
    ]
    assert len(program) < 4096
    audit = chosen.audit if audit is None else audit
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number, audit, 0, *padded)
    value, at = 0, 0
    for _ in program:
        code, if_so, if_not, operand = program[at]
        at += 1
        match code:
            case 0x20:
                value = struct.unpack_from("<I", data, operand)[0]
            case 0x54:
                value &= operand
            case 0x15:
                at += if_so if value == operand else if_not
            case 0x25:
                at += if_so if value > operand else if_not
            case 0x35:
                at += if_so if value >= operand else if_not
            case 0x06:
                return ALLOW if operand == 0x7FFF0000 else errno.errorcode[operand & 0xFFFF]
            case _:
                raise AssertionError(f"instruction {code:#x}")
    raise AssertionError("the program does not end")


def number(name: str, architecture: str) -> int | None:
    return seccomp.NUMBERS[name][seccomp.ARCHITECTURES[architecture].column]


both = pytest.mark.parametrize("architecture", seccomp.ARCHITECTURES)


@both
def test_every_listed_call_is_refused_as_it_stands(architecture):
    """With arguments of zero; of `clone3` C libraries are to believe that it does not exist."""
    conditional = {
        "prlimit64", "sched_setscheduler", "sched_setparam", "sched_setattr", "fcntl", "ioctl",
        "migrate_pages", "move_pages", "prctl",
    }  # fmt: skip
    for name in seccomp.NUMBERS:
        nr = number(name, architecture)
        if nr is not None:
            expected = ALLOW if name in conditional else "ENOSYS" if name == "clone3" else "EPERM"
            assert judge(architecture, nr) == expected, name


@both
@given(data=st.data())
def test_what_is_not_listed_is_allowed(architecture, data):
    """The list names what is refused; torch and CUDA need most of the others."""
    listed = {number(name, architecture) for name in seccomp.NUMBERS}
    nr = data.draw(st.integers(0, seccomp.NEWEST).filter(lambda each: each not in listed))
    assert judge(architecture, nr, *data.draw(st.lists(st.integers(0, 2**64 - 1)))) == ALLOW


@both
@given(nr=st.integers(seccomp.NEWEST + 1, 2**32 - 1))
def test_calls_that_this_list_does_not_know_do_not_exist(architecture, nr):
    """Newer ones, and those that x86-64 has a second time under other numbers."""
    assert judge(architecture, nr) == "ENOSYS"


@both
@given(nr=st.integers(0, 2**32 - 1), audit=st.integers(0, 2**32 - 1))
def test_calls_of_another_kind_are_refused(architecture, nr, audit):
    """A 64-bit process may make 32-bit calls, with other numbers."""
    if audit != seccomp.ARCHITECTURES[architecture].audit:
        assert judge(architecture, nr, audit=audit) == "EPERM"


@both
@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("clone", (0x3D0F00,), ALLOW),  # a thread, as C libraries start them
        ("clone", (0x11,), "EPERM"),  # a fork
        ("clone", (0x4111,), "EPERM"),  # posix_spawn
        ("clone", (0x3D0F00 | 0x10000000,), "EPERM"),  # with a user namespace
        ("kill", (PID, 6), ALLOW),
        ("kill", (PID + 1, 0), "EPERM"),
        ("kill", (0, 9), "EPERM"),
        ("kill", (2**32 - 1, 9), "EPERM"),
        ("tgkill", (PID, 7, 6), ALLOW),
        ("tgkill", (1, 1, 6), "EPERM"),
        ("tkill", (PID, 6), "EPERM"),
        ("prlimit64", (PID, 7), ALLOW),
        ("prlimit64", (1, 7), "EPERM"),
        ("sched_setscheduler", (1,), "EPERM"),
        ("socketpair", (1, 1), ALLOW),
        ("socketpair", (1, 1 | 0o2000000), ALLOW),  # SOCK_CLOEXEC
        ("socketpair", (1, 2), "EPERM"),
        ("personality", (0xFFFFFFFF,), ALLOW),
        ("personality", (0x0040000,), "EPERM"),
        ("prctl", (1, 0), "EPERM"),
        ("prctl", (15,), ALLOW),  # a thread's name
        ("fcntl", (3, 8, 1), "EPERM"),
        ("fcntl", (3, 1, 1), ALLOW),
        ("ioctl", (0, 0x5412), "EPERM"),
        ("ioctl", (0, (1 << 32) | 0x5412), "EPERM"),  # the kernel looks at the low half only
        ("ioctl", (7, 0xC020462A), ALLOW),  # of a CUDA driver
    ],
)
def test_some_calls_are_judged_by_an_argument(architecture, name, arguments, answer):
    """Oneself is not somebody else, and a thread is not a process."""
    nr = number(name, architecture)
    assert nr is not None
    assert judge(architecture, nr, *arguments) == answer


@both
def test_the_numbers_are_those_of_the_kernel(architecture):
    """As far as its headers are here, and know the call."""
    header = next((Path(each) for each in HEADERS[architecture] if Path(each).exists()), None)
    if header is None:
        pytest.skip("the kernel's headers are not installed")
    told = dict(
        re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE)
    )
    checked = {name for name in seccomp.NUMBERS if name in told}
    assert len(checked) > 100
    for name in checked:
        assert number(name, architecture) == int(told[name]), name
    newer = {"fchmodat2", "memfd_secret"}
    unnamed = {name for name in seccomp.NUMBERS if number(name, architecture) is not None}
    assert unnamed - checked <= newer


# --- files


def test_each_version_of_landlock_is_asked_for_what_it_knows():
    """And for no more, which it would refuse as a whole."""
    assert [len(landlock.attributes(abi)) for abi in range(1, 8)] == [8, 8, 8, 16, 16, 24, 24]
    files = [landlock.handled(abi).files.bit_length() for abi in range(1, 8)]
    assert files == [13, 14, 15, 15, 16, 16, 16]
    assert landlock.handled(3).network == landlock.handled(5).scope == 0
    assert landlock.handled(7) == landlock.handled(6)


@given(rights=st.integers(0, 2**16 - 1), abi=st.integers(1, 9))
def test_a_file_is_given_no_right_of_a_folder(rights, abi):
    """The kernel refuses such a rule, and so all of them would fail."""
    of_file = landlock.granted(rights, abi, stat.S_IFREG)
    assert not of_file & ~(0x1 | 0x2 | 0x4 | 0x4000 | 0x8000)
    assert of_file == of_file & landlock.granted(rights, abi, stat.S_IFDIR)
    assert not landlock.granted(rights, abi, stat.S_IFDIR) & ~landlock.handled(abi).files


def rules(device="cpu", **environment) -> dict[str, int]:
    confinement = Confinement("auto", "/scratch", ("/repository/blobs",))
    search = ["", "/opt/roost", "/venv/site-packages"]
    found = landlock.rules(confinement, device, Path("/opt/roost"), search, ["/venv"], environment)
    return dict(found)


def test_an_engine_may_read_what_it_runs_from_and_models():
    """Of a checkout the code alone, of a repository the files alone, and nobody's home."""
    given_rights = rules()
    readable = ("/repository/blobs", "/venv/site-packages", "/venv", "/opt/roost/services", "/usr")
    for path in readable:
        assert given_rights[path] == landlock.READ
    for path in ("", "/opt/roost", "/repository", "/", "/etc", "/proc", "/tmp", "/root", "/home"):
        assert path not in given_rights


def test_one_folder_is_writable_and_nothing_is_executable():
    """But for devices that are no files, and the process' own figures."""
    writing, executing, making = 0x2, 0x1, 0x100
    given_rights = rules("cuda:0")
    assert [path for path, each in given_rights.items() if each & making] == ["/scratch"]
    assert not any(each & executing for each in given_rights.values())
    assert all(
        path.startswith(("/dev/", "/scratch", "/proc/self"))
        for path, each in given_rights.items()
        if each & writing
    )


def test_libraries_of_the_environment_can_be_loaded():
    """Paths that the operator names for the loader."""
    given_rights = rules(LD_LIBRARY_PATH=os.pathsep.join(("/software/lib", "", "/more")))
    assert given_rights["/software/lib"] == given_rights["/more"] == landlock.READ


# --- limits, and what is enough


def test_memory_is_limited_where_it_is_known_what_an_engine_takes():
    """Beyond what is there already: twice the budget and a GiB, and no more than the machine
    has. A CUDA driver maps as it likes."""
    assert plan.memory_bytes("cpu", 2 * GIB, 4 * GIB, 64 * GIB) == 11 * GIB
    assert plan.memory_bytes("cpu", 2 * GIB, 64 * GIB, 16 * GIB) == 18 * GIB
    assert plan.memory_bytes("cuda:0", 2 * GIB, 4 * GIB, 64 * GIB) is None
    assert plan.memory_bytes("cpu", 0, 4 * GIB, 64 * GIB) is None, "it could not be measured"


def test_threads_are_limited_only_where_no_one_elses_count():
    """The system counts those of a user, and the agent may be of the same."""
    assert plan.limits(GIB, counted_alone=False).threads is None
    assert plan.limits(GIB, counted_alone=True).threads == 4096
    assert plan.limits(GIB, counted_alone=True).file_bytes == 3 * GIB


GOOD = {"capabilities": True, "no_new_privileges": True, "seccomp": True, "landlock": True}


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({}, ()),
        ({"namespaces": False, "mounts": False, "memory": False, "oom_score": False}, ()),
        ({"landlock": False, "mounts": True}, ()),
        ({"user": True}, ()),
        ({"user": False}, ("user: why",)),
        ({"seccomp": False}, ("seccomp: why",)),
        ({"capabilities": False}, ("capabilities: why",)),
        ({"landlock": False, "mounts": False}, ("landlock: why; mounts: why",)),
        ({"landlock": False}, ("landlock: why; mounts: not tried",)),
    ],
)
def test_what_an_engine_must_not_lack(changes, lacks):
    """No program, no network, no right beyond its user's, no file written. How files are kept is
    the host's choice, and another user counts only where one was asked for."""
    measures = [
        Measure(name, held, "" if held else "why") for name, held in (GOOD | changes).items()
    ]
    assert plan.missing(measures) == lacks


def test_a_summary_names_what_holds_and_what_does_not():
    """For one line of the log each."""
    measures = [
        Measure("seccomp", True, "all"),
        Measure("limits", True),
        Measure("user", False, "x"),
    ]
    assert plan.summary(measures, held=True) == "seccomp (all), limits"
    assert plan.summary(measures, held=False) == "user (x)"
