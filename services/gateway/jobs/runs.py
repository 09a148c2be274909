"""Gives waiting jobs their turns: each is an inference request whose client is a file.

A turn asks the model as any request does, so jobs stand behind the same admission, deadlines and
redelivery, and in a model's queue there are never more of them than `job_prefetch` per gateway:
a request that somebody waits for does not stand behind a night's work. The note of a job is
acknowledged when the job has ended, or when the note for its next turn is queued.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import structlog

from services.gateway.asked import Read
from services.gateway.body import ClientGone, Held
from services.gateway.callers import Callers, asked_by
from services.gateway.config import GatewayConfig
from services.gateway.core.jobkeys import Claim
from services.gateway.core.jobs import (
    SHARDS,
    Again,
    Ended,
    Job,
    JobNotFound,
    Note,
    State,
    after_error,
    body_of,
    decode_note,
    ended,
    expired,
    queue_of,
    superseded,
)
from services.gateway.hangup import watching_for_hangup
from services.gateway.infer import Inference, Replied
from services.gateway.jobs.clock import now_ms
from services.gateway.jobs.files import Broken, JobFiles
from services.gateway.jobs.jobs import cancel_name, publish_note
from services.gateway.jobs.keys import JobKeys
from services.gateway.metrics import Metrics
from services.gateway.rpc import Rpc
from shared import v2
from shared.broker.port import Broker, BrokerUnavailable, Consumer, Delivery, QueueMissing
from shared.cancels import CancelledRequests
from shared.errors import Internal, InvalidRequest, RoostError, Unavailable, from_code
from shared.models import Manifest
from shared.names import (
    HEADER_BATCH,
    HEADER_COMPUTE_US,
    HEADER_LENGTH,
    HEADER_QUEUE_US,
    HEADER_RETRYABLE,
)
from shared.store.port import TOPIC_CANCELLED, Store
from shared.supervise import Backoff

log = structlog.get_logger(__name__)

LEVEL: Final = 9
"""The least urgent of the protocol's levels, for a job that names none itself."""
_KEPT_HEADERS: Final = (HEADER_LENGTH, HEADER_QUEUE_US, HEADER_COMPUTE_US, HEADER_BATCH)
"""Of a reply: what an answer over HTTP tells."""
_YOUNG_MS: Final = 60_000
_TROUBLE_S: Final = 2.0
"""Before a note goes back to its queue because files or broker are away."""


class JobAsked:
    """An `Asked` whose client is a job's file."""

    def __init__(self, job: Job, files: JobFiles, correlation_id: str) -> None:
        self.name = job.model
        self.version = job.version
        # All its turns ask the same version of a split.
        self.split_key = job.split_key or job.id
        self.correlation_id = correlation_id
        self.tenant = ""  # a tenant's places are for what it waits for
        self.job = job
        self.cancelled = asyncio.Event()
        self._files = files

    async def read(self, manifest: Manifest, held: Held) -> Read:  # noqa: ARG002
        job = self.job
        held.grow(job.nbytes)
        body = await asyncio.to_thread(self._files.request, job.id)
        if body is None:
            raise ClientGone
        request = v2.decode_request(body, job.header_length)
        return Read(
            request=request,
            body=body,
            header_length=job.header_length,
            remaining_s=(job.deadline_ms - now_ms()) / 1000,
            traceparent=job.traceparent,
            tracestate=job.tracestate,
            level=LEVEL,
        )

    def watched(self) -> AbstractAsyncContextManager[None]:
        return watching_for_hangup(self._gone)

    async def _gone(self) -> dict[str, Any]:
        await self.cancelled.wait()
        return {"type": "http.disconnect"}


class JobRuns:
    def __init__(
        self,
        config: GatewayConfig,
        inference: Inference,
        broker: Broker,
        rpc: Rpc,
        store: Store,
        files: JobFiles,
        metrics: Metrics,
        callers: Callers,
    ) -> None:
        self._callers = callers
        self._config = config
        self._inference = inference
        self._broker = broker
        self._rpc = rpc
        self._store = store
        self._files = files
        self._keys = JobKeys(files, config.job_keep_s)
        self._metrics = metrics
        self._running: dict[str, JobAsked | None] = {}
        """By id; None before its request is sent, and while it waits for another turn."""
        self._turns: set[asyncio.Task[None]] = set()
        self._consumers: dict[str, Consumer] = {}
        self._stopping = False
        metrics.running_jobs.set_function(lambda: len(self._running))

    # --- the eternal tasks ------------------------------------------------------------------

    async def keep_queues(self) -> None:
        """Declares and consumes the job queues, each again whenever it is lost. Never returns."""
        async with asyncio.TaskGroup() as group:
            for shard in range(SHARDS):
                group.create_task(self._keep(queue_of(str(shard))), name=f"jobs {shard}")

    async def _keep(self, queue: str) -> None:
        backoff = Backoff()
        while True:
            gone = asyncio.Event()
            try:
                await self._broker.declare_queue(queue)
                if self._config.job_prefetch:
                    self._consumers[queue] = await self._broker.consume(
                        queue,
                        self._on_note,
                        prefetch=self._config.job_prefetch,
                        on_gone=gone.set,
                    )
            except (BrokerUnavailable, QueueMissing) as error:
                log.info("job_queue_unavailable", queue=queue, error=str(error))
                await asyncio.sleep(backoff.next())
                continue
            backoff.reset()
            await gone.wait()
            self._consumers.pop(queue, None)
            log.warning("job_queue_lost", queue=queue)

    async def listen(self) -> None:
        """Hears which jobs were cancelled, by whatever gateway. Never returns."""
        async for data in self._store.notes(TOPIC_CANCELLED):
            names = set(CancelledRequests().note(data, now_ms()))
            for id_, asked in self._running.items():
                if asked is not None and cancel_name(id_) in names:
                    asked.cancelled.set()

    async def leave(self) -> None:
        """Takes no more jobs. What has its turn goes on with it."""
        self._stopping = True
        consumers = list(self._consumers.values())
        await asyncio.gather(*(consumer.cancel() for consumer in consumers))

    async def close(self) -> None:
        """Gives back what is under way: other gateways go on with it."""
        await self.leave()
        for task in self._turns:
            task.cancel()
        if self._turns:
            await asyncio.wait(set(self._turns))
        for consumer in list(self._consumers.values()):
            await consumer.close()

    # --- one note ---------------------------------------------------------------------------

    def _on_note(self, delivery: Delivery) -> None:
        if not self._stopping:
            task = asyncio.create_task(self._settle(delivery), name="job")
            self._turns.add(task)
            task.add_done_callback(self._turns.discard)

    async def _settle(self, delivery: Delivery) -> None:
        """Has the job's turn, and answers the delivery whatever comes of it."""
        try:
            note = decode_note(delivery.message.body)
        except (InvalidRequest, JobNotFound) as error:
            log.warning("job_note_malformed", error=str(error))
            await self._or_back(delivery, delivery.dead_letter(f"no job: {error}"))
            return
        if note.id in self._running:
            # Queued twice. The note that is having its turn stays until the job's end.
            await delivery.ack()
            return
        await self._or_back(delivery, self._serve(delivery, note))

    async def _or_back(self, delivery: Delivery, doing: Awaitable[None]) -> None:
        """The note goes back to its queue when files or broker are away."""
        try:
            await doing
        except RoostError as error:
            log.warning("job_put_back", error=str(error), code=error.code)
        except Exception:
            log.exception("job_put_back")
        else:
            return
        await asyncio.sleep(_TROUBLE_S)
        await delivery.requeue()

    async def _serve(self, delivery: Delivery, note: Note) -> None:
        next_ = None
        self._running[note.id] = None
        try:
            job = await asyncio.to_thread(self._begin, note.id)
            if job is not None:
                next_ = await self._turn(job, note)
            if next_ is not None:
                await asyncio.sleep(next_.after_s)
        finally:
            del self._running[note.id]  # first: the next note may be here before this is done
        if next_ is not None:
            await publish_note(self._broker, next_.note, self._config.publish_timeout_s)
        await delivery.ack()

    def _begin(self, id_: str) -> Job | None:
        try:
            job = self._files.waiting(id_)
        except Broken:
            self._files.remove(id_)  # it can never run; the log has it
            return None
        if job is None or not self._has_its_key(job):
            return None
        if now_ms() - job.created_ms > _YOUNG_MS:
            self._files.touch(id_)  # else another gateway may take it for lost
        return job

    def _has_its_key(self, job: Job) -> bool:
        """A job may be here before who stored it knows that its key is another's; or who stored it
        died, and the client came again."""
        if not job.key:
            return True
        holder = self._keys.claim(job.key, Claim(job.id, job.fingerprint))
        if holder.id == job.id:
            return True
        log.info("job_superseded", job=job.id, by=holder.id)
        self._files.end(superseded(job, holder.id, now_ms()), b"")
        return False

    async def _turn(self, job: Job, note: Note) -> Again | None:
        """Asks the model. None when the job has ended, one way or another."""
        if now_ms() >= job.deadline_ms:
            await self._end(expired(job, now_ms()))
            return None
        asked = self._running[job.id] = JobAsked(job, self._files, self._rpc.new_id())
        try:
            with asked_by(self._callers.for_job(job.tenant)):
                replied = await self._inference.answer(asked)
            error = _passing(replied)
        except ClientGone:
            return None  # cancelled: whoever did that has ended it
        except RoostError as raised:
            replied, error = None, raised
        except Exception:
            log.exception("job_failed", job=job.id, model=job.model)
            replied, error = None, Internal("internal error; the gateway's log has it")
        finally:
            self._running[job.id] = None
        if error is None:
            assert replied is not None, "no error, so there is a reply"
            await self._keep_answer(job, replied)
            return None
        chance = random.random()  # noqa: S311  (spreads load, guards no secret)
        next_ = after_error(note, job, error, now_ms=now_ms(), chance=chance)
        if isinstance(next_, Again):
            log.info("job_waits", job=job.id, model=job.model, code=error.code, error=str(error))
            return next_
        if next_.state == "failed" and replied is not None:
            await self._keep_answer(job, replied)
        else:
            await self._end(next_, v2.error_body(str(error)) if next_.state == "failed" else None)
        return None

    async def _keep_answer(self, job: Job, replied: Replied) -> None:
        body, told = replied.message.body, replied.message.headers
        headers = {k: v for k in _KEPT_HEADERS if isinstance(v := told.get(k), int)}
        ok = replied.code == "ok"
        error = None if ok else v2.error_message(body)
        state: State = "succeeded" if ok else "failed"
        end = ended(job, state, now_ms(), replied.code, headers=headers, error=error)
        await self._end(end, body)

    async def _end(self, end: Ended, body: bytes | None = None) -> None:
        body = body_of(end) if body is None else body
        backoff = Backoff(0.5, 10.0)
        while True:
            try:
                first = await asyncio.to_thread(self._files.end, end, body)
                break
            except Unavailable as error:
                # The answer is worth keeping: a second run would cost a device.
                if now_ms() >= end.job.deadline_ms + 60_000:
                    raise
                log.warning("job_end_waits", job=end.job.id, error=str(error))
                await asyncio.sleep(backoff.next())
        if first:
            self._metrics.job(end.state)


def _passing(replied: Replied) -> RoostError | None:
    """The error of a reply after which another try is worth it."""
    if replied.code == "ok" or not replied.message.headers.get(HEADER_RETRYABLE):
        return None
    said = v2.error_message(replied.message.body) or replied.code
    error = from_code(replied.code, said)
    error.retry_after_s = replied.retry_after_s
    return error if error.retryable else None
