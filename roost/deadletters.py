"""Dead letters: what they are, and how they are looked at without being taken.

Whoever looks holds them unacknowledged meanwhile. What is not acknowledged goes back to its place
in the queue as the consumer ends, also when this process is killed: so a letter is never lost, and
one that was being replayed then may come twice. Letters that somebody else holds are not seen.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from shared import names, packs, v2
from shared.broker.port import Broker, Delivery, HeaderValue, Message
from shared.errors import Conflict, InvalidRequest, RoostError

MAX_LETTERS: Final = 65_535
"""A consumer's prefetch goes no further."""
_QUIET_S: Final = 2.0
"""When nothing more comes for so long, somebody else has the others."""
_SHOWN_CHARS: Final = 200
_DEAD_HEADERS: Final = frozenset(
    {
        names.HEADER_DEAD_REASON,
        names.HEADER_DEAD_QUEUE,
        names.HEADER_DEAD_ROUTING_KEY,
        names.HEADER_DEAD_AT,
    }
)


class Letter(msgspec.Struct, frozen=True, kw_only=True):
    """One dead letter, as its headers tell."""

    id: str
    """Of its content: the same at every look. Two that are the same have the same one."""
    reason: str
    queue: str
    """In which it died."""
    routing_key: str
    model: str
    """`<name>/<version>`, or only the name where that is all that is known, or nothing."""
    at: float | None
    """When it died, Unix time; None where nobody said."""
    delivery: Delivery

    @property
    def message(self) -> Message:
        return self.delivery.message

    def is_of(self, model: str) -> bool:
        """Whether it was for this model, or this version of it."""
        return self.model == model or self.model.startswith(f"{model}/")


@asynccontextmanager
async def held(broker: Broker, limit: int) -> AsyncIterator[tuple[list[Letter], int]]:
    """The oldest letters, `limit` at most, and how many there are. On the way out all go back to
    their places but those that were acknowledged. Raises `BrokerUnavailable`."""
    there = await broker.depth(names.DEAD) or 0
    wanted = min(there, limit, MAX_LETTERS)
    if not wanted:
        yield [], there
        return
    taken: list[Delivery] = []
    came = asyncio.Event()

    def take(delivery: Delivery) -> None:
        if len(taken) < wanted:  # what is acknowledged later makes room for further ones
            taken.append(delivery)
            came.set()

    consumer = await broker.consume(names.DEAD, take, prefetch=wanted)
    try:
        while len(taken) < wanted:
            came.clear()
            try:
                async with asyncio.timeout(_QUIET_S):
                    await came.wait()
            except TimeoutError:
                break
        yield [letter_of(delivery) for delivery in taken], there
    finally:
        await consumer.close()


def letter_of(delivery: Delivery) -> Letter:
    headers = delivery.message.headers
    queue, key = (
        _text(headers.get(name))
        for name in (names.HEADER_DEAD_QUEUE, names.HEADER_DEAD_ROUTING_KEY)
    )
    at = headers.get(names.HEADER_DEAD_AT)
    return Letter(
        id=_id(delivery.message),
        reason=_text(headers.get(names.HEADER_DEAD_REASON)),
        queue=queue,
        routing_key=key,
        model=_model(queue, key),
        at=at / 1000 if isinstance(at, int) and not isinstance(at, bool) else None,
        delivery=delivery,
    )


def original(letter: Letter) -> tuple[str, str, Message]:
    """Exchange, routing key and message, to be published again: without what was said of its
    death, and without its deadline, which has passed. Raises `Conflict` where it cannot be."""
    message = letter.message
    if names.HEADER_RAW_PROPERTIES in message.headers or letter.delivery.malformed:
        raise Conflict(f"{letter.id} came with properties that could not be read: they are lost")
    left = _DEAD_HEADERS | {names.HEADER_DEADLINE}
    headers = {name: value for name, value in message.headers.items() if name not in left}
    again = msgspec.structs.replace(message, headers=headers)
    if letter.queue.startswith(names.JOB_QUEUE_PREFIX):
        return "", letter.queue, again
    if letter.queue == names.UNROUTED and letter.routing_key:
        return names.INFER_EXCHANGE, letter.routing_key, again
    if letter.queue.startswith(names.MODEL_QUEUE_PREFIX) and letter.model:
        # What the placer had passed on bears the queue's name as its key.
        passed_on = letter.routing_key.startswith(names.MODEL_QUEUE_PREFIX)
        key = letter.model if passed_on or not letter.routing_key else letter.routing_key
        return names.INFER_EXCHANGE, key, again
    raise Conflict(f"{letter.id} died in {letter.queue or 'no queue'!r}, which has no requests")


def header_of(message: Message) -> Any:
    """The JSON of the request in it, without its tensors' values; a text where there is none."""
    if packs.is_pack(message):
        return f"a pack of {packs.count(message)} requests"
    told = message.headers.get(names.HEADER_LENGTH)
    try:
        length = v2.parse_header_length(told)
        if length == 0:
            return "one raw tensor and nothing else"
        return _without_data(msgspec.json.decode(message.body[:length]))
    except (RoostError, ValueError, RecursionError) as error:
        return f"no request that can be read: {clipped(str(error))}"


def properties_of(message: Message) -> dict[str, Any]:
    """Properties and headers, long values clipped."""
    told: dict[str, Any] = {
        "reply_to": message.reply_to,
        "correlation_id": message.correlation_id,
        "message_id": message.message_id,
        "content_type": message.content_type,
        "priority": message.priority,
        "headers": {name: _shown(value) for name, value in sorted(message.headers.items())},
    }
    return {name: _shown(value) for name, value in told.items() if value is not None}


def clipped(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _id(message: Message) -> str:
    # The dead headers are of it too: the same request that died twice is two letters.
    facts = (
        sorted((name, repr(value)) for name, value in message.headers.items()),
        message.correlation_id,
        message.reply_to,
    )
    digest = hashlib.sha256(msgspec.msgpack.encode(facts))
    digest.update(message.body)
    return digest.hexdigest()[:12]


def _model(queue: str, key: str) -> str:
    if queue.startswith(names.MODEL_QUEUE_PREFIX):
        name, _, version = queue.removeprefix(names.MODEL_QUEUE_PREFIX).rpartition(".")
        model = f"{name}/{version}"
    elif queue == names.UNROUTED:
        model = key
    else:
        return ""
    try:
        names.split_model_id(model) if "/" in model else names.check_name(model)
    except InvalidRequest:
        return ""
    return model


def _text(value: HeaderValue) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")


def _shown(value: object) -> object:
    if isinstance(value, bytes):
        return clipped(repr(value))
    return clipped(value) if isinstance(value, str) else value


def _without_data(value: object) -> object:
    if isinstance(value, Mapping):
        return {
            clipped(str(key)): _counted(item) if key == "data" else _without_data(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_data(item) for item in value]
    return _shown(value)


def _counted(data: object) -> str:
    return f"{len(data)} values" if isinstance(data, list) else "not shown"
