"""What a worker is loading, on its disk: for the case that the agent dies together with its engine.

An agent outlives its engine, and knows which model was being loaded as it died. But a system that
runs out of memory may take both, and then nobody would know: the worker would start again, be
assigned the same model, and die again, for ever. So a few bytes are written before a load and taken
back after it. The worker that starts next in the same data folder finds what was left, and counts
it as a death, as if it had seen it itself.

Each agent has a file of its own and a lock on it, so whoever can lock a file knows that its owner
is gone. Nothing is forced to the disk: what a killed agent wrote is in the system's memory, which
is enough; a machine that loses its power forgets it, and no load is to wait for a disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

import msgspec
import structlog

from shared.names import ModelId

log = structlog.get_logger(__name__)

_FOLDER: Final = "loading"
_MOST_BYTES: Final = 1 << 20


class Doomed(msgspec.Struct, frozen=True):
    """A model during whose load processes ended."""

    model: ModelId
    digest: str
    """Of the file: another one is not blamed."""
    deaths: int = 0


class _Written(msgspec.Struct, frozen=True):
    loading: tuple[Doomed, ...] = ()
    """Under way, the one that was begun first before the others."""
    suspects: tuple[Doomed, ...] = ()
    """Not under way, and not loaded since."""


_decode: Final = msgspec.json.Decoder(_Written).decode


class Journal:
    """Of one agent. Trouble with the disk is logged, and costs no load."""

    def __init__(self, data_dir: str) -> None:
        self._folder = Path(data_dir) / _FOLDER
        self._file: int | None = None
        self._path = self._folder
        self._loading: dict[ModelId, Doomed] = {}
        self._suspects: dict[ModelId, Doomed] = {}

    def open(self) -> list[Doomed]:
        """Begins it; returns what earlier agents left behind. Blocks."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("*.json")):
                self._take_over(path)
            if self._file is None:
                self._path = self._folder / f"{os.getpid()}-{os.urandom(4).hex()}.json"
                self._file = _locked(self._path)
        except OSError as error:
            log.warning("no_journal", folder=str(self._folder), error=str(error))
        self._write()
        return list(self._suspects.values())

    def begun(self, model: ModelId, digest: str) -> None:
        """The engine is told to load it."""
        known = self._suspects.pop(model, None)
        deaths = known.deaths if known is not None and known.digest == digest else 0
        self._loading[model] = Doomed(model, digest, deaths)
        self._write()

    def ended(self, model: ModelId) -> None:
        """The load ended, well or with an error: the process lives."""
        if self._loading.pop(model, None) is not None:
            self._write()

    def engine_lost(self) -> None:
        """The engine alone: who asks is the agent, which counts that itself."""
        self._loading.clear()
        self._write()

    def forget(self, model: ModelId) -> None:
        """All workers know of it by now."""
        if self._suspects.pop(model, None) is not None:
            self._write()

    def close(self) -> None:
        """An orderly end: what was under way was not the reason."""
        self._suspects |= {each.model: each for each in self._loading.values() if each.deaths}
        self._loading.clear()
        self._write()
        if self._file is not None:
            if not self._suspects:
                with contextlib.suppress(OSError):
                    self._path.unlink()
            os.close(self._file)
            self._file = None

    # --- parts ------------------------------------------------------------------------------

    def _take_over(self, path: Path) -> None:
        file = _locked(path)
        if file is None:
            return  # its owner lives
        try:
            left = _decode(os.pread(file, _MOST_BYTES, 0) or b"{}")
        except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
            log.warning("journal_unreadable", path=str(path), error=str(error))
            left = _Written()
        for each in left.suspects:
            self._blame(each, 0)
        for each in left.loading[:1]:
            log.error("died_while_loading", model=each.model, deaths=each.deaths + 1)
            self._blame(each, 1)
        for each in left.loading[1:]:
            if each.deaths:
                self._blame(each, 0)
        if self._file is None:
            self._file, self._path = file, path
        else:
            path.unlink(missing_ok=True)
            os.close(file)

    def _blame(self, told: Doomed, more: int) -> None:
        known = self._suspects.get(told.model)
        deaths = told.deaths + more
        if known is not None and known.digest == told.digest:
            deaths += known.deaths
        self._suspects[told.model] = Doomed(told.model, told.digest, deaths)

    def _write(self) -> None:
        if self._file is None:
            return
        written = _Written(tuple(self._loading.values()), tuple(self._suspects.values()))
        data = msgspec.json.encode(written)
        try:
            # Not atomic, and need not be: whoever is killed between the two leaves what cannot be
            # read, which blames nobody.
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, data, 0)
        except OSError as error:
            log.warning("journal_not_written", error=str(error))


def _locked(path: Path) -> int | None:
    """The file, opened and locked; None while somebody else has the lock. Raises `OSError`."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file
