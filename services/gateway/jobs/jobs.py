"""Jobs as clients see them: submit, look, fetch the result, cancel. Running them is `runs`'."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from typing import Final

import structlog

from services.gateway.asked import Asked
from services.gateway.body import Held, Rejected
from services.gateway.cancels import Cancels
from services.gateway.config import GatewayConfig
from services.gateway.core.admission import Admission
from services.gateway.core.jobkeys import Claim, fingerprint_of, key_name
from services.gateway.core.jobs import (
    Ended,
    Job,
    JobNotFound,
    Note,
    body_of,
    cancelled,
    check_id,
    deadline_ms,
    encode_note,
    expired,
    is_over,
    job_of,
    new_id,
    queue_of,
)
from services.gateway.infer import Inference, Replied, Taken
from services.gateway.jobs.clock import now_ms
from services.gateway.jobs.files import JobFiles
from services.gateway.jobs.keys import JobKeys
from services.gateway.metrics import Metrics
from services.gateway.routes import Routes
from shared.broker.port import (
    Broker,
    BrokerUnavailable,
    Message,
    PublishUncertain,
    QueueFull,
    Unroutable,
)
from shared.errors import (
    DeadlineExceeded,
    IdempotencyKeyReused,
    JobNotDone,
    Overloaded,
    Unavailable,
)

log = structlog.get_logger(__name__)

_SPLIT_KEY_CHARS: Final = 256
_LOOK_AGAIN_S: Final = 1
_FULL_S: Final = 30
"""Until a full job queue is worth another try: jobs wait for minutes, not for moments."""


class Jobs:
    """One object per gateway; what it tells is the same on all of them."""

    def __init__(
        self,
        config: GatewayConfig,
        routes: Routes,
        admission: Admission,
        inference: Inference,
        broker: Broker,
        files: JobFiles,
        metrics: Metrics,
        cancels: Cancels,
    ) -> None:
        self.keep_s = config.job_keep_s
        self._config = config
        self._routes = routes
        self._admission = admission
        self._inference = inference
        self._broker = broker
        self._files = files
        self._keys = JobKeys(files, config.job_keep_s)
        self._metrics = metrics
        self._cancels = cancels

    async def submit(self, asked: Asked, key: str = "") -> Job | Ended:
        """Accepts a request: on return it will have its turn, whoever is restarted meanwhile. For
        a key that has a job already: that job, as it stands now.

        Raises as `Inference.answer` does up to the publish, `Overloaded` when too many jobs wait,
        `Unavailable` when it cannot be written down or queued, `IdempotencyKeyReused` when the job
        of this key is another request.
        """
        if not self._broker.connected:
            raise Unavailable("the message broker is not connected", retry_after_s=1)
        accepted_ms = now_ms()
        held = Held(self._admission, asked.tenant)
        try:
            target = await self._routes.target(asked.name, asked.version, asked.split_key)
            self._inference.spend(asked.tenant)
            taken = await self._inference.take(asked, target, held)
            name = fingerprint = ""
            if key:
                name = key_name(asked.name, asked.version, asked.tenant, key)
                fingerprint = await asyncio.to_thread(_fingerprint, asked, taken)
                held_by = await asyncio.to_thread(self._keys.holder, name)
                if held_by is not None:
                    return await self._of_key(held_by, fingerprint)
            job = self._job(asked, taken, accepted_ms, name, fingerprint)
            with self._admitted(job):
                await asyncio.to_thread(self._files.create, job, taken.read.body)
                await self._queue(job)
                if name:
                    mine = Claim(job.id, fingerprint)
                    held_by = await asyncio.to_thread(self._keys.claim, name, mine)
                    if held_by.id != job.id:
                        await asyncio.to_thread(self._files.remove, job.id)
                        return await self._of_key(held_by, fingerprint)
        except Rejected as error:
            self._metrics.rejected(error.reason)
            raise
        finally:
            held.release()
        self._metrics.job("queued")
        return job

    @contextlib.contextmanager
    def _admitted(self, job: Job) -> Iterator[None]:
        """Submitting is bounded as asking is. Raises `Rejected`."""
        rejection = self._admission.enter(job.model, time.monotonic(), job.tenant)
        if rejection is not None:
            raise Rejected(rejection)
        try:
            yield
        finally:
            now = time.monotonic()
            self._admission.leave(job.model, now, answered=False, tenant=job.tenant)

    async def _of_key(self, held_by: Claim, fingerprint: str) -> Job | Ended:
        """The job that a key leads to."""
        if held_by.fingerprint != fingerprint:
            raise IdempotencyKeyReused("another request was sent with this Idempotency-Key")
        found = await self._look(held_by.id)
        if found is None:
            raise Unavailable("the job of this key was removed just now", retry_after_s=1)
        return found

    def _job(self, asked: Asked, taken: Taken, accepted_ms: int, key: str, fingerprint: str) -> Job:
        read, config = taken.read, self._config
        deadline = deadline_ms(
            read.wished_s(),
            now_ms=accepted_ms,
            default_s=config.job_timeout_s,
            most_s=config.job_max_timeout_s,
        )
        if deadline <= accepted_ms:
            raise DeadlineExceeded("the deadline had passed before the job was accepted")
        name = taken.target.manifest.name
        return Job(
            id=new_id(name, secrets.token_hex(16)),
            model=name,
            version=asked.version,
            split_key=asked.split_key[:_SPLIT_KEY_CHARS],
            tenant=asked.tenant,
            request_id=read.request.id,
            created_ms=accepted_ms,
            deadline_ms=deadline,
            nbytes=len(read.body),
            header_length=read.header_length,
            traceparent=read.traceparent,
            tracestate=read.tracestate,
            key=key,
            fingerprint=fingerprint,
        )

    async def _queue(self, job: Job) -> None:
        """Puts the job into its queue; if that fails, there is no job. If that may have failed,
        there is none either, unless it has a key: then it may have had its turn by that, and others
        have been told of it."""
        uncertain = False
        try:
            try:
                await publish_note(self._broker, Note(job.id), self._config.publish_timeout_s)
            except PublishUncertain:
                uncertain = True
                # Twice in the queue does no harm: a job has one turn at a time, and one end.
                await publish_note(self._broker, Note(job.id), self._config.publish_timeout_s)
        except BaseException as error:
            refused = isinstance(error, QueueFull | BrokerUnavailable | Unroutable)
            if not job.key or (refused and not uncertain):
                await asyncio.shield(asyncio.to_thread(self._files.remove, job.id))
            if isinstance(error, QueueFull):
                raise Overloaded("too many jobs wait", retry_after_s=_FULL_S) from error
            if isinstance(error, BrokerUnavailable | PublishUncertain | Unroutable):
                raise Unavailable("the message broker is not connected", retry_after_s=1) from error
            raise

    async def find(self, id_: str, tenant: str | None) -> Job | Ended:
        """A job as it stands now. Raises `JobNotFound` also for what is another tenant's; None
        sees everybody's."""
        found = await self._look(check_id(id_))
        if found is None or (tenant is not None and job_of(found).tenant != tenant):
            raise JobNotFound("there is no such job")
        return found

    async def _look(self, id_: str) -> Job | Ended | None:
        found = await asyncio.to_thread(self._files.find, id_)
        if isinstance(found, Job) and now_ms() >= found.deadline_ms:
            # Written down, so that nobody is told otherwise later.
            await self._end(expired(found, now_ms()))
            found = await asyncio.to_thread(self._files.find, id_)
        return None if found is None or is_over(found, now_ms(), self.keep_s) else found

    async def result(self, id_: str, tenant: str | None) -> Replied:
        """What `infer` would have answered. Raises `JobNotDone` before the end, `JobNotFound`."""
        found = await self.find(id_, tenant)
        if isinstance(found, Job):
            raise JobNotDone("the job has not ended", retry_after_s=_LOOK_AGAIN_S)
        answer = await asyncio.to_thread(self._files.answer, id_)
        if answer is None:
            raise JobNotFound("there is no such job")
        end, body = answer
        if end.state == "cancelled":
            raise JobNotFound("the job was cancelled: it has no result")
        return Replied(Message(body=body, headers={**end.headers}), end.code)

    async def remove(self, id_: str, tenant: str | None) -> None:
        """Cancels a job that has not ended, which can be seen until it would have been removed;
        removes one that has. Raises `JobNotFound`."""
        found = await self.find(id_, tenant)
        if isinstance(found, Job):
            if await self._end(cancelled(found, now_ms())):
                self.tell_cancelled(found)
                return
            await self.find(id_, tenant)  # it ended just now; or somebody else removed it
        await asyncio.to_thread(self._files.remove, id_)

    def tell_cancelled(self, job: Job) -> None:
        """Whichever gateway runs it takes its request back."""
        left_s = (job.deadline_ms - now_ms()) / 1000
        self._cancels.add(cancel_name(job.id), asyncio.get_running_loop().time() + left_s)

    async def _end(self, end: Ended) -> bool:
        first = await asyncio.to_thread(self._files.end, end, body_of(end))
        if first:
            self._metrics.job(end.state)
        return first


def cancel_name(id_: str) -> str:
    """The job in a note of hang-ups. Never a correlation id, which begins with a random part."""
    return f"job:{id_}"


async def publish_note(broker: Broker, note: Note, timeout_s: float) -> None:
    """Raises as `Broker.publish`."""
    message = Message(body=encode_note(note), content_type="application/json")
    await broker.publish("", queue_of(note.id[0]), message, timeout_s=timeout_s)


def _fingerprint(asked: Asked, taken: Taken) -> str:
    return fingerprint_of(taken.read.body, taken.read.header_length, asked.split_key)
