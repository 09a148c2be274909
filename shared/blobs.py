"""Files by the sha256 of their content, and the one who writes them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Final, Protocol, Self

from shared.errors import Internal, InvalidRequest, ModelNotFound, TooLarge
from shared.storage import Entry, Stage, Storage

BLOBS: Final = "blobs/sha256"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_READ_BYTES: Final = 4 << 20


def check_digest(digest: str) -> str:
    """Returns `digest`, or raises `InvalidRequest`: it becomes a path."""
    if not _DIGEST.match(digest):
        raise InvalidRequest(f"{digest[:80]!r} is not a digest: 'sha256:' and 64 hex digits")
    return digest


def blob_path(digest: str) -> str:
    """Path below the repository's root, e.g. `blobs/sha256/ab/ab12…`."""
    hexadecimal = check_digest(digest).removeprefix("sha256:")
    return f"{BLOBS}/{hexadecimal[:2]}/{hexadecimal}"


class Source(Protocol):
    """From where a file is copied."""

    def open(self, digest: str) -> BinaryIO: ...


class BlobStore:
    """The blobs of one storage. Remembers which of them it has verified."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._verified: dict[str, int] = {}
        """Size by digest, of what this process has hashed."""
        # One blob is hashed or fetched once, however many threads ask for it.
        self._locks = tuple(threading.Lock() for _ in range(64))
        self._fetching = tuple(threading.Lock() for _ in range(64))

    def writer(self, max_bytes: int | None = None) -> BlobWriter:
        return BlobWriter(self._storage.stage(), self.settle, max_bytes)

    def has(self, digest: str) -> bool:
        try:
            self._storage.entry(blob_path(digest))
        except FileNotFoundError:
            return False
        return True

    def size(self, digest: str) -> int:
        """Raises `ModelNotFound` when there is no such blob."""
        try:
            return self._storage.entry(blob_path(digest)).size
        except FileNotFoundError:
            raise _missing(digest) from None

    def open(self, digest: str) -> BinaryIO:
        try:
            return self._storage.open(blob_path(digest))
        except FileNotFoundError:
            raise _missing(digest) from None

    def touch(self, digest: str) -> None:
        """Keeps the blob from the next `collect_garbage`; `ModelNotFound` when it is gone."""
        try:
            self._storage.touch(blob_path(digest))
        except FileNotFoundError:
            raise _missing(digest) from None

    def entries(self) -> dict[str, Entry]:
        """All blobs by digest."""
        found = self._storage.find(BLOBS, 1)
        named = ((f"sha256:{entry.path.rpartition('/')[2]}", entry) for entry in found)
        return {digest: entry for digest, entry in named if _DIGEST.match(digest)}

    def remove(self, digest: str) -> None:
        self._verified.pop(digest, None)
        self._storage.remove(blob_path(digest))

    def verified_path(self, digest: str) -> str | None:
        """The local file, hashed once by this process; None when there is none on this machine.

        Raises `Internal` when the content is not what the name says.
        """
        path = self._storage.local_path(blob_path(digest))
        if path is None:
            return None
        with self._locks[int(digest[-2:], 16) % len(self._locks)]:
            try:
                size = self._storage.entry(blob_path(digest)).size
                if self._verified.get(digest) == size:
                    return path
                with self._storage.open(blob_path(digest)) as file:
                    actual = f"sha256:{_sha256(file)}"
            except FileNotFoundError:
                return None
            if actual != digest:
                raise Internal(f"the file {path} is damaged: its content has the digest {actual}")
            self._verified[digest] = size
            return path

    def fetch(self, digest: str, source: Source) -> str:
        """As `verified_path`, after copying the blob from `source` when need be. This storage
        must be local. A damaged copy is fetched anew; a damaged source raises `Internal`."""
        with self._fetching[int(digest[-2:], 16) % len(self._fetching)]:
            try:
                path = self.verified_path(digest)
            except Internal:
                self.remove(digest)
                path = None
            if path is None:
                self._copy(digest, source)
                path = self.verified_path(digest)
        if path is None:
            raise Internal(f"the copy of {digest} vanished as soon as it was made")
        return path

    def _copy(self, digest: str, source: Source) -> None:
        with source.open(digest) as file, self.writer() as writer:
            while chunk := file.read(_READ_BYTES):
                writer.write(chunk)
            try:
                writer.commit(digest)
            except InvalidRequest as error:
                raise Internal(f"the repository's copy is damaged: {error}") from error

    def settle(self, stage: Stage, digest: str, size: int) -> None:
        """Gives a written stage its name, or drops it when the same content is there."""
        # The lock: what is found here must not be collected before it is touched.
        with self._storage.lock(exclusive=False):
            if self.present(digest, size):
                stage.discard()
            else:
                self.publish(stage, digest, size)

    def present(self, digest: str, size: int) -> bool:
        """Whether the blob is there; if so it looks new from now on. Under the storage's lock."""
        try:
            if self._storage.entry(blob_path(digest)).size != size:
                return False
            self._storage.touch(blob_path(digest))
        except FileNotFoundError:
            return False
        return True

    def publish(self, stage: Stage, digest: str, size: int) -> None:
        """Gives a written stage its name. Under the storage's lock."""
        stage.publish(blob_path(digest))
        self._verified[digest] = size


class BlobWriter:
    """One upload. Leaving the `with` block without `commit` forgets it, as does forgetting the
    writer. Not for several threads at once."""

    def __init__(
        self, stage: Stage, settle: Callable[[Stage, str, int], None], max_bytes: int | None
    ) -> None:
        self._stage = stage
        self._settle = settle
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._over = False
        self.size = 0
        """Bytes written so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def write(self, data: bytes | memoryview) -> None:
        """Raises `TooLarge` when the blob grows beyond `max_bytes`."""
        self._check_open()
        self.size += memoryview(data).nbytes
        if self._max_bytes is not None and self.size > self._max_bytes:
            self.abort()
            raise TooLarge(f"the file is larger than the limit of {self._max_bytes:,} bytes")
        self._hash.update(data)
        self._stage.write(data)

    def commit(self, expect: str | None = None) -> tuple[str, int]:
        """Ends the upload; returns digest and size.

        Raises `InvalidRequest` when the content has another digest than `expect`.
        """
        self._check_open()
        digest = f"sha256:{self._hash.hexdigest()}"
        if expect is not None and check_digest(expect) != digest:
            self.abort()
            raise InvalidRequest(
                f"the checksum does not match: expected {expect}, received {digest} "
                f"({self.size:,} bytes)"
            )
        self._settle(self._stage, digest, self.size)
        self._over = True
        return digest, self.size

    def abort(self) -> None:
        """Forgets the upload. After `commit` it does nothing."""
        self._over = True
        self._stage.discard()

    def _check_open(self) -> None:
        if self._over:
            raise ValueError("this upload is over")


def _missing(digest: str) -> ModelNotFound:
    return ModelNotFound(f"the repository has no file {digest}")


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_READ_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
