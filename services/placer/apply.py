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
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import structlog

from services.placer.knowledge import Active, Knowledge
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


_EQUAL: Final[Mapping[str, float]] = {}


class _Written(NamedTuple):
    """What stands in the store for one worker."""

    models: frozenset[ModelId]
    leaving: bool = False
    drain: bool = False
    shares: Mapping[str, float] = _EQUAL
    """Of tenants, where not 1."""


_ANSWER_PREFETCH = 32
_ANSWER_IDLE_S = 0.2
_BROKER_TIMEOUT_S = 5.0
_NOTHING = _Written(frozenset())
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
        self._written: dict[str, _Written] = {}
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

    def adopted(self, stored: Assignment) -> None:
        """That is what stands in the store for its worker."""
        models = frozenset(each.model for each in stored.models)
        self._written[stored.worker] = _Written(models, stored.leaving, stored.drain, stored.shares)

    def told_to_end(self, worker: str) -> bool:
        """Whether the worker was told to finish and end."""
        written = self._written.get(worker)
        return written is not None and written.drain

    async def open_queue(self, model: ModelId) -> None:
        """Makes the model's queue exist, known to the store before it does. Raises
        `StoreUnavailable`, `BrokerUnavailable`."""
        await self.keep_active(model)
        await self.declare(model)

    async def keep_active(self, model: ModelId) -> None:
        """From here on the next placer finds the model's queue. Raises `StoreUnavailable`."""
        await self._store.add_active(model)

    async def declare(self, model: ModelId) -> None:
        """The model must be known to the store. Raises `BrokerUnavailable`."""
        await self._broker.declare_queue(model_queue(model))

    async def write(self, workers: Iterable[str] | None = None) -> None:
        """Assignments that differ from what is wanted, of these workers, None for all, with the
        routes of what loses its last binding taken away before."""
        for gone in self._written.keys() - self._knowledge.assigned.keys():
            del self._written[gone]
            self._worker_locks.pop(gone, None)
        some = self._knowledge.assigned if workers is None else workers
        differ = [worker for worker in some if not self._stands(worker)]
        await self._each(differ, self.write_one, "assignment")

    def _stands(self, worker: str) -> bool:
        """Whether what is wanted of the worker stands in the store: cheap, as it is asked of every
        worker in every cycle."""
        knowledge, written = self._knowledge, self._written.get(worker, _NOTHING)
        wanted = knowledge.assigned.get(worker)
        if wanted is None:
            return True
        leaving = worker in knowledge.leaving
        return (
            written.models == wanted.keys()
            and written.leaving == leaving
            and written.drain == (leaving and not wanted)
            and (written.shares is knowledge.shares or written.shares == knowledge.shares)
        )

    async def write_one(self, worker: str) -> None:
        """Writes the worker's assignment if it is not what stands in the store. Raises
        `Unavailable`."""
        lock = self._worker_locks.setdefault(worker, asyncio.Lock())
        async with lock:
            wanted = self._knowledge.assigned.get(worker)
            if wanted is None:
                return
            written = self._written.get(worker, _NOTHING)
            for model in written.models - wanted.keys():
                if not self._knowledge.copies(model):
                    await self._unroute(model)
            # Read after the awaits above: what was decided meanwhile goes along.
            wanted = self._knowledge.assigned.get(worker)
            if wanted is None:
                return
            leaving = worker in self._knowledge.leaving
            # It ends once others have all that it had; what it still runs it finishes.
            shares = self._knowledge.shares
            now = _Written(frozenset(wanted), leaving, leaving and not wanted, shares)
            if self._written.get(worker) == now:
                return
            if not self._lease.valid:
                raise Unavailable("the lease is not held")
            generation = self._knowledge.generations.get(worker, 0) + 1
            assignment = Assignment(
                worker=worker,
                fence=self._lease.fence,
                generation=generation,
                models=tuple(Assigned(m, b.reason) for m, b in wanted.items()),
                drain=now.drain,
                leaving=now.leaving,
                shares=shares,
            )
            if await self._store.put_assignment(assignment):
                self._knowledge.generations[worker] = generation
                self._written[worker] = now
                await self._store.hint(topic_assignment(worker))
            else:
                await self._overruled(worker)

    async def route(self) -> None:
        """Routes of what workers are seen to consume: unbinds what must not lead to a queue any
        more, then binds what may."""
        changes = []
        for model, active in self._knowledge.active.items():
            if not active.declared or self._is_routed(model, active):
                continue
            if active.bound_keys != self._routing_keys(model):
                changes.append(model)
        stuck = await self._each(changes, self._unbind_stale, "unbind")
        # A key that leads to two queues would have its requests answered twice.
        names = {split_model_id(model)[0] for model in stuck}
        free = [model for model in changes if split_model_id(model)[0] not in names]
        await self._each(free, self._bind_missing, "bind")

    async def retire(self) -> None:
        """Queues of what is not active any more."""
        await self._each(list(self._knowledge.retiring), self._retire_one, "retire")

    # --- parts ------------------------------------------------------------------------------

    def _is_routed(self, model: ModelId, active: Active) -> bool:
        """Whether its keys are surely bound as they should be: cheap, as it is asked of every
        active model in every cycle."""
        bound, manifest = active.bound_keys, active.manifest
        if bound is None or manifest is None or model not in bound:
            return False
        if model not in self._knowledge.consumers or not self._knowledge.copies(model):
            return False
        default = self._knowledge.defaults.get(manifest.name) == manifest.version
        aliases = self._knowledge.names.keys(model)
        if default and manifest.name not in bound:
            return False
        return len(bound) == 1 + default + len(aliases) and aliases <= bound

    def _routing_keys(self, model: ModelId) -> set[str]:
        """Keys that should lead to the model's queue: none before somebody consumes it; and
        what leads there stays, while a lost worker's successor is on its way."""
        active = self._knowledge.active[model]
        name, _ = split_model_id(model)
        allowed = {str(model), *self._knowledge.names.keys(model)}
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
        before = active.bound_keys
        if before is None:
            before = {str(model), name, *self._knowledge.names.ever(name)}
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
        if known is None:
            known = {str(model), name, *self._knowledge.names.ever(name)}
        for key in sorted(known):
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
            if any(model in written.models for written in self._written.values()):
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
