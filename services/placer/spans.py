"""The placer's span: a request that fell through, until its model's queue has it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec

from shared.broker.port import Delivery, Message
from shared.errors import RoostError
from shared.names import UNROUTED
from shared.tracing import Tracing, current, serving

_SHOWN_CHARS = 200


@contextlib.contextmanager
def placing(tracing: Tracing, delivery: Delivery) -> Iterator[Message]:
    """Gives the message as it goes on: whoever takes it continues below this span."""
    span = tracing.begin(
        "place",
        "consumer",
        delivery.message.headers,
        {
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "place",
            "messaging.operation.type": "process",
            "messaging.destination.name": UNROUTED,
            "messaging.rabbitmq.destination.routing_key": delivery.routing_key[:_SHOWN_CHARS],
            "messaging.message.conversation_id": delivery.message.correlation_id or "",
        },
    )
    headers = {**delivery.message.headers, **span.headers()}
    with serving(span):
        yield msgspec.structs.replace(delivery.message, headers=headers)


def failed(error: RoostError) -> None:
    """The request is answered with this error, and does not go on."""
    span = current()
    if span is not None:
        span.fail(error.code, error.message)
