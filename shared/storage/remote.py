"""A bucket, or whatever else fsspec reaches, as storage (see `port` for the laws)."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from shared.storage.port import TEMPORARY, Entry, translated, write_all

_WHOLE_OBJECTS: Final = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "obs"}
"""Services where an object appears when its upload ends, and a rename is a copy."""
_UPLOAD_BYTES: Final = 1 << 20
_creating: Final = threading.Lock()
"""Not every service can create exclusively; threads of one process at least take turns."""
_translated: Final = functools.partial(translated, Exception)
"""Each service has its driver, and each driver exceptions of its own."""


class RemoteStorage:
    """An fsspec file system below one path."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self.root = root.rstrip("/")
        protocols = filesystem.protocol
        names = {protocols} if isinstance(protocols, str) else set(protocols)
        self._whole_objects = bool(names & _WHOLE_OBJECTS)
        self._shared_handles = "memory" in names

    def __repr__(self) -> str:
        return f"RemoteStorage({type(self._fs).__name__}, {self.root!r})"

    def local_path(self, path: str) -> None:  # noqa: ARG002 — none of them is here
        return None

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}"

    @_translated()
    def read(self, path: str) -> bytes:
        return cast("bytes", self._fs.cat_file(self._full(path)))

    @_translated()
    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        wanted = {self._full(path): path for path in paths}
        if not wanted:
            return {}
        contents: dict[str, bytes] = {}
        for full, data in self._fs.cat(list(wanted), on_error="return").items():
            if isinstance(data, FileNotFoundError):
                continue
            if isinstance(data, BaseException):
                raise data
            contents[wanted[full]] = data
        return contents

    @_translated()
    def open(self, path: str) -> BinaryIO:
        if self._shared_handles:
            # fsspec's memory files are one object for all readers, position included.
            return io.BytesIO(self._fs.cat_file(self._full(path)))
        return cast("BinaryIO", _Reader(self._fs.open(self._full(path), "rb")))

    @_translated()
    def entry(self, path: str) -> Entry:
        info = self._fs.info(self._full(path))
        if info.get("type") == "directory":
            raise FileNotFoundError(path)
        return _entry(path, info)

    @_translated()
    def find(self, prefix: str, depth: int, filename: str | None = None) -> list[Entry]:
        # One flat listing: with a depth, fsspec would ask for every folder on its own.
        base = self._full(prefix)
        self._fs.invalidate_cache(base)
        try:
            found = self._fs.find(base, detail=True)
        except FileNotFoundError:
            return []
        entries = []
        for full, info in found.items():
            inner = full[len(base) :].lstrip("/").split("/")
            if len(inner) == depth + 1 and (filename is None or inner[-1] == filename):
                entries.append(_entry(f"{prefix}/{'/'.join(inner)}", info))
        return entries

    @_translated()
    def stage(self) -> RemoteStage:
        return RemoteStage(self)

    @_translated()
    def create(self, path: str, data: bytes) -> None:
        full = self._full(path)
        with _creating:
            self.make_folder(full)
            self._fs.pipe_file(full, data, mode="create")

    @_translated()
    def replace(self, path: str, data: bytes) -> None:
        self.make_folder(self._full(path))
        self._fs.pipe_file(self._full(path), data)

    def touch(self, path: str) -> None:
        self.entry(path)

    @_translated()
    def remove(self, path: str) -> None:
        self._fs.rm_file(self._full(path))

    @_translated()
    def remove_tree(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:  # noqa: ARG002 — nothing to lock with
        yield

    def sweep(self, min_age_s: float) -> int:
        removed = 0
        for entry in self.find(TEMPORARY, 0):
            if entry.modified is not None and time.time() - entry.modified >= min_age_s:
                with contextlib.suppress(FileNotFoundError):
                    self.remove(entry.path)
                    removed += 1
        return removed

    def make_folder(self, full: str) -> None:
        if not self._whole_objects:
            self._fs.makedirs(full.rpartition("/")[0], exist_ok=True)

    @_translated()
    def upload(self, source: BinaryIO, path: str) -> None:
        """Gives the bytes of `source` the name `path`, whole or not at all."""
        full = self._full(path)
        interim = full if self._whole_objects else self._full(f"{TEMPORARY}/{uuid.uuid4().hex}")
        self.make_folder(full)
        self.make_folder(interim)
        try:
            target = self._fs.open(interim, "wb", autocommit=not self._whole_objects)
            try:
                shutil.copyfileobj(source, target, _UPLOAD_BYTES)
                target.close()
                if self._whole_objects:
                    target.commit()
            except BaseException:
                if self._whole_objects:
                    target.discard()
                raise
            if interim != full:
                self._fs.mv(interim, full)
        except BaseException:
            if interim != full:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(interim)
            raise


class _Reader(io.RawIOBase):
    """A file that is read over the network, whose driver fails later than at its opening. It has
    a buffer of its own, so there is none here."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @_translated()
    def read(self, size: int | None = -1, /) -> bytes:
        return cast("bytes", self._file.read(-1 if size is None else size))

    @_translated()
    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return cast("int", self._file.seek(offset, whence))

    def tell(self) -> int:
        return cast("int", self._file.tell())

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(Exception):  # nothing was written
                self._file.close()
        super().close()


class RemoteStage:
    """Bytes wait in a nameless file on this machine until their name, a checksum, is known:
    renaming in a bucket means copying, and what is there already need not travel."""

    def __init__(self, storage: RemoteStorage) -> None:
        self._storage = storage
        handle, path = tempfile.mkstemp(prefix="roost-upload-")
        os.unlink(path)  # noqa: PTH108
        self._handle = handle
        self._abandon = weakref.finalize(self, os.close, handle)

    @_translated()
    def write(self, data: bytes | memoryview) -> None:
        write_all(self._handle, data)

    @_translated()
    def reopen(self) -> BinaryIO:
        # By its number: a duplicate would share its position, and reading is not writing.
        return Path(f"/proc/self/fd/{self._handle}").open("rb")

    def publish(self, path: str) -> None:
        with _translated(), open(self._handle, "rb", closefd=False) as source:
            source.seek(0)
            self._storage.upload(source, path)
        self.discard()

    def discard(self) -> None:
        self._abandon()


def _entry(path: str, info: dict[str, Any]) -> Entry:
    modified: float | None = None
    for key in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = info.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            aware = value if value.tzinfo else value.replace(tzinfo=UTC)
            modified = aware.timestamp()
            break
        if isinstance(value, int | float):
            modified = float(value)
            break
    size = int(info.get("size") or 0)
    return Entry(path, size, modified, (info.get("ETag") or info.get("etag"), modified, size))
