"""The broker: one queue for each model, and who consumes it.

First in, first out; what comes back goes to its old place. Consumers are served in turn, each up
to its prefetch. Laws: a request is in a queue, with one consumer, or ended; nothing is lost.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from shared.names import ModelId


class Consumer:
    """One subscription of one worker."""

    __slots__ = (
        "deliver", "ended", "model", "number", "on", "prefetch", "queue", "unacked", "waits",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        queue: Queue,
        prefetch: int,
        deliver: Callable[[Consumer, int], None],
    ) -> None:
        """`number`: of the subscription, as the worker's core has it."""
        self.number = number
        self.model = queue.model
        self.queue = queue
        self.prefetch = prefetch
        self.deliver = deliver
        self.unacked: set[int] = set()
        self.on = False
        """The broker may deliver."""
        self.ended = False
        self.waits = False
        """It stands in the queue's line of those that can take something."""


class Queue:
    """What waits for one model."""

    __slots__ = ("consumers", "line", "model", "ready")

    def __init__(self, model: ModelId) -> None:
        self.model = model
        self.ready: deque[int] = deque()
        """Requests by number, which is the order of their arrival."""
        self.line: deque[Consumer] = deque()
        self.consumers = 0


class Broker:
    def __init__(self, models: Iterable[ModelId], expired: Callable[[int], bool]) -> None:
        """`expired` says whether a request's time is over, and ends it then: the broker drops
        it."""
        self.queues = [Queue(model) for model in models]
        self._by_name = {queue.model: queue for queue in self.queues}
        self._expired = expired

    def __repr__(self) -> str:
        return f"<Broker ready={sum(len(queue.ready) for queue in self.queues)}>"

    def publish(self, queue: Queue, request: int) -> None:
        if queue.line and not queue.ready:
            self._deliver(queue, request)
        else:
            queue.ready.append(request)

    def consumer(
        self, number: int, model: ModelId, prefetch: int, deliver: Callable[[Consumer, int], None]
    ) -> Consumer:
        """One that is to be begun."""
        return Consumer(number, self._by_name[model], prefetch, deliver)

    def begin(self, consumer: Consumer) -> None:
        """Unless it was cancelled before."""
        if consumer.ended:
            return
        consumer.on = True
        consumer.queue.consumers += 1
        self._stand(consumer)
        self._serve(consumer.queue)

    def cancel(self, consumer: Consumer) -> None:
        """It gets nothing more, and keeps what it holds."""
        consumer.ended = True
        if consumer.on:
            consumer.on = False
            consumer.queue.consumers -= 1
            if consumer.waits:
                consumer.waits = False
                consumer.queue.line.remove(consumer)

    def acknowledge(self, consumer: Consumer, requests: Iterable[int]) -> None:
        consumer.unacked.difference_update(requests)
        self._freed(consumer)

    def requeue(self, consumer: Consumer, requests: Iterable[int]) -> None:
        """To where they stood."""
        ready = consumer.queue.ready
        for request in sorted(requests, reverse=True):
            consumer.unacked.discard(request)
            if not ready or request < ready[0]:
                ready.appendleft(request)
            else:
                insort(ready, request)
        self._freed(consumer)

    def close(self, consumer: Consumer) -> None:
        """Its connection is gone: what it holds goes back."""
        self.cancel(consumer)
        self.requeue(consumer, list(consumer.unacked))

    def depths(self) -> Mapping[ModelId, int]:
        """Ready messages of every queue, as of when they are asked for."""
        return _Depths(self._by_name)

    # --- parts ------------------------------------------------------------------------------

    def _freed(self, consumer: Consumer) -> None:
        self._stand(consumer)
        if consumer.queue.ready:
            self._serve(consumer.queue)

    def _stand(self, consumer: Consumer) -> None:
        if consumer.on and not consumer.waits and len(consumer.unacked) < consumer.prefetch:
            consumer.waits = True
            consumer.queue.line.append(consumer)

    def _serve(self, queue: Queue) -> None:
        while queue.ready and queue.line:
            request = queue.ready.popleft()
            if not self._expired(request):
                self._deliver(queue, request)

    def _deliver(self, queue: Queue, request: int) -> None:
        consumer = queue.line.popleft()
        consumer.unacked.add(request)
        if len(consumer.unacked) < consumer.prefetch:
            queue.line.append(consumer)
        else:
            consumer.waits = False
        consumer.deliver(consumer, request)


class _Depths(Mapping[ModelId, int]):
    def __init__(self, queues: Mapping[ModelId, Queue]) -> None:
        self._queues = queues

    def __getitem__(self, model: ModelId) -> int:
        return len(self._queues[model].ready)

    def __iter__(self) -> Iterator[ModelId]:
        return iter(self._queues)

    def __len__(self) -> int:
        return len(self._queues)
