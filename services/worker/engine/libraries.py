"""Native code of models, unpacked so that the system can load it.

A library that once was loaded is never unmapped: the C++ in it pins it (unique symbols, and
destructors that wait for the end of a thread). So each distinct one is kept in one place, by
content, for the life of the process: loading a model again maps nothing anew, and models that
were compiled alike share the code. What stays behind a model is that mapping, clean pages of a
file, and the file's bytes in the temporary folder.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from services.worker.engine.failures import Failed
from services.worker.folders import locked

_PREFIX: Final = "roost-native-"
_PIECE: Final = 1 << 20
_SCAN_PIECE: Final = 4 << 20
_SCAN_AT_MOST: Final = 64 << 20
"""Code and its texts come first in a library; weights, which may be many gigabytes, last."""
_LEAST_DROPPED: Final = 1 << 20
_MADV_DONTNEED: Final = 4
_SMAPS: Final = Path("/proc/self/smaps")
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ +(/.*)")
_UNWRITTEN: Final = re.compile(r"Anonymous: +0 kB")

_lock: Final = threading.Lock()
_folder: list[Path] = []
"""This process', once it has one."""
_held: Final[list[int]] = []
"""The descriptor that keeps the lock on it."""


def unpack(archive: zipfile.ZipFile, root: str, names: Sequence[str]) -> Path:
    """The folder with these members of the archive, under their own names below `root`, which is
    left out. The same content always comes to the same folder."""
    with _lock:
        home = _home()
        staging = Path(tempfile.mkdtemp(dir=home))
        try:
            digest = hashlib.sha256()
            for name in sorted(names):
                digest.update(f"{len(name)}:{name}:".encode())
                _unpack_one(archive, f"{root}/{name}", staging / name, digest.update)
            place = home / digest.hexdigest()
            if not place.exists():
                staging.rename(place)
            return place
        except zipfile.BadZipFile as error:
            raise Failed("model_failed", f"the package is damaged: {error}") from None
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise Failed("model_failed", f"cannot unpack the package to {home}: {why}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def has_text(path: Path, text: bytes) -> bool:
    """Whether a library's code and texts hold this one."""
    with path.open("rb") as file:
        before = b""
        while file.tell() < _SCAN_AT_MOST and (piece := file.read(_SCAN_PIECE)):
            if text in before + piece:
                return True
            before = piece[-len(text) :]
    return False


def drop_pages(path: Path) -> None:
    """Gives back the memory of what was read of a loaded library and never changed: above all
    weights, once they are copied to where the model uses them. Touched again, they are read
    again. Linux only; elsewhere nothing happens."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return
    with contextlib.suppress(OSError):
        for start, end in _clean(path, _SMAPS.read_text().splitlines()):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _clean(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Large read-only mappings of the file without a page of their own: relocated ones have."""
    start = end = 0
    for line in lines:
        if mapping := _MAPPING.match(line):
            ours = mapping[4] == str(path) and mapping[3].startswith("r-")
            start, end = (int(mapping[1], 16), int(mapping[2], 16)) if ours else (0, 0)
        elif _UNWRITTEN.match(line) and end - start >= _LEAST_DROPPED:
            yield start, end


def _unpack_one(
    archive: zipfile.ZipFile, member: str, target: Path, also: Callable[[bytes], object]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("xb") as file:
        while piece := source.read(_PIECE):
            file.write(piece)
            also(piece)


def _home() -> Path:
    """This process' own folder. The engine ends without cleaning up, so whoever makes one
    removes those whose process is gone: a lock on the folder tells, and keeps sweepers of
    temporary files away as well."""
    while not _folder:
        place = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
        descriptor = locked(place)
        if descriptor is None:  # another process swept it before we had the lock
            continue
        _held.append(descriptor)
        atexit.register(shutil.rmtree, place, ignore_errors=True)  # the engine does not get there
        _folder.append(place)
        for other in place.parent.glob(f"{_PREFIX}*"):
            lock = None if other == place else locked(other)
            if lock is not None:
                shutil.rmtree(other, ignore_errors=True)
                os.close(lock)
    return _folder[0]
