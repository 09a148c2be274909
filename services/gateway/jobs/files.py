"""Jobs as files in the registry's storage, the one durable place that all gateways share.

    jobs/<shard>/<id>.asked   a job that waits: what it is, and its request
    jobs/<shard>/<id>.ended   one that has ended: how, and its answer

Laws: a job is accepted when its `.asked` is there. Its end is decided by whoever creates `.ended`,
which exactly one can; then `.asked` goes. So a second answer, or one to a cancelled job, finds no
place. Synchronous, for threads; every call may raise `Unavailable`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final

import structlog

from services.gateway.core.jobs import (
    Ended,
    Found,
    Job,
    check_id,
    decode_ended,
    decode_job,
    encode_file,
)
from shared.errors import Internal
from shared.storage import Entry, Storage

log = structlog.get_logger(__name__)

JOBS: Final = "jobs"
_ASKED: Final = ".asked"
_ENDED: Final = ".ended"
_HEAD_BYTES: Final = 16 * 1024
"""Longer than any description: names, ids and one error's text are bounded."""


class Broken(Internal):
    """A job's file is not what was written."""

    retryable = False


class JobFiles:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def create(self, job: Job, body: bytes) -> None:
        """Durable on return."""
        self._storage.create(_path(job.id, _ASKED), encode_file(job, body))

    def waiting(self, id_: str) -> Job | None:
        """The job, if it has not ended."""
        data = self._head(_path(id_, _ASKED))
        # Who died after the first of an end's two steps leaves both files.
        if data is None or self._there(_path(id_, _ENDED)):
            return None
        with _whole(id_):
            return decode_job(data)[0]

    def request(self, id_: str) -> bytes | None:
        """The request's bytes; None when the job has ended."""
        try:
            data = self._storage.read(_path(id_, _ASKED))
        except FileNotFoundError:
            return None
        with _whole(id_):
            return decode_job(data)[1]

    def find(self, id_: str) -> Job | Ended | None:
        """Whatever there is of a job, but for bytes."""
        for _ in range(2):  # it may end between the two looks
            with _whole(id_):
                data = self._head(_path(id_, _ENDED))
                if data is not None:
                    return decode_ended(data)[0]
                data = self._head(_path(id_, _ASKED))
                if data is not None:
                    return decode_job(data)[0]
        return None

    def answer(self, id_: str) -> tuple[Ended, bytes] | None:
        try:
            data = self._storage.read(_path(id_, _ENDED))
        except FileNotFoundError:
            return None
        with _whole(id_):
            return decode_ended(data)

    def end(self, end: Ended, body: bytes) -> bool:
        """Whether this end is the job's: another may have come first, or the job was removed."""
        id_ = end.job.id
        if not self._there(_path(id_, _ASKED)):
            return False
        try:
            self._storage.create(_path(id_, _ENDED), encode_file(end, body))
            first = True
        except FileExistsError:
            first = False
        self._remove(_path(id_, _ASKED))
        return first

    def remove(self, id_: str) -> None:
        """All there is of a job. Idempotent."""
        self._remove(_path(id_, _ASKED))
        self._remove(_path(id_, _ENDED))

    def remove_request(self, id_: str) -> None:
        self._remove(_path(id_, _ASKED))

    def touch(self, id_: str) -> None:
        """Makes a waiting job look young again."""
        with contextlib.suppress(FileNotFoundError):
            self._storage.touch(_path(id_, _ASKED))

    def list(self, shard: str) -> list[Found]:
        """The files of one shard."""
        found = []
        now = time.time()
        for entry in self._storage.find(f"{JOBS}/{shard}", 0):
            id_, dot, kind = entry.path.rpartition("/")[2].partition(".")
            if dot + kind in {_ASKED, _ENDED}:
                found.append(Found(id_, dot + kind == _ENDED, now - self._modified(entry)))
        return found

    def _modified(self, entry: Entry) -> float:
        if entry.modified is not None:
            return entry.modified
        data = self._head(entry.path)
        try:
            if data is None:
                return time.time()
            if entry.path.endswith(_ENDED):
                return decode_ended(data)[0].ended_ms / 1000
            return decode_job(data)[0].created_ms / 1000
        except ValueError:
            return 0.0

    def _head(self, path: str) -> bytes | None:
        try:
            with self._storage.open(path) as file:
                return file.read(_HEAD_BYTES)
        except FileNotFoundError:
            return None

    def _there(self, path: str) -> bool:
        try:
            self._storage.entry(path)
        except FileNotFoundError:
            return False
        return True

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._storage.remove(path)


@contextlib.contextmanager
def _whole(id_: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        log.error("job_file_broken", job=id_, error=str(error)[:200])
        raise Broken("what is kept of this job cannot be read") from error


def _path(id_: str, kind: str) -> str:
    id_ = check_id(id_)
    return f"{JOBS}/{id_[0]}/{id_}{kind}"
