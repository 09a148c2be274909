"""The worker's spans: each request from its receipt to its reply, below whatever sent it, and in it
what it waited for and the batch in which it ran (docs/tracing.md)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from services.worker.items import Held
from shared.broker.port import Delivery
from shared.names import ModelId, split_model_id
from shared.tracing import Span, Tracing


class Spans:
    """Made only where traces are on."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def received(self, delivery: Delivery, model: ModelId) -> Span:
        """A request came. Its span ends when its message is settled."""
        name, version = split_model_id(model)
        message = delivery.message
        return self._tracing.begin(
            f"process {delivery.queue}",
            "consumer",
            message.headers,
            {
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": delivery.queue,
                "messaging.message.conversation_id": message.correlation_id or "",
                "messaging.message.body.size": len(message.body),
                "roost.model.name": name,
                "roost.model.version": version,
                "roost.redelivered": delivery.redelivered,
            },
        )

    def ran(self, requests: Sequence[Held], rows: int, *, compute_s: float) -> None:
        """These ran together, and the answer of the device has just come.

        Each trace gets its own span of the batch, or nobody could see in it what the request
        took. That of the first is linked to all the others' requests, and theirs to it."""
        now, wall = time.monotonic(), time.time()
        began = wall - compute_s
        seen = [held for held in requests if held.span is not None and held.span.recording]
        first: Span | None = None
        for held in seen:
            arrived = min(wall - (now - held.item.arrived), began)
            self._tracing.begin("queue", "internal", held.span, {}, at=arrived).end(began)
            links = [other.span for other in seen if other is not held and other.span is not None]
            batch = self._tracing.begin(
                "batch",
                "internal",
                held.span,
                {
                    "roost.batch.requests": len(requests),
                    "roost.batch.rows": rows,
                    "roost.request.rows": held.item.rows,
                    "roost.compute.seconds": compute_s,
                },
                at=began,
                links=links if first is None else [first],
            )
            batch.end(wall)
            first = first or batch

    def replying(self, held: Held) -> Span | None:
        """What becomes of the request is decided: its answer is sent, and its message settled."""
        if held.span is None or not held.span.recording:
            return None
        return self._tracing.begin(
            "send reply",
            "producer",
            held.span,
            {
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": held.delivery.message.reply_to or "",
            },
        )
