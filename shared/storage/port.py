"""Files as the repository needs them, wherever they are.

Laws that both implementations keep:

- What can be read under its final name is whole. A writer works under a temporary name, and
  the name appears in one step.
- `create` lets exactly one of several writers win; the others get `FileExistsError`. (For a
  URL: within one process always, between processes as far as the service offers it.)
- Paths are relative to the root, with `/`. A path that is not there: `FileNotFoundError`.
  Every other trouble with the files: `Unavailable`; and so is a directory that is away, which
  must not look like one from which all was removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, Protocol

from shared.errors import RoostError, Unavailable

TEMPORARY = "tmp"
"""Folder of unfinished uploads, below the root."""


class Entry(NamedTuple):
    """A file that was found."""

    path: str
    size: int
    modified: float | None
    """Unix time; None when the service does not say."""
    stamp: tuple[object, ...]
    """Differs when the file was replaced."""


class Stage(Protocol):
    """A file being written. One that is forgotten goes away with its object."""

    def write(self, data: bytes | memoryview) -> None: ...
    def reopen(self) -> BinaryIO:
        """What was written so far, for reading."""

    def publish(self, path: str) -> None:
        """Gives the file its name, in place of what may have had it. Durable on return."""

    def discard(self) -> None: ...


class Storage(Protocol):
    def read(self, path: str) -> bytes: ...
    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """What is there of `paths`; the missing are left out."""

    def open(self, path: str) -> BinaryIO:
        """For reading, seekable."""

    def entry(self, path: str) -> Entry: ...
    def find(self, prefix: str, depth: int, filename: str | None = None) -> list[Entry]:
        """The files `depth` folders below `prefix`, all or those with this name."""

    def stage(self) -> Stage: ...
    def create(self, path: str, data: bytes) -> None:
        """Writes a new file durably; `FileExistsError` when there is one."""

    def replace(self, path: str, data: bytes) -> None: ...
    def touch(self, path: str) -> None:
        """Makes the file look new, where the service can; always checks that it is there."""

    def remove(self, path: str) -> None: ...
    def remove_tree(self, path: str) -> None:
        """Removes the folder and what is in it, if it is there."""

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        """Held while names are given (shared) or garbage is removed (exclusive)."""

    def sweep(self, min_age_s: float) -> int:
        """Removes what writers that are gone left behind. Returns how many files."""

    def local_path(self, path: str) -> str | None:
        """Where the file lies on this machine; None when it does not."""


@contextlib.contextmanager
def translated(trouble: type[Exception] = OSError) -> Iterator[None]:
    """Turns the trouble of files into `Unavailable`; absence and presence pass as they are, and
    so do our own errors."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, RoostError):
        raise
    except trouble as error:
        said = getattr(error, "strerror", None) or repr(error)
        raise Unavailable(f"the repository cannot be used: {said}") from error


def write_all(handle: int, data: bytes | memoryview) -> None:
    """`os.write` may take less than it is given."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(handle, view) :]
