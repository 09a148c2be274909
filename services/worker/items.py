"""Requests as they arrive: bytes and properties into what the core decides about.

Whatever stands in a message ends in one of three ways: a request to run, a `Fault` to answer
with, or a reason why nobody can be answered. Nothing here raises for a message's content.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from services.worker.columns import length_of
from services.worker.core.events import Fault, Item, ItemArrived, Kind
from shared.broker.port import Delivery, Message
from shared.cancels import CancelledRequests
from shared.errors import InvalidRequest, RoostError
from shared.models import ModelSpec, Padding
from shared.names import HEADER_DEADLINE, HEADER_LENGTH, ModelId, reply_to_allowed
from shared.tensors import Tensor
from shared.tracing import Span
from shared.v2 import (
    InferRequest,
    check_inputs,
    decode_request,
    parse_header_length,
    priority,
    priority_level,
    timeout_us,
)

_NO_CORRELATION: Final = "no correlation_id"
_ORDINARY_LEVEL: Final = 5
"""Of a request that names no priority, where the model says nothing of it: the middle of nine."""
_MOST_LEVELS: Final = 9
"""That a request may be above or below an ordinary one."""


@dataclass(slots=True)
class Held:
    """One message that we took and have not answered."""

    item: Item
    delivery: Delivery
    request: InferRequest
    fault: Fault | None = None
    """What is wrong with it; told to the asker, where there is one, even when it is buried."""
    span: Span | None = None
    """Of its processing, where traces are on."""


class Items:
    """What is held, by the core's number for it."""

    def __init__(self) -> None:
        self.cancelled = CancelledRequests()
        """Told by the gateways; what is in it is refused on arrival."""
        self.received: Callable[[Delivery, ModelId], Span] | None = None
        """Begins a request's span, where traces are on."""
        self._held: dict[int, Held] = {}
        self._numbers: Iterator[int] = itertools.count(1)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, item: int) -> Held:
        return self._held[item]

    def request_ids(self, items: Iterable[int]) -> list[str | None]:
        """Of those that are held."""
        return [self._held[i].delivery.message.correlation_id for i in items if i in self._held]

    def of_requests(self, correlation_ids: Collection[str]) -> list[int]:
        """The items that are held of these requests."""
        return [
            item
            for item, held in self._held.items()
            if held.delivery.message.correlation_id in correlation_ids
        ]

    def settled(self, item: int) -> None:
        self._held.pop(item, None)

    def take(
        self,
        delivery: Delivery,
        model: ModelId,
        subscription: int,
        spec: ModelSpec,
        *,
        now: float,
        wall: float,
    ) -> ItemArrived:
        """Reads a delivery and keeps it. `now` is monotonic, `wall` Unix time, in seconds."""
        message = delivery.message
        unanswerable = _unanswerable(delivery)
        request, rows, deadline, fault = InferRequest(), 1, None, None
        kind: Kind = ()
        length = urgency = 0
        if unanswerable is None:
            try:
                request = decode_request(
                    message.body, parse_header_length(message.headers.get(HEADER_LENGTH))
                )
                deadline = _deadline(message, request, now, wall)
                rows = check_inputs(request, spec)
                kind = _kind(request, spec)
                length = length_of(request, spec.padding) if spec.padding is not None else 0
                urgency = _urgency(message, request, spec)
            except RoostError as error:
                fault = Fault(error.code, str(error))
        elif unanswerable == _NO_CORRELATION:
            # Which of its requests it was we cannot tell the asker, but that there was one.
            fault = Fault("invalid_argument", "a request needs a correlation_id")
        if fault is None and deadline is not None and deadline <= now:
            fault = Fault("deadline_exceeded", "its deadline had passed when it arrived")
        elif fault is None and self.cancelled and message.correlation_id in self.cancelled:
            fault = Fault("deadline_exceeded", "its client had hung up when it arrived")
        item = Item(
            item=next(self._numbers),
            model=model,
            subscription=subscription,
            rows=rows,
            kind=kind,
            nbytes=max(sum(len(t.data) for t in request.inputs), len(message.body)),
            arrived=now,
            deadline=deadline,
            priority=urgency,
            length=length,
        )
        span = None if self.received is None else self.received(delivery, model)
        self._held[item.item] = Held(item, delivery, request, fault, span)
        return ItemArrived(item, fault, unanswerable)


def _unanswerable(delivery: Delivery) -> str | None:
    message = delivery.message
    if delivery.malformed is not None:
        return f"malformed properties: {delivery.malformed}"
    if not message.reply_to:
        return "no reply_to"
    if not reply_to_allowed(message.reply_to):
        return "reply_to is not a reply queue"
    if not message.correlation_id:
        return _NO_CORRELATION
    return None


def _deadline(message: Message, request: InferRequest, now: float, wall: float) -> float | None:
    """On our monotonic clock: the header's, or the request's own time-out from its arrival,
    whichever is sooner."""
    deadlines: list[float] = []
    header = message.headers.get(HEADER_DEADLINE)
    if header is not None:
        if isinstance(header, bool) or not isinstance(header, int | float | str):
            raise InvalidRequest(f"{HEADER_DEADLINE} must be Unix time in milliseconds")
        try:
            at = float(header) / 1e3
        except (ValueError, OverflowError):
            at = math.nan
        if not math.isfinite(at):
            raise InvalidRequest(f"{HEADER_DEADLINE} must be Unix time in milliseconds")
        deadlines.append(now + at - wall)
    timeout = timeout_us(request.parameters)
    if timeout is not None:
        deadlines.append(now + timeout / 1e6)
    return min(deadlines, default=None)


def _kind(request: InferRequest, spec: ModelSpec) -> Kind:
    if not spec.max_batch_size:
        return ()
    if spec.padding is None:
        return tuple(sorted((t.name, t.datatype, t.shape[1:]) for t in request.inputs))
    padding = spec.padding
    return tuple(sorted((t.name, t.datatype, _padded_shape(t, padding)) for t in request.inputs))


def _padded_shape(tensor: Tensor, padding: Padding) -> tuple[int, ...]:
    dimension = padding.inputs.get(tensor.name)
    if dimension is None:
        return tensor.shape[1:]
    return (*tensor.shape[1 : dimension + 1], -1, *tensor.shape[dimension + 2 :])


def _urgency(message: Message, request: InferRequest, spec: ModelSpec) -> int:
    """Levels above an ordinary request of the model. What stands in the request itself counts
    before the message's property, which a gateway derives from it."""
    level = priority(request.parameters) or priority_level(message.priority)
    if not level:
        return 0
    ordinary = spec.default_priority_level or _ORDINARY_LEVEL
    return max(-_MOST_LEVELS, min(ordinary - level, _MOST_LEVELS))
