"""A directory as storage (see `port` for the laws)."""

# System calls by name: their exact meaning matters here, and a listing of ten thousand models
# is ten thousands of them.
# ruff: noqa: PTH100, PTH102, PTH105, PTH106, PTH108, PTH112, PTH116, PTH120, PTH123

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from shared.errors import Unavailable
from shared.storage.port import TEMPORARY, Entry, translated, write_all


class LocalStorage:
    """A directory. Several processes and machines may share it, if its file system has hard
    links and locks.

    It may be a mounted one, which is away now and then: then there is no root, or an empty
    one. Hence the root is made at once, what was found below it once must stay, and what is
    absent without them raises `Unavailable`. Not so with `durable=False`: a cache may be emptied.
    """

    def __init__(self, root: str, *, durable: bool = True) -> None:
        self.root = os.path.abspath(root)
        self.durable = durable
        self._seen: set[str] = set()
        """The root, and the folders right below it in which something was found."""
        with contextlib.suppress(OSError):  # whoever uses it is told
            self.make_folder(self.root)
            self._saw(self.root)

    def __repr__(self) -> str:
        return f"LocalStorage({self.root!r})"

    def local_path(self, path: str) -> str:
        return f"{self.root}/{path}"

    @translated()
    def read(self, path: str) -> bytes:
        with self._looking(path), open(self.local_path(path), "rb") as file:
            return file.read()

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        contents: dict[str, bytes] = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                contents[path] = self.read(path)
        return contents

    @translated()
    def open(self, path: str) -> BinaryIO:
        with self._looking(path):
            return open(self.local_path(path), "rb")

    @translated()
    def entry(self, path: str) -> Entry:
        with self._looking(path):
            return _entry(path, os.stat(self.local_path(path)))

    @translated()
    def find(self, prefix: str, depth: int, filename: str | None = None) -> list[Entry]:
        found: list[Entry] = []
        self._find(prefix, depth, filename, found)
        # Afterwards: it may have gone in the middle, and then this is a part of what there is.
        self._check_there(prefix)
        if found:
            self._saw(self._top(prefix))
        return found

    def _saw(self, folder: str) -> None:
        if self.durable:
            self._seen.add(folder)

    def _top(self, path: str) -> str:
        return self.local_path(path.partition("/")[0])

    @contextlib.contextmanager
    def _looking(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            self._check_there(path)
            raise
        if "/" in path:
            self._saw(self._top(path))

    def _check_there(self, path: str) -> None:
        """Raises `Unavailable` when the folders are away in which `path` would be."""
        if self.durable and not os.path.isdir(self.root):
            raise _away(self.root)
        top = self._top(path)
        if top in self._seen and not os.path.isdir(top):
            raise _away(top)

    def _find(self, folder: str, depth: int, filename: str | None, found: list[Entry]) -> None:
        # Folders may vanish while we look: another process removes a model.
        if depth == 0 and filename is not None:
            path = f"{folder}/{filename}"
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found.append(_entry(path, os.stat(self.local_path(path))))
            return
        try:
            with os.scandir(self.local_path(folder)) as scan:
                children = sorted(scan, key=lambda child: child.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for child in children:
            with contextlib.suppress(FileNotFoundError):
                if depth and child.is_dir():
                    self._find(f"{folder}/{child.name}", depth - 1, filename, found)
                elif not depth and child.is_file():
                    found.append(_entry(f"{folder}/{child.name}", child.stat()))

    @translated()
    def stage(self) -> LocalStage:
        return LocalStage(self)

    @translated()
    def create(self, path: str, data: bytes) -> None:
        stage = LocalStage(self)
        try:
            stage.write(data)
            stage.link(path)
        finally:
            stage.discard()

    @translated()
    def replace(self, path: str, data: bytes) -> None:
        stage = LocalStage(self)
        try:
            stage.write(data)
            stage.publish(path)
        finally:
            stage.discard()

    @translated()
    def touch(self, path: str) -> None:
        try:
            os.utime(self.local_path(path))
        except PermissionError:  # another user's file: it is there, which is what matters
            os.stat(self.local_path(path))

    @translated()
    def remove(self, path: str) -> None:
        os.unlink(self.local_path(path))
        self.sync_folder(os.path.dirname(self.local_path(path)))

    @translated()
    def remove_tree(self, path: str) -> None:
        target = self.local_path(path)
        shutil.rmtree(target, ignore_errors=True)
        # The folder above goes too when it is empty now, but never a folder in use.
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(target))

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        with translated():
            self.make_folder(self.root)
            handle = os.open(self.local_path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with translated():
                fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(handle)

    @translated()
    def sweep(self, min_age_s: float) -> int:
        removed = 0
        for entry in self.find(TEMPORARY, 0):
            if entry.modified is not None and time.time() - entry.modified < min_age_s:
                continue
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                path = self.local_path(entry.path)
                handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    # A living writer holds this lock.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    removed += 1
                finally:
                    os.close(handle)
        return removed

    def make_folder(self, path: str) -> None:
        """`makedirs`, with every new folder's name on the disk before we go on."""
        if os.path.isdir(path):
            return
        if path in self._seen:
            raise _away(path)  # a second repository in its place would hide the first
        parent = os.path.dirname(path)
        self.make_folder(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        self.sync_folder(parent)

    def sync_folder(self, path: str) -> None:
        if not self.durable:
            return
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class LocalStage:
    """A temporary file, locked as long as its writer lives, so that `sweep` can tell."""

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        storage.make_folder(storage.local_path(TEMPORARY))
        while True:
            self._path = storage.local_path(f"{TEMPORARY}/{uuid.uuid4().hex}.part")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, 0o666)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            if os.fstat(self._handle).st_nlink:
                break
            os.close(self._handle)  # a sweep took it between the two calls
        self._abandon = weakref.finalize(self, _abandon, self._handle, self._path)

    @translated()
    def write(self, data: bytes | memoryview) -> None:
        write_all(self._handle, data)

    @translated()
    def reopen(self) -> BinaryIO:
        return open(self._path, "rb")

    @translated()
    def publish(self, path: str) -> None:
        self._settle(path, exclusive=False)

    @translated()
    def link(self, path: str) -> None:
        """As `publish`, but raises `FileExistsError` rather than take another's place."""
        self._settle(path, exclusive=True)

    def _settle(self, path: str, *, exclusive: bool) -> None:
        target = self._storage.local_path(path)
        if self._storage.durable:
            os.fsync(self._handle)
        # `remove_tree` of the same model may take the folder away again between the two steps.
        for _ in range(100):
            self._storage.make_folder(os.path.dirname(target))
            try:
                if exclusive:
                    os.link(self._path, target)
                else:
                    os.replace(self._path, target)
                break
            except FileNotFoundError:
                continue
        else:
            raise Unavailable("the repository cannot be used: its folder keeps vanishing")
        self._storage.sync_folder(os.path.dirname(target))
        self.discard()

    def discard(self) -> None:
        self._abandon()


def _away(folder: str) -> Unavailable:
    return Unavailable(f"the repository cannot be used: its folder {folder} is away")


def _abandon(handle: int, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    os.close(handle)


def _entry(path: str, stat: os.stat_result) -> Entry:
    stamp = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)
    return Entry(path, stat.st_size, stat.st_mtime, stamp)
