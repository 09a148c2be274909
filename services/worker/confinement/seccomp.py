"""The filter of system calls, as a program for the kernel's own small machine (classic BPF).

What an engine has no business with ends as an error (`EPERM`), not as its death: a program that
tries gets an exception, and its client an answer. What this list does not know, because the kernel
is newer than it, does not exist (`ENOSYS`); programs that may use it know how to do without.

Calls are judged by their number and by the low half of one argument: of all the arguments here
the kernel itself looks at no more.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

NEWEST: Final = 462
"""`mseal`, Linux 6.10. Newer calls have the same number everywhere."""
_X32: Final = 0x40000000
"""From here on x86-64 has its calls a second time, under other numbers."""

_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000

# Instructions: load a word of what the call is, compare, mask, return.
_LOAD: Final = 0x20
_EQUAL: Final = 0x15
_GREATER: Final = 0x25
_AT_LEAST: Final = 0x35
_AND: Final = 0x54
_RETURN: Final = 0x06

_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_ARGUMENTS_AT: Final = 16

CLONE_THREAD: Final = 0x00010000
_CLONE_NEW: Final = 0x7E020080
"""New namespaces of all kinds."""
_SOCK_STREAM: Final = 1
_SOCK_TYPES: Final = 0xF
_PERSONALITY_ASK: Final = 0xFFFFFFFF
_PR_SET_PDEATHSIG: Final = 1
_FCNTL_SIGNALS: Final = (8, 10, 15)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX: a way to send any signal to any process of one's user."""
_IOCTL_SIGNALS: Final = (0x8901, 0x8902, 0x5412, 0x541C)
"""FIOSETOWN, SIOCSPGRP: the same. TIOCSTI, TIOCLINUX: typing into somebody's terminal."""


class Architecture(NamedTuple):
    """How a processor's calls are numbered."""

    audit: int
    column: int
    """Of the table below."""
    second: int | None = None
    """Where its calls begin a second time."""


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "x86_64": Architecture(0xC000003E, 0, _X32),
    "aarch64": Architecture(0xC00000B7, 1),
}
"""By what `uname -m` says."""

NUMBERS: Final[Mapping[str, tuple[int | None, int | None]]] = {
    # Other programs. A thread is a clone too: see `_RULES`.
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    "clone": (56, 220), "clone3": (435, 435), "uselib": (134, None),
    # The network, and whoever listens on this machine.
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    # Other processes: their memory, descriptors, signals, limits and turns. Not on which
    # processors they run: OpenMP pins its threads, which have numbers as processes have.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "kcmp": (312, 272),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "prlimit64": (302, 261),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "prctl": (157, 167),
    "fcntl": (72, 25), "ioctl": (16, 29),
    # Shared memory and queues by name, of whoever is in the same namespace.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # What Landlock does not look at: modes, owners, attributes and times of files.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None),
    "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "mknod": (133, None), "mknodat": (259, 33), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    # Views of the file system, and namespaces.
    "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "sysfs": (139, None),
    "ustat": (136, None),
    # The kernel itself: what only few programs need, and many of its holes are in.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "syslog": (103, 116), "personality": (135, 92), "memfd_secret": (447, 447),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "vhangup": (153, 58),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
"""On x86-64 and on aarch64."""


class _Only(NamedTuple):
    """Allowed while this argument, masked, is one of these."""

    argument: int
    values: Collection[int]
    mask: int = 0xFFFFFFFF


class _Not(NamedTuple):
    """Allowed unless this argument is one of these."""

    argument: int
    values: Collection[int]


class _Thread(NamedTuple):
    """Allowed for a thread of this process, in its namespaces."""


_Rule = _Only | _Not | _Thread


def _rules(pid: int) -> Mapping[str, _Rule]:
    oneself = (0, pid)
    return {
        "clone": _Thread(),
        "socketpair": _Only(1, (_SOCK_STREAM,), _SOCK_TYPES),  # one of datagrams sends anywhere
        "kill": _Only(0, (pid,)),  # not 0, which is the process group, and the agent with it
        "tgkill": _Only(0, (pid,)),
        "rt_tgsigqueueinfo": _Only(0, (pid,)),
        "prlimit64": _Only(0, oneself),
        "sched_setscheduler": _Only(0, oneself),
        "sched_setparam": _Only(0, oneself),
        "sched_setattr": _Only(0, oneself),
        "migrate_pages": _Only(0, oneself),
        "move_pages": _Only(0, oneself),
        "personality": _Only(0, (_PERSONALITY_ASK,)),
        "prctl": _Not(0, (_PR_SET_PDEATHSIG,)),  # it dies with the agent
        "fcntl": _Not(1, _FCNTL_SIGNALS),
        "ioctl": _Not(1, _IOCTL_SIGNALS),
    }


def program(architecture: Architecture, pid: int) -> bytes:
    """The filter for the process `pid`: an array of `struct sock_filter`."""
    denied, unknown = _refuse(errno.EPERM), _refuse(errno.ENOSYS)
    rules = _rules(pid)
    code = [
        _load(_ARCHITECTURE_AT),
        _jump(_EQUAL, architecture.audit, 1, 0),
        denied,
        _load(_NUMBER_AT),
    ]
    if architecture.second is not None:
        code += [_jump(_AT_LEAST, architecture.second, 0, 1), unknown]
    code += [_jump(_GREATER, NEWEST, 0, 1), unknown]
    for name, numbers in NUMBERS.items():
        number = numbers[architecture.column]
        if number is None:
            continue
        if name in rules:
            body = list(_judge(rules[name]))
        else:  # instead of `clone3` C libraries take `clone`, whose arguments can be looked at
            body = [unknown if name == "clone3" else denied]
        code += [_jump(_EQUAL, number, 0, len(body)), *body]
    return b"".join([*code, _instruction(_RETURN, 0, 0, _ALLOW)])


def _judge(rule: _Rule) -> Iterator[bytes]:
    """Ends in an answer either way: the number is not there any more."""
    allowed, denied = _instruction(_RETURN, 0, 0, _ALLOW), _refuse(errno.EPERM)
    match rule:
        case _Thread():
            yield _load(_ARGUMENTS_AT)
            yield _instruction(_AND, 0, 0, CLONE_THREAD | _CLONE_NEW)
            yield _jump(_EQUAL, CLONE_THREAD, 0, 1)
            yield allowed
            yield denied
        case _Only(argument, values, mask):
            yield _load(_ARGUMENTS_AT + 8 * argument)
            yield _instruction(_AND, 0, 0, mask)
            yield from _choose(values, allowed)
            yield denied
        case _Not(argument, values):
            yield _load(_ARGUMENTS_AT + 8 * argument)
            yield from _choose(values, denied)
            yield allowed


def _choose(values: Iterable[int], then: bytes) -> Iterator[bytes]:
    for value in values:
        yield _jump(_EQUAL, value, 0, 1)
        yield then


def _instruction(code: int, if_so: int, if_not: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, if_so, if_not, value)


def _load(offset: int) -> bytes:
    return _instruction(_LOAD, 0, 0, offset)


def _jump(code: int, value: int, if_so: int, if_not: int) -> bytes:
    return _instruction(code, if_so, if_not, value)


def _refuse(error: int) -> bytes:
    return _instruction(_RETURN, 0, 0, _ERRNO | error)
