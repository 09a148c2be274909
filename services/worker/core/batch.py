"""The items that wait for one model, and the batch to run next.

Items stand by urgency: the deadline, or arrival plus the model's target, whichever is sooner.
So a request with a far deadline is not overtaken for ever by requests without one.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.worker.core.events import Item
from shared.models import ModelSpec


@dataclass(slots=True)
class Entry:
    """One waiting item, and what became of it so far."""

    item: Item
    due: float
    alone: bool = False
    """It was in a batch that failed: it runs by itself, to find the one at fault."""
    suspect: bool = False
    """It was running when an engine died: it runs with nothing beside it."""
    deaths: int = 0
    """Engines that died while nothing but this item could have done it."""
    tries: int = 0


class ModelQueue:
    """What waits for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.batches = spec.max_batch_size > 0 and not spec.stateful
        self.limit = max(spec.max_batch_size, 1)
        """Rows of a batch at most: halved when the device runs out of memory."""
        self._ran_well = 0
        self._entries: list[Entry] = []
        self._expiry = float("inf")

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"ModelQueue({len(self)} waiting, at most {self.limit} rows)"

    @property
    def head(self) -> Entry:
        return self._entries[0]

    def entries(self) -> tuple[Entry, ...]:
        """In order of urgency."""
        return tuple(self._entries)

    def add(self, item: Item) -> Entry:
        due = item.arrived + self.spec.target_ms / 1e3
        entry = Entry(item, due if item.deadline is None else min(due, item.deadline))
        self.put_back((entry,))
        return entry

    def put_back(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            insort(self._entries, entry, key=_due)
            self._expiry = min(self._expiry, _deadline(entry))

    def remove(self, entries: Iterable[Entry]) -> None:
        gone = {id(entry) for entry in entries}
        self._entries = [entry for entry in self._entries if id(entry) not in gone]

    def expire(self, now: float) -> list[Entry]:
        """Takes out what nobody waits for any more."""
        if now < self._expiry:
            return []
        gone = [entry for entry in self._entries if _deadline(entry) <= now]
        self.remove(gone)
        self._expiry = min(map(_deadline, self._entries), default=float("inf"))
        return gone

    def next_expiry(self) -> float:
        """Nothing expires before; infinite when nothing that waits has a deadline."""
        return self._expiry if self._entries else float("inf")

    def waits_until(self, now: float) -> float:
        """When the head may run: later than `now` only if the model asks for company to be
        waited for, and the batch is not full yet."""
        head = self.head
        if not self.spec.max_queue_delay_us or not self.batches or head.alone or head.suspect:
            return now
        if sum(entry.item.rows for entry in self._entries) >= self.limit:
            return now
        return max(now, head.item.arrived + self.spec.max_queue_delay_us / 1e6)

    def form(
        self, now: float, ahead_s: float, estimate: Callable[[int], float], max_bytes: int
    ) -> list[Entry]:
        """The most urgent item and all that fit beside it: in rows, in bytes, in kind, and
        without making any of them late by the measured batch time. Nothing is taken out.

        `ahead_s`: seconds of work that the device has before it begins. A head that will be
        late in any case does not keep the batch small.
        """
        head = self.head
        chosen = [head]
        if not self.batches or head.alone or head.suspect:
            return chosen
        start = now + ahead_s
        rows, nbytes = head.item.rows, head.item.nbytes
        deadline = _deadline(head)
        if start + estimate(rows) > deadline:
            deadline = float("inf")
        for entry in self._entries[1:]:
            if rows >= self.limit:
                break
            item = entry.item
            if entry.alone or entry.suspect or item.kind != head.item.kind:
                continue
            if rows + item.rows > self.limit or nbytes + item.nbytes > max_bytes:
                continue
            if start + estimate(rows + item.rows) > min(deadline, _deadline(entry)):
                continue
            rows, nbytes = rows + item.rows, nbytes + item.nbytes
            deadline = min(deadline, _deadline(entry))
            chosen.append(entry)
        return chosen

    def out_of_memory(self, rows: int) -> None:
        """A batch of `rows` did not fit the device."""
        self.limit = max(1, min(self.limit, rows) // 2)
        self._ran_well = 0

    def ran_well(self, rows: int) -> None:
        """After many batches at a reduced limit, larger ones are tried again."""
        if self.limit < self.spec.max_batch_size and rows >= self.limit:
            self._ran_well += 1
            if self._ran_well >= 64:
                self.limit = min(self.limit * 2, self.spec.max_batch_size)
                self._ran_well = 0


def _due(entry: Entry) -> tuple[float, int]:
    return entry.due, entry.item.item


def _deadline(entry: Entry) -> float:
    return float("inf") if entry.item.deadline is None else entry.item.deadline
