"""Which measures there are, which of them an engine cannot do without, and how far each goes.

Pure: what is wanted and what was granted in, a decision out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

import msgspec

Mode = Literal["auto", "require", "off"]
"""`auto`: all that the host grants. `require`: not without the essential ones. `off`: none."""

Name = Literal[
    "namespaces",
    "mounts",
    "user",
    "capabilities",
    "no_new_privileges",
    "landlock",
    "seccomp",
    "limits",
    "memory",
    "oom_score",
]

_GIB: Final = 1 << 30
_MOST_FILES: Final = 4096
"""Descriptors; an engine keeps a few hundred files open at most."""
_MOST_THREADS: Final = 4096
"""A stop for bombs: an engine has a dozen threads and those of its operators."""


class Measure(msgspec.Struct, frozen=True, array_like=True):
    """What became of one measure."""

    name: Name
    held: bool
    detail: str = ""
    """How far it goes; where it does not hold, why."""


class Confinement(msgspec.Struct, frozen=True):
    """What the agent asks of an engine."""

    mode: Mode = "off"
    scratch: str = ""
    """The one folder that it may write to."""
    readable: tuple[str, ...] = ()
    """Folders of models' files. Nothing below them changes places while the engine lives."""
    uid: int = -1
    """A user to become; -1 to stay who it is."""
    gid: int = -1


class Limits(NamedTuple):
    """Of the process, as `setrlimit` takes them. None: left as it is."""

    files: int
    file_bytes: int
    threads: int | None


def limits(budget_bytes: int, *, counted_alone: bool) -> Limits:
    """`counted_alone`: the system counts the engine's threads apart from others of its user, whom
    a limit would hit as well.

    The greatest file it writes is a model's, unpacked; with twice the budget that fits.
    """
    return Limits(_MOST_FILES, 2 * budget_bytes + _GIB, _MOST_THREADS if counted_alone else None)


def memory_bytes(
    device: str, taken_bytes: int, budget_bytes: int, machine_bytes: int
) -> int | None:
    """What the engine's own writable memory may come to, with `taken_bytes` of it before the first
    model (room for the budget's addresses included). None where a limit would be a guess: a CUDA
    driver maps memory as it likes, and torch keeps the device's budget there.

    A load has its file in memory beside the model, and an operator its workspace: twice the budget
    and a GiB is beyond what healthy engines take, and a machine has no more than it has.
    """
    if device != "cpu" or taken_bytes <= 0:
        return None
    return taken_bytes + min(2 * budget_bytes + _GIB, machine_bytes)


def missing(measures: Iterable[Measure]) -> tuple[str, ...]:
    """What an engine must not lack where confinement is required, and lacks: reasons."""
    by_name: Mapping[str, Measure] = {each.name: each for each in measures}

    def held(name: Name) -> bool:
        return name in by_name and by_name[name].held

    def why(name: Name) -> str:
        return f"{name}: {by_name[name].detail if name in by_name else 'not tried'}"

    lacks = [
        why(name)
        for name in ("user", "capabilities", "no_new_privileges", "seccomp")
        if not held(name) and (name != "user" or name in by_name)
    ]
    if not (held("landlock") or held("mounts")):
        lacks.append(f"{why('landlock')}; {why('mounts')}")
    return tuple(lacks)


def summary(measures: Iterable[Measure], *, held: bool) -> str:
    """Those that hold, or those that do not, for a log line."""
    chosen = [each for each in measures if each.held is held]
    return ", ".join(
        f"{each.name} ({each.detail})" if each.detail else each.name for each in chosen
    )
