"""Answers: published to the asker's reply queue, and only then acknowledged.

What happens when publishing fails decides whether a request is lost. An asker whose queue is
gone needs no answer (dropped, counted). While the broker takes nothing, or does not say whether
it did, the answer is kept and sent again: askers match replies by id, and computing it once more
would not help. Only when nobody waits any longer, or the worker stops, is the request given back.

Answers of one turn of the event loop to one asker travel in one message, if the asker has said
that it reads such (shared/packs.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final

import structlog

from services.worker.core.events import Fault
from services.worker.items import Held
from services.worker.metrics import Metrics
from services.worker.spans import Spans
from shared import packs
from shared.broker.port import Broker, HeaderValue, Message, QueueFull, Unroutable
from shared.errors import STATUS, RoostError, TooLarge, Unavailable, from_code
from shared.logs import bound
from shared.names import (
    DIRECT_REPLY_PREFIX,
    HEADER_BATCH,
    HEADER_CODE,
    HEADER_COMPUTE_US,
    HEADER_LENGTH,
    HEADER_PACKS,
    HEADER_QUEUE_US,
    HEADER_RETRYABLE,
    HEADER_STATUS,
    reply_to_allowed,
)
from shared.supervise import Backoff
from shared.tensors import Tensor
from shared.v2 import encode_response, error_body

log = structlog.get_logger(__name__)

_PATIENCE_S: Final = 30.0
"""For a broker that takes nothing, when the request has no deadline or it has passed already."""


class Replier:
    """Sends answers in tasks of its own; `settled` is called once per item, at its end."""

    def __init__(
        self,
        broker: Broker,
        settled: Callable[[int], None],
        metrics: Metrics,
        *,
        timeout_s: float,
        patience_s: float = _PATIENCE_S,
        spans: Spans | None = None,
    ) -> None:
        """`timeout_s`: for the broker to confirm one try. `patience_s`: for all of them."""
        self._broker = broker
        self._settled = settled
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._spans = spans
        self._hurried = asyncio.Event()
        self._away = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: dict[str, _Answers] = {}
        """By the queue they go to; until the loop's next turn."""

    # --- the four ends of an item ---------------------------------------------------------

    def answer(
        self,
        held: Held,
        outputs: Sequence[Tensor],
        *,
        queue_s: float,
        compute_s: float,
        batch_rows: int,
    ) -> None:
        """The outputs are copied before this returns."""
        name, _, version = held.item.model.rpartition("/")  # checked when it was assigned
        request = held.request
        try:
            body, length = encode_response(name, version, request.id, outputs, request)
        except RoostError as error:
            self.refuse(held, Fault(error.code, str(error)))
            return
        headers: dict[str, HeaderValue] = {
            HEADER_CODE: "ok",
            HEADER_STATUS: 200,
            HEADER_QUEUE_US: int(queue_s * 1e6),
            HEADER_COMPUTE_US: int(compute_s * 1e6),
            HEADER_BATCH: batch_rows,
        }
        if length is not None:
            headers[HEADER_LENGTH] = length
        self._metrics.answered(
            held.item,
            queue_s=queue_s,
            compute_s=compute_s,
            now=time.monotonic(),
            late=_late(held),
        )
        self._send(held, body, headers)

    def refuse(self, held: Held, fault: Fault) -> None:
        self._refused(held, fault.code, late=_late(held))
        self._send(held, error_body(fault.message), _headers(fault))

    def give_back(self, held: Held) -> None:
        self._begin([held], held.delivery.requeue())

    def bury(self, held: Held, reason: str, fault: Fault | None) -> None:
        """A dead letter first: if that fails, the message goes back, and nobody was told."""
        code = fault.code if fault else "dead_lettered"
        self._refused(held, code, late=False)
        with _bound(held):
            log.warning("dead_lettered", reason=reason)
        self._begin([held], self._bury(held, reason, fault))

    def _refused(self, held: Held, code: str, *, late: bool) -> None:
        asked = held.delivery.message.correlation_id
        self._metrics.refused(held.item.model, code, asked, late=late)
        if held.span is not None:
            held.span.fail(code, held.fault.message if held.fault else "")

    def hurry(self) -> None:
        """The worker stops: what cannot be sent now is for another one."""
        self._hurried.set()

    async def drained(self) -> None:
        """Returns when nothing is being sent."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # --- how ------------------------------------------------------------------------------

    def _send(self, held: Held, body: bytes, headers: dict[str, HeaderValue]) -> None:
        asked = held.delivery.message
        reply_to = asked.reply_to
        assert reply_to is not None, "who cannot be answered is buried"
        together = asked.headers.get(HEADER_PACKS) is True
        answers = self._gathering.get(reply_to) if together else None
        if answers is None or not answers.has_room(len(body)):
            answers = _Answers(reply_to)
            if together:
                self._gathering[reply_to] = answers
            self._begin(answers.held, self._reply(answers))
        answers.add(held, _message(held, body, headers))

    def _begin(self, held: list[Held], sending: Coroutine[Any, Any, None]) -> None:
        """Begins in the loop's next turn: until then more may be added."""
        task = asyncio.create_task(self._settle(held, sending), name="reply")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, held: list[Held], sending: Coroutine[Any, Any, None]) -> None:
        spans = [] if self._spans is None else [self._spans.replying(each) for each in held]
        try:
            await sending
        except RoostError as error:
            self._metrics.reply_failures.labels(error.code).inc(len(held))
            with _bound(*held):
                log.warning("reply_failed", error=str(error))
            await _give_back(held)
        except Exception:
            with _bound(*held):
                log.exception("reply_failed")
            await _give_back(held)
        finally:
            for span in (*spans, *(each.span for each in held)):
                if span is not None:
                    span.end()
            for each in held:
                self._settled(each.item.item)

    async def _reply(self, answers: _Answers) -> None:
        if self._gathering.get(answers.reply_to) is answers:
            del self._gathering[answers.reply_to]
        held = answers.held
        self._metrics.replied(len(held))
        message = packs.pack(answers.messages)
        try:
            await self._patiently(held, lambda: self._publish(answers.reply_to, message))
        except TooLarge as error:
            for each in held:
                await self._tell(each, Fault(error.code, str(error)))
        except (Unroutable, QueueFull) as error:
            # Nobody reads there any more: neither would the answer of a second run be read.
            self._metrics.reply_failures.labels(type(error).__name__.lower()).inc(len(held))
            with _bound(*held):
                log.info("reply_unwanted", error=str(error))
        for each in held:
            await each.delivery.ack()

    async def _bury(self, held: Held, reason: str, fault: Fault | None) -> None:
        await self._patiently([held], lambda: held.delivery.dead_letter(reason))
        if fault is not None and reply_to_allowed(held.delivery.message.reply_to or ""):
            try:
                await self._tell(held, fault)
            except RoostError as error:
                with _bound(held):
                    log.info("reply_unwanted", error=str(error))

    async def _tell(self, held: Held, fault: Fault) -> None:
        message = _message(held, error_body(fault.message), _headers(fault))
        reply_to = held.delivery.message.reply_to or ""
        await self._patiently([held], lambda: self._publish(reply_to, message))

    async def _patiently(self, held: list[Held], send: Callable[[], Awaitable[None]]) -> None:
        """Sends, again and again while the broker is away. Raises its `Unavailable` once there
        is no point in waiting: until the last deadline, or for `patience_s` when that is no help
        (a request given back because its deadline passed comes back at once)."""
        began = time.monotonic()
        until = max(_until(each, began, self._patience_s) for each in held)
        backoff: Backoff | None = None
        while True:
            try:
                await send()
            except Unavailable as error:
                left = until - time.monotonic()
                if left <= 0 or self._hurried.is_set():
                    raise
                self._note_away(error)
            else:
                self._away = False
                return
            backoff = backoff or Backoff(0.05, 2.0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(backoff.next(), left)):
                    await self._hurried.wait()

    def _note_away(self, error: Unavailable) -> None:
        """Once per outage: every reply under way finds out by itself."""
        if not self._away:
            log.warning("replies_wait", error=str(error))
        self._away = True

    async def _publish(self, reply_to: str, reply: Message) -> None:
        await self._broker.publish(
            "",
            reply_to,
            reply,
            # A direct reply-to is no queue: the broker returns what it delivers there.
            mandatory=not reply_to.startswith(DIRECT_REPLY_PREFIX),
            timeout_s=self._timeout_s,
        )


class _Answers:
    """What goes to one asker in one message."""

    __slots__ = ("_nbytes", "held", "messages", "reply_to")

    def __init__(self, reply_to: str) -> None:
        self.reply_to = reply_to
        self.held: list[Held] = []
        self.messages: list[Message] = []
        self._nbytes = 0

    def has_room(self, nbytes: int) -> bool:
        return self._nbytes + nbytes <= packs.MAX_BYTES and len(self.held) < packs.MAX_MEMBERS

    def add(self, held: Held, message: Message) -> None:
        self.held.append(held)
        self.messages.append(message)
        self._nbytes += len(message.body)


async def _give_back(held: list[Held]) -> None:
    for each in held:
        await each.delivery.requeue()


def _until(held: Held, now: float, patience_s: float) -> float:
    deadline = held.item.deadline
    return deadline if deadline and deadline > now else now + patience_s


def _message(held: Held, body: bytes, headers: dict[str, HeaderValue]) -> Message:
    return Message(
        body=body,
        headers=headers,
        correlation_id=held.delivery.message.correlation_id,
        content_type="application/json"
        if HEADER_LENGTH not in headers
        else "application/octet-stream",
        # An answer is as durable as its request (docs/adr/0024).
        persistent=held.delivery.message.persistent,
    )


def _bound(*held: Held) -> contextlib.AbstractContextManager[None]:
    """Names the requests in what is logged inside. For the rare paths: it is not free."""
    ids = [each.delivery.message.correlation_id for each in held]
    return bound(model=held[0].item.model, request_id=ids[0] if len(ids) == 1 else ids)


def _headers(fault: Fault) -> dict[str, HeaderValue]:
    return {
        HEADER_CODE: fault.code,
        HEADER_STATUS: STATUS.get(fault.code, 500),
        HEADER_RETRYABLE: from_code(fault.code, "").retryable,
    }


def _late(held: Held) -> bool:
    return held.item.deadline is not None and time.monotonic() > held.item.deadline
