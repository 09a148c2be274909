"""What runs on the engine, and what runs next.

Work-conserving: as the engine frees, the model whose turn it is gets a batch. Little is queued
ahead, since a batch that is formed late is larger: full ones while the engine still has less
than `AHEAD_S` of work, one that is not full only just before the engine would be idle.

Laws: every item is in exactly one place, a queue or a batch; batches are answered in any
order but run in the order in which they were handed over; a suspect runs alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from services.worker.core.batch import Entry, ModelQueue
from services.worker.core.events import (
    Action,
    Answer,
    Bury,
    Fault,
    GiveBack,
    Item,
    Refuse,
    RunBatch,
)
from services.worker.core.model import MAX_DEATHS
from services.worker.core.state import WorkerState
from services.worker.core.turns import FairTurns
from shared.models import ModelSpec
from shared.names import ModelId

AHEAD_S = 0.010
"""Measured work queued ahead on the device at most, when batches are full."""
EAGER_S = 0.003
"""Below this much work ahead a batch goes as it is: what the agent needs to hand it over."""
MAX_UNDER_WAY = 8
MAX_TRIES = 3
"""Runs that end without anything said of the item, before it is refused."""
_INSTANT_S = 1e-6
OVERDUE = 20
"""Times its estimate that a batch may take: a device that is shared slows down, not so much."""


@dataclass(slots=True)
class Batch:
    id: int
    model: ModelId
    entries: tuple[Entry, ...]
    rows: int
    size: int
    nbytes: int
    expected_s: float
    tenant: str


class Dispatch:
    """Items by model, and the batches under way."""

    def __init__(self, state: WorkerState, *, max_bytes_under_way: int) -> None:
        self._state = state
        self._max_bytes = max_bytes_under_way
        self._turns = FairTurns()
        self._queues: dict[ModelId, ModelQueue] = {}
        self._waiting: dict[ModelId, ModelQueue] = {}
        """Those that are not empty."""
        self._due: dict[ModelId, float] = {}
        """Of their heads."""
        self._order: list[tuple[float, ModelId]] = []
        """The same, by urgency."""
        self._tenant_of: dict[ModelId, str] = {}
        """Whose each of them is."""
        self._patient: set[ModelId] = set()
        """Those of whose queues some wait for company."""
        self._expiry = float("inf")
        """Nothing that waits expires before."""
        self._running: dict[int, Batch] = {}
        self._last_batch = 0
        self._began = 0.0

    def __repr__(self) -> str:
        waiting = sum(len(queue) for queue in self._queues.values())
        return f"Dispatch({waiting} waiting, {list(self._running.values())} under way)"

    @property
    def under_way(self) -> int:
        return len(self._running)

    def models_waiting(self) -> list[ModelId]:
        """The models that something waits for."""
        return list(self._waiting)

    def waiting(self, model: ModelId) -> tuple[Entry, ...]:
        queue = self._waiting.get(model)
        return queue.entries() if queue else ()

    def urgency(self) -> list[tuple[float, ModelId]]:
        """The models that something waits for, the most urgent first, and when that is due."""
        return list(self._order)

    def share_device(self, shares: Mapping[str, float]) -> None:
        """From now on device time is shared by tenants with these weights; 1 for the others."""
        self._turns.shares = shares

    def owed_s(self, model: ModelId) -> float:
        """Device seconds that the tenant of a model for which something waits would have been given
        while it waited for what is not on the device, and others were."""
        tenant = self._tenant_of[model]
        return self._turns.passed_over(tenant) * self._turns.shares.get(tenant, 1.0)

    def backlog(self, model: ModelId) -> tuple[int, float]:
        """How many wait for it, and when the first is due (infinite when none does)."""
        queue = self._waiting.get(model)
        return (len(queue), self._due[model]) if queue else (0, float("inf"))

    def suspects(self) -> list[Entry]:
        """What waits to be run alone."""
        return [e for queue in self._waiting.values() for e in queue.entries() if e.suspect]

    def isolating(self) -> bool:
        """A suspect is running: nothing else may begin."""
        return any(entry.suspect for b in self._running.values() for entry in b.entries)

    # --- in -------------------------------------------------------------------------------

    def add(self, item: Item, spec: ModelSpec) -> None:
        queue = self._queues.get(item.model)
        if queue is None or (queue.spec is not spec and item.model not in self._waiting):
            queue = self._queues[item.model] = ModelQueue(spec)
            if spec.max_queue_delay_us:
                self._patient.add(item.model)
            else:
                self._patient.discard(item.model)
        queue.add(item)
        self._moved(item.model)
        if item.deadline is not None:
            self._expiry = min(self._expiry, item.deadline)

    def forget(self, model: ModelId) -> None:
        """Nothing of the model is held."""
        self._queues.pop(model, None)
        self._patient.discard(model)

    def take_out(self, model: ModelId, entries: Iterable[Entry]) -> None:
        self._queues[model].remove(entries)
        self._moved(model)

    def _put_back(self, model: ModelId, entries: Iterable[Entry]) -> None:
        queue = self._queues[model]
        queue.put_back(entries)
        self._moved(model)
        self._expiry = min(self._expiry, queue.next_expiry())

    def _moved(self, model: ModelId) -> None:
        """The head of this queue may be another now."""
        queue, was = self._queues[model], self._due.get(model)
        due = queue.head.due if len(queue) else None
        if due == was:
            return
        if was is not None:
            del self._order[bisect_left(self._order, (was, model))]
        if due is None:
            del self._due[model], self._waiting[model]
            self._turns.waits_no_more(self._tenant_of.pop(model))
        else:
            if was is None:
                tenant = self._tenant_of[model] = self._state.get(model).tenant
                self._turns.waits(tenant)
            self._due[model], self._waiting[model] = due, queue
            insort(self._order, (due, model))

    def expire(self, now: float) -> list[Action]:
        """Nothing expired is computed."""
        actions: list[Action] = []
        if now < self._expiry:
            return actions
        fault = Fault("deadline_exceeded", "its deadline passed as it waited")
        for model, queue in list(self._waiting.items()):
            actions += [Refuse(entry.item.item, fault) for entry in queue.expire(now)]
            self._moved(model)
        self._expiry = min((q.next_expiry() for q in self._waiting.values()), default=float("inf"))
        return actions

    def cancelled(self, item: Item) -> list[Action]:
        """Nothing is computed that nobody waits for. What runs already, runs."""
        found = [entry for entry in self.waiting(item.model) if entry.item.item == item.item]
        if not found:
            return []
        self.take_out(item.model, found)
        return [Refuse(item.item, Fault("deadline_exceeded", "its client hung up as it waited"))]

    # --- out ------------------------------------------------------------------------------

    def next_batches(self, now: float) -> list[Action]:
        """All that should be handed to the engine now."""
        actions: list[Action] = []
        while batch := self._next_batch(now):
            items = tuple(entry.item.item for entry in batch.entries)
            actions.append(RunBatch(batch.id, batch.model, items, batch.rows, batch.size))
        return actions

    def _next_batch(self, now: float) -> Batch | None:
        if not self._waiting or self._state.quiesce or self._state.condemned:
            return None
        if any(model.suspect for model in self._state.loading()):
            return None
        if self.isolating() or len(self._running) >= MAX_UNDER_WAY:
            return None
        ahead = self._ahead_s(now)
        if ahead > AHEAD_S:
            return None
        may = partial(self._may_run, now)
        model = self._turns.choose(self._order, may, self._tenant_of)
        if model is None:
            return None
        known, queue = self._state.get(model), self._queues[model]
        if queue.head.suspect and (self._running or self._state.loading()):
            return None  # first let the others end, so that it is alone
        early = ahead > EAGER_S or len(self._running) > 1
        if early and not queue.may_fill():
            return None
        room = self._max_bytes - sum(batch.nbytes for batch in self._running.values())
        estimate = known.measured.times.estimate
        formed = queue.form(now, ahead, estimate, max(room, 0))
        if self._running and (formed.nbytes > room or (early and not formed.full)):
            return None
        entries, rows, nbytes, size, _ = formed
        tenant = self._tenant_of[model]
        self.take_out(model, entries)
        if not self._running:
            self._began = now
        self._last_batch += 1
        expected = estimate(rows, size)
        batch = Batch(self._last_batch, model, tuple(entries), rows, size, nbytes, expected, tenant)
        self._running[batch.id] = batch
        self._turns.handed_over(model, tenant, expected)
        return batch

    def _may_run(self, now: float, name: ModelId) -> bool:
        if not self._state.is_ready(name):
            return False
        return name not in self._patient or self._company_until(name, now) <= now

    def _company_until(self, name: ModelId, now: float) -> float:
        estimate = self._state.get(name).measured.times.estimate
        return self._waiting[name].waits_until(now, estimate)

    def _ahead_s(self, now: float) -> float:
        """Seconds of work that the engine still has, as far as it was measured. A batch of
        which nothing is known may take any time: nothing is queued behind it."""
        if not self._running:
            return 0.0
        ahead, first = 0.0, True
        for batch in self._running.values():
            expected = batch.expected_s
            if expected <= 0:
                return float("inf")
            if first:
                expected -= now - self._began
                if expected < 0:
                    # It takes longer than it should: who knows how much longer.
                    return 0.0 if len(self._running) == 1 else float("inf")
                first = False
            ahead += expected
        return ahead

    def next_wakeup(self, now: float) -> float:
        """When time alone changes what should be done; infinite when it does not."""
        if not self._waiting:
            return float("inf")
        ahead, first = self._ahead_s(now), self._expiry
        for name in self._patient & self._waiting.keys():
            if (until := self._company_until(name, now)) > now:
                first = min(first, until)
        if 0 < ahead < float("inf"):
            # Then a full batch may go, and later one that is not full.
            in_s = ahead - AHEAD_S if ahead > AHEAD_S else ahead - EAGER_S
            if in_s > _INSTANT_S:  # less than rounding would wake up for nothing, again and again
                first = min(first, now + in_s)
        return first

    def batch_due(self, timeout_s: float) -> tuple[float, ModelId, float] | None:
        """When the batch that runs has taken too long, of which model it is, and how long that
        is."""
        if not self._running:
            return None
        first = next(iter(self._running.values()))
        limit = max(timeout_s, OVERDUE * first.expected_s)
        return self._began + limit, first.model, limit

    # --- back -----------------------------------------------------------------------------

    def ran(self, id_: int, compute_s: float, workspace_bytes: int, now: float) -> list[Action]:
        batch = self._running.pop(id_, None)
        if batch is None:
            return []
        self._began = now
        self._turns.ended(batch.tenant, batch.expected_s, compute_s)
        model, queue = self._state.get(batch.model), self._queues[batch.model]
        model.measured.times.measured(batch.rows, batch.size, compute_s, len(batch.entries))
        if model.measured.note_workspace(batch.rows, batch.size, workspace_bytes):
            self._state.workspace_grew()
        queue.ran_well(batch.rows, batch.size)
        model.busy_s += compute_s
        items = tuple(entry.item.item for entry in batch.entries)
        rows = tuple(entry.item.rows for entry in batch.entries)
        return [Answer(id_, batch.model, items, rows, not queue.batches, compute_s)]

    def failed(self, id_: int, fault: Fault, now: float) -> list[Action]:
        """One bad item fails alone, not its batch; a full device makes batches smaller."""
        batch = self._running.pop(id_, None)
        if batch is None:
            return []
        # Nobody measured it: it had what it was charged, unless it cannot have run.
        ran_s = 0.0 if fault.code == "not_found" else batch.expected_s
        self._turns.ended(batch.tenant, batch.expected_s, ran_s)
        self._began = now
        queue = self._queues[batch.model]
        several = len(batch.entries) > 1
        if fault.code == "not_found":
            self._state.lost_model(batch.model)
            return self._again(batch, Fault("unavailable", fault.message))
        if fault.code == "resource_exhausted":
            queue.out_of_memory(batch.rows, batch.size)
        if not several:
            return [Refuse(batch.entries[0].item.item, fault)]
        for entry in batch.entries:
            entry.alone = fault.code != "resource_exhausted"
        self._put_back(batch.model, batch.entries)
        return []

    def engine_lost(self) -> list[Action]:
        """The batch that was running is suspect, item by item; the ones behind it are not."""
        batches, self._running = list(self._running.values()), {}
        actions: list[Action] = []
        if not batches:
            return actions
        first, *behind = batches
        self._turns.ended(first.tenant, first.expected_s, first.expected_s)
        for batch in behind:
            self._turns.ended(batch.tenant, batch.expected_s, 0.0)
        sure = len(first.entries) == 1 and not self._state.loading()
        kept: list[Entry] = []
        for entry in first.entries:
            entry.suspect = True
            entry.deaths += sure
            if entry.deaths >= MAX_DEATHS:
                reason = f"it ended {entry.deaths} engines"
                actions.append(
                    Bury(entry.item.item, reason, Fault("quarantined", f"this request: {reason}"))
                )
                actions += self._state.get(first.model).died_running()
            else:
                kept.append(entry)
        self._put_back(first.model, kept)
        for batch in behind:
            actions += [GiveBack(e.item.item, "the engine was lost") for e in batch.entries]
        return actions

    def _again(self, batch: Batch, fault: Fault) -> list[Action]:
        actions: list[Action] = []
        again: list[Entry] = []
        for entry in batch.entries:
            entry.tries += 1
            if entry.tries >= MAX_TRIES:
                actions.append(Refuse(entry.item.item, fault))
            else:
                again.append(entry)
        self._put_back(batch.model, again)
        return actions

    def places(self) -> list[int]:
        """Every item once, wherever it is (for `validate`)."""
        assert self._waiting == {m: queue for m, queue in self._queues.items() if len(queue)}
        dues = [(queue.head.due, model) for model, queue in self._waiting.items()]
        assert self._order == sorted(dues), self
        assert self._tenant_of.keys() == self._waiting.keys(), self
        running = Counter(batch.tenant for batch in self._running.values())
        self._turns.validate(Counter(self._tenant_of.values()), running)
        waiting = [e.item.item for queue in self._queues.values() for e in queue.entries()]
        under_way = [e.item.item for b in self._running.values() for e in b.entries]
        return waiting + under_way
