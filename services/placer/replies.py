"""What the placer answers by itself: errors, to whoever may be answered."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import msgspec
import structlog

from services.placer.metrics import Metrics
from shared import names, packs, v2
from shared.broker.port import Broker, Delivery, Message, Unroutable
from shared.errors import STATUS, DeadlineExceeded, RoostError

log = structlog.get_logger(__name__)

_REPLY_TTL_MS = 60_000
"""An answer that nobody fetched within this long is not waited for."""


def error_reply(request: Message, error: RoostError) -> Message:
    """The reply that tells `error` to whoever sent `request`."""
    return Message(
        body=v2.error_body(error.message),
        headers={
            names.HEADER_CODE: error.code,
            names.HEADER_STATUS: STATUS.get(error.code, 500),
            names.HEADER_RETRYABLE: error.retryable,
        },
        correlation_id=request.correlation_id,
        content_type="application/json",
        expiration_ms=_REPLY_TTL_MS,
        persistent=request.persistent,
    )


async def answer(broker: Broker, delivery: Delivery, error: RoostError, metrics: Metrics) -> None:
    """Answers the request with `error` and acknowledges it; of a pack every member. One that
    names no queue to which it may be answered becomes a dead letter, and so does what only calls
    itself a pack. Raises `BrokerUnavailable`, `PublishUncertain`: then it is neither."""
    request = delivery.message
    if not request.reply_to or not names.reply_to_allowed(request.reply_to):
        said = "no reply_to" if not request.reply_to else "reply_to is not a reply queue"
        await delivery.dead_letter(f"{said}; {error.code}: {error.message}")
        metrics.malformed.inc()
        return
    try:
        requests = packs.members(request) if packs.is_pack(request) else [request]
    except packs.BadPack as bad:
        await delivery.dead_letter(f"malformed pack: {bad}; {error.code}: {error.message}")
        metrics.malformed.inc()
        return
    direct = request.reply_to.startswith(names.DIRECT_REPLY_PREFIX)
    try:
        for reply in _error_replies(requests, error):
            # RabbitMQ before 4.2 returns mandatory direct replies although it delivers them.
            await broker.publish("", request.reply_to, reply, mandatory=not direct)
    except Unroutable:
        log.info("reply_queue_gone", reply_to=request.reply_to, code=error.code)
    except RoostError as refused:
        if refused.code != "resource_exhausted":
            raise
        log.warning("reply_queue_full", reply_to=request.reply_to, code=error.code)
    metrics.answered.labels(error.code).inc(len(requests))
    await delivery.ack()


def _error_replies(requests: Sequence[Message], error: RoostError) -> list[Message]:
    """To all of them; in one message if the asker reads such."""
    replies = [error_reply(request, error) for request in requests]
    if all(request.headers.get(names.HEADER_PACKS) is True for request in requests):
        return [packs.pack(replies)]
    return replies


def deadline_ms(message: Message) -> int | None:
    """The absolute deadline, Unix time in ms; None when there is none that can be read."""
    told = message.headers.get(names.HEADER_DEADLINE)
    if isinstance(told, str | bytes):
        digits = told.decode("ascii", "replace") if isinstance(told, bytes) else told
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 15):
            return None
        return int(digits)
    if isinstance(told, bool) or not isinstance(told, int | float) or not math.isfinite(told):
        return None
    return int(told)


def check_deadline(message: Message) -> None:
    """Raises `DeadlineExceeded` when it is too late for an answer."""
    deadline = deadline_ms(message)
    if deadline is not None and time.time() * 1000 >= deadline:
        raise DeadlineExceeded("the request's deadline passed before its model was ready")


def forwarded(message: Message) -> Message:
    """The message as it goes on to its model's queue: with what remains of its time."""
    deadline = deadline_ms(message)
    headers = dict(message.headers)
    if message.message_id is not None:
        headers.setdefault(names.HEADER_CLIENT_MESSAGE_ID, message.message_id)
    remaining = message.expiration_ms
    if deadline is not None:
        left = max(math.ceil(deadline - time.time() * 1000), 1)
        remaining = left if remaining is None else min(left, remaining)
    return msgspec.structs.replace(message, headers=headers, expiration_ms=remaining)
