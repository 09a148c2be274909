"""An engine confines itself: what it does from inside, in this order, and what was granted.

In two steps, since some of it can only be done before there are threads (`enter`: before torch is
imported), and some only once the device is open (`seal`: before the first model is there).
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import shared
from services.worker.confinement import kernel, landlock, plan, seccomp
from services.worker.confinement.plan import Confinement, Measure
from services.worker.hostmemory import machine_bytes, process_bytes

_ROOT: Final = Path(shared.__file__).parents[1]
_ALONE: Final = kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNS
_ENDED_FIRST: Final = 500
"""Of -1000 to 1000: before the agent, the broker and whoever else is on a machine whose memory
runs out."""
_HELD_OPEN: Final[list[int]] = []
"""What Landlock's rules hang on."""


class Confined:
    """A process on its way in. `measures` tells what became of each, for all that was tried."""

    def __init__(self, confinement: Confinement, device: str, budget_bytes: int) -> None:
        self._asked = confinement
        self._device = device
        self._budget_bytes = budget_bytes
        self._by_name: dict[str, Measure] = {}
        self._own_user_namespace = False

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(self._by_name.values())

    @property
    def missing(self) -> tuple[str, ...]:
        """Reasons not to run a model here; none unless confinement is required."""
        return plan.missing(self.measures) if self._asked.mode == "require" else ()

    def enter(self) -> None:
        """To be called while the process has one thread, and before torch is imported."""
        if self._asked.mode == "off":
            return
        if sys.platform != "linux":
            self._by_name["seccomp"] = Measure("seccomp", held=False, detail="needs Linux")
            return
        self._try("oom_score", _end_first)
        # By root's right where there is one: the other way is closed on many hosts.
        if os.geteuid() == 0 and self._try("namespaces", self._be_alone):
            self._try("mounts", self._mount_read_only)
        if self._asked.uid >= 0:
            self._try("user", self._become)
        if not self._held("namespaces") and self._try("namespaces", self._be_alone_as_user):
            self._own_user_namespace = True
            self._try("mounts", self._mount_read_only)
        self._try("limits", self._limit)
        self._try("capabilities", _drop_capabilities)
        self._try("no_new_privileges", _forbid_new_privileges)
        # A change of user closes /proc/self as well, where we measure ourselves.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        self._try("landlock", self._enter_landlock)

    def seal(self) -> None:
        """To be called when the device is open and nobody else's code has run."""
        if self._asked.mode == "off" or sys.platform != "linux":
            return
        self._try("memory", self._limit_memory)
        self._try("seccomp", _filter_calls)

    # --- one measure each; the words that they return tell how far it goes

    def _try(self, name: plan.Name, measure: Callable[[], str]) -> bool:
        """One that fails leaves the others to hold."""
        try:
            detail = measure()
        except (OSError, ValueError, AttributeError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self._by_name[name] = Measure(name, held=False, detail=why)
            return False
        self._by_name[name] = Measure(name, held=True, detail=detail)
        return True

    def _held(self, name: plan.Name) -> bool:
        return name in self._by_name and self._by_name[name].held

    def _be_alone(self) -> str:
        kernel.unshare(_ALONE)
        return "network, ipc, uts, mounts"

    def _be_alone_as_user(self) -> str:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(_ALONE | kernel.CLONE_NEWUSER)
        kernel.map_own_ids(uid, gid)
        return "network, ipc, uts, mounts, user"

    def _mount_read_only(self) -> str:
        kernel.mount_read_only(self._asked.scratch)
        return "read-only"

    def _become(self) -> str:
        kernel.become(self._asked.uid, self._asked.gid)
        return f"{self._asked.uid}:{self._asked.gid}"

    def _limit(self) -> str:
        alone = self._asked.uid > 0 or (self._own_user_namespace and os.geteuid() != 0)
        most = plan.limits(self._budget_bytes, counted_alone=alone)
        _lower(resource.RLIMIT_CORE, 0)
        _lower(resource.RLIMIT_NOFILE, most.files)
        _lower(resource.RLIMIT_FSIZE, most.file_bytes)
        if most.threads is None:
            return "files"
        _lower(resource.RLIMIT_NPROC, most.threads)
        return "files, threads"

    def _enter_landlock(self) -> str:
        abi = kernel.landlock_abi()
        prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix}
        rules = landlock.rules(
            self._asked, self._device, _ROOT, sys.path, sorted(prefixes), os.environ
        )
        _HELD_OPEN.extend(kernel.enter_landlock(abi, rules))
        return landlock.described(abi)

    def _limit_memory(self) -> str:
        taken, machine = process_bytes("VmData"), machine_bytes()
        most = plan.memory_bytes(self._device, taken, self._budget_bytes, machine)
        if most is None:
            raise ValueError(f"not on {self._device}: the device's own limit holds")
        _lower(resource.RLIMIT_DATA, most)
        return f"{most:,} bytes"


def _lower(kind: int, most: int) -> None:
    """The hard limit too, so that it stays."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def _end_first() -> str:
    Path("/proc/self/oom_score_adj").write_bytes(b"%d" % _ENDED_FIRST)
    return ""


def _drop_capabilities() -> str:
    kernel.drop_capabilities()
    for line in Path("/proc/self/status").read_bytes().splitlines():
        name, _, value = line.partition(b":")
        if name in (b"CapPrm", b"CapEff", b"CapAmb") and int(value, 16):
            raise OSError(f"{name.decode()} is {value.decode().strip()}")
    return "none"


def _forbid_new_privileges() -> str:
    kernel.forbid_new_privileges()
    return ""


def _filter_calls() -> str:
    architecture = seccomp.ARCHITECTURES.get(os.uname().machine)
    if architecture is None:
        raise OSError(f"no list of calls for {os.uname().machine}")
    kernel.filter_calls(seccomp.program(architecture, os.getpid()))
    return "no network, no programs, no other process"
