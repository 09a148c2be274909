"""The agent's half of an engine's confinement: what is asked of it, whether the host would grant
it, and the one folder that an engine may write to."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import msgspec
import structlog

from services.worker.config import WorkerConfig
from services.worker.confinement import plan
from services.worker.confinement.plan import Confinement, Measure
from services.worker.folders import locked
from shared.config import ConfigError
from shared.storage import LocalStorage, open_storage

log = structlog.get_logger(__name__)

_PREFIX: Final = "roost-engine-"
_FILES: Final = "blobs"
"""Of a repository and of a cache: what models' files are made of. The rest of it is not an engine's
to read: manifests, keys, jobs of clients."""
_PROBE_S: Final = 60.0
_DEV: Final = Path("/dev")


def confinement(config: WorkerConfig) -> Confinement:
    """What the settings ask for. Raises `ConfigError` where they cannot be, or where this host does
    not grant what is required. Not for the event loop."""
    if config.confine == "off":
        return Confinement()
    uid, gid = _ids(config.engine_user) if config.engine_user else (-1, -1)
    folders = [path for path in config.engine_reads.split(os.pathsep) if path]
    if absent := [path for path in folders if not Path(path).exists()]:
        raise ConfigError(f"ROOST_WORKER_ENGINE_READS: {absent[0]} is not there")
    for url in (config.repository_url, config.cache):
        storage = open_storage(url, durable=False)
        if isinstance(storage, LocalStorage):
            folder = Path(storage.local_path(_FILES))
            with contextlib.suppress(OSError):  # one that is read-only has it, or has no model
                folder.mkdir(parents=True, exist_ok=True)
            folders.append(str(folder))
    asked = Confinement(config.confine, readable=tuple(folders), uid=uid, gid=gid)
    if asked.mode == "require":
        _check(asked)
    return asked


def tell(measures: tuple[Measure, ...], engine: int) -> None:
    """What became of it in an engine, as a line of the log."""
    if not measures:
        log.warning("engine_not_confined", engine=engine, why="ROOST_WORKER_CONFINE=off")
        return
    write = log.warning if plan.missing(measures) else log.info
    holds, lacks = plan.summary(measures, held=True), plan.summary(measures, held=False)
    write("engine_confined", engine=engine, holds=holds, lacks=lacks)


def _ids(user: str) -> tuple[int, int]:
    name, _, group = user.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        uid, gid = entry.pw_uid, entry.pw_gid
    except KeyError:
        if not name.isdecimal() or not group:
            raise ConfigError(
                f"ROOST_WORKER_ENGINE_USER={user!r}: there is no such user"
                + (" (a number without an entry needs a group: UID:GID)" * name.isdecimal())
            ) from None
        uid, gid = int(name), -1
    if group:
        try:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise ConfigError(f"ROOST_WORKER_ENGINE_USER={user!r}: no such group") from None
    if uid == 0:
        raise ConfigError("ROOST_WORKER_ENGINE_USER: an engine is not to be root")
    if os.geteuid() != 0:
        raise ConfigError("ROOST_WORKER_ENGINE_USER: only root may start an engine as another user")
    return uid, gid


def _check(asked: Confinement) -> None:
    if lacks := plan.missing(_probed(asked)):
        raise ConfigError(
            "ROOST_WORKER_CONFINE=require, and this host does not grant: " + "; ".join(lacks)
        )


def _probed(asked: Confinement) -> list[Measure]:
    """What this host grants, tried in a process of its own; some tenths of a second."""
    command = [sys.executable, "-P", "-m", "services.worker.confinement"]
    command.append(msgspec.json.encode(asked).decode())
    root = str(Path(__file__).parents[2])
    try:
        probe = subprocess.run(
            command, capture_output=True, timeout=_PROBE_S, check=True, env={"PYTHONPATH": root}
        )
        return [msgspec.json.decode(line, type=Measure) for line in probe.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise ConfigError(f"ROOST_WORKER_CONFINE=require: it could not be tried: {error}") from None


def make_device_files(dev: Path = _DEV) -> None:
    """On a machine that was just started the driver may be there, and CUDA's part of it have no
    file yet: its library would start a program for that, which a confined engine cannot."""
    program = shutil.which("nvidia-modprobe")
    if program and (dev / "nvidiactl").exists() and not (dev / "nvidia-uvm").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # the engine will say
            subprocess.run([program, "-u", "-c", "0"], check=False, timeout=_PROBE_S)


class Scratch:
    """A folder for one life of an engine: what it unpacks and what programs leave behind. Locked
    as long as this process lives, so that another one can tell what is left over."""

    def __init__(self, confinement: Confinement) -> None:
        """Raises `OSError`."""
        _sweep(Path(tempfile.gettempdir()))
        self.path, self._lock = _own_folder()
        if confinement.uid >= 0:
            os.chown(self.path, confinement.uid, confinement.gid)

    def remove(self) -> None:
        """Of gigabytes it takes its time; not for the event loop."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def environment(self) -> dict[str, str]:
        """Where programs look for a place of their own."""
        return {"TMPDIR": self.path, "HOME": self.path}


def _own_folder() -> tuple[str, int | None]:
    while True:
        path = tempfile.mkdtemp(prefix=_PREFIX)
        lock = locked(path)
        if Path(path).is_dir():
            return path, lock
        if lock is not None:  # another worker swept it before we had the lock
            os.close(lock)


def _sweep(base: Path) -> None:
    """Those whose agent was killed."""
    for left in base.glob(f"{_PREFIX}*"):
        lock = locked(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
