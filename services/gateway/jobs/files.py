"""Jobs as files in the registry's storage, the one durable place that all gateways share.

    jobs/<shard>/<id>.asked   a job that waits: what it is, and its request
    jobs/<shard>/<id>.ended   one that has ended: how, and its answer
    jobs/<shard>/<name>.key   to which job an `Idempotency-Key` leads
    jobs/<shard>/<id>.freeing somebody is about to remove the key that leads to this job

Laws: a job is accepted when its `.asked` is there. Its end is decided by whoever creates `.ended`,
which exactly one can; then `.asked` goes. So a second answer, or one to a cancelled job, finds no
place. An id is never used again, so nothing that comes late can meet another job. A key's name is:
a key goes only while `.freeing` of its job is held, so that nobody takes away that of the next one.
Synchronous, for threads; every call may raise `Unavailable`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Final, Literal

import structlog

from services.gateway.core.jobkeys import Claim, decode_claim, encode_claim
from services.gateway.core.jobs import (
    Ended,
    Found,
    Job,
    JobNotFound,
    check_id,
    decode_ended,
    decode_job,
    encode_file,
    job_of,
)
from shared.errors import Internal
from shared.storage import Entry, Storage

log = structlog.get_logger(__name__)

JOBS: Final = "jobs"
_ASKED: Final = ".asked"
_ENDED: Final = ".ended"
_KEY: Final = ".key"
_FREEING: Final = ".freeing"
_KINDS: Final[dict[str, Literal["asked", "ended", "key", "freeing"]]] = {
    _ASKED: "asked", _ENDED: "ended", _KEY: "key", _FREEING: "freeing",
}  # fmt: skip
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
        """All there is of a job, and its key first: who comes with that again is served anew.
        Idempotent."""
        self._free_key(id_)
        self._remove(_path(id_, _ASKED))
        self._remove(_path(id_, _ENDED))

    def remove_request(self, id_: str) -> None:
        self._remove(_path(id_, _ASKED))

    def touch(self, id_: str) -> None:
        """Makes a waiting job look young again."""
        with contextlib.suppress(FileNotFoundError):
            self._storage.touch(_path(id_, _ASKED))

    def list(self, shard: str) -> list[Found]:
        """The files of one shard, keys included."""
        found = []
        now = time.time()
        for entry in self._storage.find(f"{JOBS}/{shard}", 0):
            id_, dot, kind = entry.path.rpartition("/")[2].partition(".")
            if (known := _KINDS.get(dot + kind)) is not None:
                found.append(Found(id_, known, now - self._modified(entry)))
        return found

    # --- keys -------------------------------------------------------------------------------

    def key(self, name: str) -> Claim | None:
        """To which job a key leads."""
        path = _path(name, _KEY)
        try:
            return decode_claim(self._storage.read(path))
        except FileNotFoundError:
            return None
        except (ValueError, JobNotFound) as error:
            log.error("job_key_broken", error=str(error)[:200])
            self._remove(path)  # it leads nowhere
            return None

    def claim(self, name: str, claim: Claim) -> bool:
        """Lets a key lead to a job, durably, unless it leads to one."""
        try:
            self._storage.create(_path(name, _KEY), encode_claim(claim))
        except FileExistsError:
            return False
        return True

    def free(self, name: str, id_: str) -> bool:
        """Lets a key lead to this job no more. False: somebody else is at it."""
        if not self._leads_to(name, id_):
            return True
        lock = _path(id_, _FREEING)
        try:
            self._storage.create(lock, b"")
        except FileExistsError:
            return False
        try:
            # Looked at again: by now it may be the key of the next job, which has no such lock.
            if self._leads_to(name, id_):
                self._remove(_path(name, _KEY))
        finally:
            self._remove(lock)
        return True

    def unlock(self, id_: str) -> None:
        """After somebody died freeing a key."""
        self._remove(_path(id_, _FREEING))

    def _leads_to(self, name: str, id_: str) -> bool:
        claim = self.key(name)
        return claim is not None and claim.id == id_

    def _free_key(self, id_: str) -> None:
        with contextlib.suppress(Broken):  # then its key leads to nothing
            found = self.find(id_)
            if found is not None and (name := job_of(found).key):
                self.free(name, id_)

    def _modified(self, entry: Entry) -> float:
        if entry.modified is not None:
            return entry.modified
        data = self._head(entry.path)
        try:
            if data is None or entry.path.endswith((_KEY, _FREEING)):
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
