"""What a job is, which of its ends it has come to, and what becomes of it next.

A job is a request that its client does not wait for. While it waits there is a `Job`; when it has
ended there is an `Ended`, which holds all that is told of it later. Times are Unix time in
milliseconds, since they outlive processes and machines.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from shared.errors import InvalidRequest, RoostError
from shared.names import JOB_QUEUE_PREFIX
from shared.v2 import error_body

State = Literal["queued", "succeeded", "failed", "cancelled", "expired"]

SHARDS: Final = 8
"""Job queues, and folders of job files. A model's jobs share one, so that a model which answers
none holds up an eighth of the others, for its turn, rather than all."""
FAULTS_FORGIVEN: Final = 4
"""How often a job is tried again after a fault of our own; other passing trouble (no worker, a
full queue) is waited out until the deadline."""
WAIT_MOST_S: Final = 30.0
"""Between two tries."""
SAID_CHARS: Final = 1000
"""Of an error, in what is told of a job. The result has all of it."""
PUBLISH_AT_ONCE: Final = 100
"""Lost jobs that one look brings back."""
_ID: Final = re.compile(r"[0-7][0-9a-f]{31}\Z")
ID_DIGITS: Final = 31
"""Of an id, after its shard."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted request, but for its bytes."""

    id: str
    model: str
    version: str | None = None
    """As it stood in the address."""
    split_key: str = ""
    tenant: str = ""
    request_id: str | None = None
    """The client's own, in the request."""
    created_ms: int
    deadline_ms: int
    nbytes: int
    """Of the v2 request that follows."""
    header_length: int | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    key: str = ""
    """The name of its `Idempotency-Key`, as `jobkeys` forms it; empty: it has none."""
    fingerprint: str = ""
    """Of the request, where there is a key."""

    def __post_init__(self) -> None:
        check_id(self.id)


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A job that will not run again, but for the bytes of its answer."""

    job: Job
    state: State
    ended_ms: int
    code: str
    """`ok`, or the error's."""
    headers: dict[str, int] = {}
    """Of the reply: what an answer tells."""
    error: str | None = None


class Note(msgspec.Struct, frozen=True, array_like=True):
    """What waits in a job queue: which job is to have its turn."""

    id: str
    tries: int = 0
    """Turns it has had."""
    faults: int = 0
    """Those of them that ended by a fault of ours."""


class Again(msgspec.Struct, frozen=True):
    """It is to have another turn."""

    note: Note
    after_s: float


class JobNotFound(RoostError):
    """No such job, or none of this tenant's, or it was removed."""

    code = "not_found"


def shard_of(model: str) -> str:
    """One of eight digits. The same for all gateways, at all times: files lie by it."""
    return "01234567"[zlib.crc32(model.encode()) % SHARDS]


def new_id(model: str, secret: str) -> str:
    """The id of a job: whoever knows it may read the result, so `secret`, 31 random hexadecimal
    digits or more, must not be guessable."""
    return check_id(shard_of(model) + secret[:ID_DIGITS])


def check_id(text: str) -> str:
    """Returns the id; raises `JobNotFound` for what cannot be one. Ids become part of paths."""
    if not _ID.match(text):
        raise JobNotFound("there is no such job")
    return text


def queue_of(shard: str) -> str:
    return f"{JOB_QUEUE_PREFIX}{shard}"


def expired(job: Job, now_ms: int, last: str = "") -> Ended:
    """The end of a job whose deadline came first. `last`: what its last turn ended with."""
    said = "the job's deadline passed before it had an answer"
    if last:
        said += f"; the last try: {last}"
    return ended(job, "expired", now_ms, "deadline_exceeded", error=said)


def cancelled(job: Job, now_ms: int) -> Ended:
    return ended(job, "cancelled", now_ms, "not_found", error="the job was cancelled")


def superseded(job: Job, by: str, now_ms: int) -> Ended:
    """The end of a job whose key led to another before it was accepted."""
    said = f"its Idempotency-Key leads to job {by}"
    return ended(job, "cancelled", now_ms, "conflict", error=said)


def ended(
    job: Job,
    state: State,
    now_ms: int,
    code: str,
    *,
    headers: dict[str, int] | None = None,
    error: str | None = None,
) -> Ended:
    said = error if error is None else error[:SAID_CHARS]
    return Ended(
        job=job, state=state, ended_ms=now_ms, code=code, headers=headers or {}, error=said
    )


def body_of(end: Ended) -> bytes:
    """What the result says of a job that ended by an error of ours."""
    return error_body(end.error or "")


def after_error(
    note: Note, job: Job, error: RoostError, *, now_ms: int, chance: float
) -> Again | Ended:
    """What follows a turn that ended badly. `chance` is random, from 0 to 1.

    Passing trouble is waited out; the job comes to the back of its queue then, so that others of
    its shard have their turn."""
    message = str(error)
    faults = note.faults + (error.code == "internal")
    if not error.retryable or faults > FAULTS_FORGIVEN:
        return ended(job, "failed", now_ms, error.code, error=message)
    left_s = (job.deadline_ms - now_ms) / 1000
    wait_s = min(2.0 ** min(note.tries, 10), WAIT_MOST_S) * (0.5 + chance / 2)
    wait_s = max(wait_s, min(error.retry_after_s or 0.0, WAIT_MOST_S))
    if wait_s >= left_s:
        return expired(job, max(now_ms, job.deadline_ms), message)
    return Again(Note(note.id, note.tries + 1, faults), wait_s)


def deadline_ms(wished_s: Iterable[float], *, now_ms: int, default_s: float, most_s: float) -> int:
    """The earliest that was wished, else the default; never beyond the maximum."""
    return now_ms + round(min(min(wished_s, default=default_s), most_s) * 1000)


def view(what: Job | Ended, *, keep_s: float) -> dict[str, Any]:
    """What a client is told of a job."""
    job = job_of(what)
    told: dict[str, Any] = {
        "id": job.id,
        "state": "queued",
        "model_name": job.model,
        "created": _time(job.created_ms),
        "deadline": _time(job.deadline_ms),
        "result": f"{path_of(job.id)}/result",
    }
    if job.version is not None:
        told["model_version"] = job.version
    if job.request_id is not None:
        told["request_id"] = job.request_id
    if isinstance(what, Ended):
        told["state"] = what.state
        told["ended"] = _time(what.ended_ms)
        told["kept_until"] = _time(kept_until_ms(what, keep_s))
        if what.error is not None:
            told |= {"error": what.error, "code": what.code}
    return told


def job_of(what: Job | Ended) -> Job:
    return what if isinstance(what, Job) else what.job


def path_of(id_: str) -> str:
    return f"/v2/jobs/{id_}"


def kept_until_ms(end: Ended, keep_s: float) -> int:
    return end.ended_ms + round(keep_s * 1000)


def is_over(what: Job | Ended, now_ms: int, keep_s: float) -> bool:
    """Whether its result has been kept for long enough."""
    return isinstance(what, Ended) and now_ms > kept_until_ms(what, keep_s)


def _time(ms: int) -> str:
    """RFC 3339, in UTC."""
    when = datetime.fromtimestamp(ms / 1000, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- files ------------------------------------------------------------------------------

_T = TypeVar("_T")
_LENGTH_BYTES: Final = 4
_encode: Final = msgspec.json.Encoder().encode
_jobs: Final = msgspec.json.Decoder(Job)
_ends: Final = msgspec.json.Decoder(Ended)
_notes: Final = msgspec.json.Decoder(Note)


def encode_file(what: Job | Ended, body: bytes) -> bytes:
    """Length, description, bytes: one file appears in one step."""
    head = _encode(what)
    return len(head).to_bytes(_LENGTH_BYTES, "big") + head + body


def decode_job(data: bytes) -> tuple[Job, bytes]:
    """Raises `ValueError`."""
    head, body = _split(data)
    return _decoded(_jobs, head), body


def decode_ended(data: bytes) -> tuple[Ended, bytes]:
    """Raises `ValueError`."""
    head, body = _split(data)
    return _decoded(_ends, head), body


def _decoded(decoder: msgspec.json.Decoder[_T], head: bytes) -> _T:
    try:
        return decoder.decode(head)
    except RecursionError as error:  # what is not known is skipped, however it is nested
        raise ValueError(str(error)) from None


def _split(data: bytes) -> tuple[bytes, bytes]:
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    return data[_LENGTH_BYTES:start], data[start:]


def encode_note(note: Note) -> bytes:
    return _encode(note)


def decode_note(data: bytes) -> Note:
    """Raises `InvalidRequest`, `JobNotFound`."""
    try:
        note = _notes.decode(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not a job's turn: {str(error)[:100]}") from None
    check_id(note.id)
    return note


class Found(NamedTuple):
    """A file in a folder of jobs."""

    id: str
    """Of the job; of a key its name."""
    kind: Literal["asked", "ended", "key", "freeing"]
    age_s: float


class Sweep(NamedTuple):
    """What a look into a folder of job files leads to."""

    over: list[str]
    """Jobs whose results have been kept for long enough."""
    settled: list[str]
    """Jobs that have ended, with a request that somebody died before removing."""
    quiet: list[str]
    """Jobs that should have had a turn by now. If nothing waits in their queue, their notes are
    lost (the broker lost them, or whoever accepted the job died at it)."""
    keys: list[str]
    """Names of keys that are older than any job: theirs went without them."""
    locks: list[str]
    """Jobs whose keys somebody died freeing."""


def sweep(found: Iterable[Found], *, keep_s: float, turn_s: float, longest_s: float) -> Sweep:
    """Looks through one folder. `turn_s`: how long a turn may take, waiting included; `longest_s`:
    how long a job may wait."""
    ages: dict[str, dict[str, float]] = {"asked": {}, "ended": {}, "key": {}, "freeing": {}}
    for file in found:
        ages[file.kind][file.id] = file.age_s
    waiting, ends = ages["asked"], ages["ended"]

    def older(kind: str, seconds: float) -> list[str]:
        return [id_ for id_, age_s in ages[kind].items() if age_s > seconds]

    return Sweep(
        over=older("ended", keep_s),
        settled=[id_ for id_ in waiting if id_ in ends],
        quiet=[id_ for id_ in older("asked", turn_s) if id_ not in ends],
        keys=older("key", longest_s + keep_s + turn_s),
        locks=older("freeing", turn_s),
    )
