"""Makes the store and the broker follow what the placer wants. Every step may fail and is
simply taken again in the next cycle; nothing here decides.

The order keeps requests where somebody looks: routing keys lead to a queue only once a worker
is seen consuming it, and go before the last assignment of the model does; only an empty queue
of which no worker holds messages is deleted. Between the two, requests fall through to the
placer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar
from weakref import WeakValueDictionary

import structlog

from services.placer.knowledge import Knowledge
from services.placer.lease import Lease
from services.placer.metrics import Metrics
from services.placer.replies import answer
from shared.broker.port import Broker, Delivery, QueueMissing
from shared.control import Assigned, Assignment
from shared.errors import RoostError, Unavailable, from_code
from shared.names import ModelId, model_queue, split_model_id
from shared.store.port import Store, topic_assignment

log = structlog.get_logger(__name__)

Name = TypeVar("Name", bound=str)

_ANSWER_PREFETCH = 32
_ANSWER_IDLE_S = 0.2
_BROKER_TIMEOUT_S = 5.0
_AT_ONCE = 16
"""Models whose routes or queues are changed at the same time."""


class Applier:
    """Brings assignments, routes and queues in line with `Knowledge`."""

    def __init__(
        self, broker: Broker, store: Store, lease: Lease, knowledge: Knowledge, metrics: Metrics
    ) -> None:
        self._broker = broker
        self._store = store
        self._lease = lease
        self._knowledge = knowledge
        self._metrics = metrics
        self._written: dict[str, frozenset[ModelId]] = {}
        self._worker_locks: dict[str, asyncio.Lock] = {}
        self._model_locks: WeakValueDictionary[ModelId, asyncio.Lock] = WeakValueDictionary()

    def lock(self, model: ModelId) -> asyncio.Lock:
        """Held by whoever creates or deletes the model's queue."""
        lock = self._model_locks.get(model)
        if lock is None:
            lock = self._model_locks[model] = asyncio.Lock()
        return lock

    def forget_written(self, worker: str | None = None) -> None:
        """The store lost what was written for this worker, None for its whole content: that is
        to be written again."""
        if worker is None:
            self._written.clear()
        else:
            self._written.pop(worker, None)

    def adopted(self, worker: str, models: frozenset[ModelId]) -> None:
        """That is what stands in the store for this worker."""
        self._written[worker] = models

    async def follow(self) -> None:
        """One pass over everything that differs from what is wanted."""
        # 1. Assignments, with the routes of what loses its last binding taken away before.
        await self.write()
        # 2. Routes of what workers are seen to consume; of old defaults first of all.
        await self.route()
        # 3. Queues of what is not active any more.
        await self.retire()

    async def open_queue(self, model: ModelId) -> None:
        """Makes the model's queue exist, known to the store before it does. Raises
        `StoreUnavailable`, `BrokerUnavailable`."""
        await self._store.add_active(model)
        await self._broker.declare_queue(model_queue(model))

    async def write(self) -> None:
        for gone in self._written.keys() - self._knowledge.assigned.keys():
            del self._written[gone]
            self._worker_locks.pop(gone, None)
        await self._each(list(self._knowledge.assigned), self.write_one, "assignment")

    async def write_one(self, worker: str) -> None:
        """Writes the worker's assignment if it is not what stands in the store. Raises
        `Unavailable`."""
        lock = self._worker_locks.setdefault(worker, asyncio.Lock())
        async with lock:
            wanted = self._knowledge.assigned.get(worker)
            if wanted is None:
                return
            for model in self._written.get(worker, frozenset()) - wanted.keys():
                if not self._knowledge.copies(model):
                    await self._unroute(model)
            # Read after the awaits above: what was decided meanwhile goes along.
            wanted = self._knowledge.assigned.get(worker)
            if wanted is None or self._written.get(worker) == wanted.keys():
                return
            if not self._lease.valid:
                raise Unavailable("the lease is not held")
            models = frozenset(wanted)
            generation = self._knowledge.generations.get(worker, 0) + 1
            assignment = Assignment(
                worker=worker,
                fence=self._lease.fence,
                generation=generation,
                models=tuple(Assigned(m, b.reason) for m, b in wanted.items()),
            )
            if await self._store.put_assignment(assignment):
                self._knowledge.generations[worker] = generation
                self._written[worker] = models
                await self._store.hint(topic_assignment(worker))
            else:
                await self._overruled(worker)

    async def route(self) -> None:
        """Unbinds what must not lead to a queue any more, then binds what may."""
        changes = []
        for model, active in self._knowledge.active.items():
            if not active.declared:
                continue
            keys = self._routing_keys(model)
            if active.bound_keys != keys:
                changes.append(model)
        stuck = await self._each(changes, self._unbind_stale, "unbind")
        # A key that leads to two queues would have its requests answered twice.
        names = {split_model_id(model)[0] for model in stuck}
        free = [model for model in changes if split_model_id(model)[0] not in names]
        await self._each(free, self._bind_missing, "bind")

    async def retire(self) -> None:
        await self._each(list(self._knowledge.retiring), self._retire_one, "retire")

    # --- parts ------------------------------------------------------------------------------

    def _routing_keys(self, model: ModelId) -> set[str]:
        """Keys that should lead to the model's queue: none before somebody consumes it; and
        what leads there stays, while a lost worker's successor is on its way."""
        active = self._knowledge.active[model]
        name, _ = split_model_id(model)
        allowed = {str(model)}
        if self._knowledge.is_default(model):
            allowed.add(name)
        if model in self._knowledge.consumers and self._knowledge.copies(model):
            return allowed
        return allowed & (active.bound_keys or set())

    async def _unbind_stale(self, model: ModelId) -> None:
        active = self._knowledge.active.get(model)
        if active is None:
            return
        name, _ = split_model_id(model)
        wanted = self._routing_keys(model)
        before = {str(model), name} if active.bound_keys is None else active.bound_keys
        for key in before - wanted:
            async with asyncio.timeout(_BROKER_TIMEOUT_S):
                await self._broker.unbind(model_queue(model), key)
        active.bound_keys = (active.bound_keys or set()) & wanted

    async def _bind_missing(self, model: ModelId) -> None:
        active = self._knowledge.active.get(model)
        if active is None:
            return
        for key in self._routing_keys(model) - (active.bound_keys or set()):
            try:
                async with asyncio.timeout(_BROKER_TIMEOUT_S):
                    await self._broker.bind(model_queue(model), key)
            except QueueMissing:
                active.declared = False  # somebody deleted it; a request declares it again
                active.bound_keys = set()
                return
            active.bound_keys = (active.bound_keys or set()) | {key}
            active.routed_at = self._knowledge.clock()

    async def _unroute(self, model: ModelId) -> None:
        """Before the last binding goes: requests fall through to the placer from here on."""
        name, _ = split_model_id(model)
        retiring = self._knowledge.retiring.get(model)
        active = self._knowledge.active.get(model) if retiring is None else retiring.active
        known = None if active is None else active.bound_keys
        for key in (str(model), name) if known is None else sorted(known):
            async with asyncio.timeout(_BROKER_TIMEOUT_S):
                await self._broker.unbind(model_queue(model), key)
        if active is not None:
            active.bound_keys = set()

    async def _retire_one(self, model: ModelId) -> None:
        queue = model_queue(model)
        async with self.lock(model):
            retiring = self._knowledge.retiring.get(model)
            if retiring is None:
                return
            gone = retiring.gone
            await self._unroute(model)
            if any(model in models for models in self._written.values()):
                return  # its assignment still stands
            if gone.code is not None:
                await self._answer_rest(queue, from_code(gone.code, gone.reason))
            # Held messages do not keep a queue: deleted under them, they could not go back.
            if not self._knowledge.in_hand(model) and await self._delete(queue):
                await self._store.remove_active(model)
                self._knowledge.forget(model)
                return
            if gone.code is None and await self._broker.depth(queue):
                # Asked in the very moment in which it went.
                self._knowledge.activate(model, None, why="requests were left")
                self._knowledge.wait(model)

    async def _delete(self, queue: str) -> bool:
        async with asyncio.timeout(_BROKER_TIMEOUT_S):
            return await self._broker.delete_queue(queue, if_unused=True)

    async def _answer_rest(self, queue: str, error: RoostError) -> None:
        """Answers what waits in the queue with `error`, until it is empty."""
        waiting: asyncio.Queue[Delivery] = asyncio.Queue()
        try:
            consumer = await self._broker.consume(
                queue, waiting.put_nowait, prefetch=_ANSWER_PREFETCH
            )
        except QueueMissing:
            return
        try:
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(_ANSWER_IDLE_S):
                        delivery = await waiting.get()
                    if delivery.malformed:
                        await delivery.dead_letter(delivery.malformed)
                    else:
                        await answer(self._broker, delivery, error, self._metrics)
        finally:
            await consumer.close()

    async def _overruled(self, worker: str) -> None:
        """Another word stands in the store: a newer placer's, or our own that we forgot."""
        stored = await self._store.assignment(worker)
        if stored is None:
            return
        if stored.fence > self._lease.fence:
            self._lease.step_down(f"a newer placer has written to {worker}")
            return
        self._knowledge.generations[worker] = stored.generation
        self._written.pop(worker, None)

    async def _each(
        self, items: list[Name], act: Callable[[Name], Awaitable[None]], what: str
    ) -> list[Name]:
        """Each by itself: one that fails is tried again in the next cycle, and stops nobody.
        Returns those."""
        failed: list[Name] = []
        if not items:
            return failed
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(item: Name) -> None:
            async with room:
                if not self._lease.valid:
                    failed.append(item)
                    return
                try:
                    await act(item)
                except (RoostError, TimeoutError) as error:
                    failed.append(item)
                    log.warning("not_applied", what=what, of=item, error=str(error) or "timeout")

        async with asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(one(item))
        return failed
