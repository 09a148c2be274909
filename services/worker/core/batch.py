"""The items that wait for one model, and the batch to run next.

Items stand by urgency: the deadline, or arrival plus the model's target, whichever is sooner,
and a priority level is worth `LEVEL_TARGETS` targets. So neither is a request with a far deadline
overtaken for ever by requests without one, nor one of a low level by those of higher ones: only
by what arrives so much later at most.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from services.worker.core.events import Item
from shared.models import ModelSpec

LEVEL_TARGETS: Final = 10
"""Target times that one level of priority is worth: more than should ever wait, so that levels
are kept in all but a lasting overload, and then each makes progress."""
_RECOVERED: Final = 64
"""Full batches that run well before larger ones are tried again."""
_INF: Final = float("inf")

Estimate = Callable[[int, int], float]
"""Seconds that a batch takes on the device by its rows and its size; 0: not known."""


@dataclass(slots=True, eq=False)
class Entry:
    """One waiting item, and what became of it so far."""

    item: Item
    due: float
    size: int = 0
    """Of the padded dimension, when it runs by itself; 0 for a model without one."""
    alone: bool = False
    """It was in a batch that failed: it runs by itself, to find the one at fault."""
    suspect: bool = False
    """It was running when an engine died: it runs with nothing beside it."""
    deaths: int = 0
    """Engines that died while nothing but this item could have done it."""
    tries: int = 0

    @property
    def deadline(self) -> float:
        return _INF if self.item.deadline is None else self.item.deadline

    def nbytes(self, size: int) -> int:
        """Bytes of the inputs, filled up to `size`."""
        if not self.size:
            return self.item.nbytes
        return -(-self.item.nbytes * max(size, 1) // max(self.item.length, 1))


class Formed(NamedTuple):
    """A batch that could run now."""

    entries: list[Entry]
    rows: int
    nbytes: int
    size: int
    full: bool
    """Waiting would not make it any larger."""


class ModelQueue:
    """What waits for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.batches = spec.max_batch_size > 0 and not spec.stateful
        self._most = max(spec.max_batch_size, 1)
        self._padding = spec.padding if self.batches else None
        self._greatest = self._padding.sizes[-1] if self._padding else 0
        self._limits: dict[int, int] = {}
        """Rows of a batch, by its size, where the device ran out of memory with more."""
        self._ran_well: dict[int, int] = {}
        self._entries: list[Entry] = []
        self._rows = 0
        """Of all of them."""
        self._expiry = _INF
        self._ripe: float | None = None
        """When the head need not wait for company any longer; None: to be found out."""

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"ModelQueue({len(self)} waiting, at most {self._limits or self._most} rows)"

    @property
    def head(self) -> Entry:
        return self._entries[0]

    def entries(self) -> tuple[Entry, ...]:
        """In order of urgency."""
        return tuple(self._entries)

    def add(self, item: Item) -> Entry:
        target = self.spec.target_ms / 1e3
        due = item.arrived + target
        if item.deadline is not None:
            due = min(due, item.deadline)
        due -= item.priority * LEVEL_TARGETS * target
        size = self._padding.holding(item.length) if self._padding is not None else 0
        entry = Entry(item, due, size)
        self.put_back((entry,))
        return entry

    def put_back(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            insort(self._entries, entry, key=_due)
            self._rows += entry.item.rows
            self._expiry = min(self._expiry, entry.deadline)
        self._ripe = None

    def remove(self, entries: Iterable[Entry]) -> None:
        gone = set(map(id, entries))
        self._entries = [entry for entry in self._entries if id(entry) not in gone]
        self._rows = sum(entry.item.rows for entry in self._entries)
        self._ripe = None

    def expire(self, now: float) -> list[Entry]:
        """Takes out what nobody waits for any more."""
        if now < self._expiry:
            return []
        gone = [entry for entry in self._entries if entry.deadline <= now]
        self.remove(gone)
        self._expiry = min((entry.deadline for entry in self._entries), default=_INF)
        return gone

    def next_expiry(self) -> float:
        """Nothing expires before; infinite when nothing that waits has a deadline."""
        return self._expiry if self._entries else _INF

    # --- company --------------------------------------------------------------------------

    def waits_until(self, now: float, estimate: Estimate) -> float:
        """When the head may run: later than `now` only if the model asks for company to be
        waited for, and no batch that is full or of a preferred size can be made. Nothing waits
        longer than it asks for, nor so long that a deadline could not be met."""
        if not self.spec.max_queue_delay_us or not self.batches:
            return now
        if self._ripe is None:
            self._ripe = self._company_until(estimate)
        return max(now, self._ripe)

    def _company_until(self, estimate: Estimate) -> float:
        head = self.head
        if head.alone or head.suspect:
            return -_INF
        goal, preferred = self._goal(head), self._preferred
        rows = 0
        for entry in self._entries:
            if not self._may_join(entry, head) or rows + entry.item.rows > goal:
                continue
            rows += entry.item.rows
            if rows == goal or rows in preferred:
                return -_INF
        oldest = min(entry.item.arrived for entry in self._entries)
        until = oldest + self.spec.max_queue_delay_us / 1e6
        return min(until, self._expiry - estimate(rows, head.size))

    @property
    def _preferred(self) -> tuple[int, ...]:
        return self.spec.preferred_batch_size

    def _goal(self, head: Entry) -> int:
        """Rows of the batch that needs nothing more: the greatest preferred one that can be,
        else what may run at once."""
        limit = self.limit(head.size)
        if self._preferred:
            limit = max((p for p in self._preferred if head.item.rows <= p <= limit), default=limit)
        return max(limit, head.item.rows)

    def _may_join(self, entry: Entry, head: Entry) -> bool:
        """Whether it may stand in one batch with the head. A shorter one may, filled up to a size
        that is declared; longer ones wait for their own, or the head would be slowed down."""
        return (
            entry.item.kind == head.item.kind
            and (entry.size == head.size or entry.size < head.size <= self._greatest)
            and not (entry.alone or entry.suspect)
        )

    # --- batches --------------------------------------------------------------------------

    def may_fill(self) -> bool:
        """False when what `form` makes cannot be full: too few rows wait. It costs no forming."""
        head = self.head
        single = not self.batches or head.alone or head.suspect
        return single or self._rows >= self._goal(head)

    def form(self, now: float, ahead_s: float, estimate: Estimate, max_bytes: int) -> Formed:
        """The most urgent item and all that fit beside it: in rows, in bytes, in kind, and
        without making any of them late by the measured batch time. Nothing is taken out.

        `ahead_s`: seconds of work that the device has before it begins. A head that will be
        late in any case does not keep the batch small.
        """
        head = self.head
        if not self.batches or head.alone or head.suspect:
            return Formed([head], head.item.rows, head.nbytes(head.size), head.size, True)
        goal = self._goal(head)
        draft = _Draft(head, now + ahead_s, estimate, goal, max_bytes)
        shorter: dict[int, list[Entry]] = {}
        for entry in self._entries[1:]:
            if draft.rows >= goal:
                break
            if not self._may_join(entry, head):
                continue
            if entry.size == head.size:
                draft.add(entry)
            else:
                shorter.setdefault(entry.size, []).append(entry)
        for size in sorted(shorter, reverse=True):
            self._take_along(draft, size, shorter[size])
        return self._preferably(draft, goal)

    def _take_along(self, draft: _Draft, size: int, entries: list[Entry]) -> None:
        """Lets shorter items have the rows that are free, if by what was measured that costs no
        more than it saves: to run them now at the longer size, against so many rows fewer in
        the batch that they would make among themselves. (Where nothing was measured they ride.)"""
        free = draft.goal - draft.rows
        riders = _first(entries, free)
        if not riders:
            return
        rows = sum(entry.item.rows for entry in riders)
        theirs = sum(e.item.rows for e in _first(entries, self.limit(size)))
        left = theirs - rows
        estimate = draft.estimate
        costs = estimate(draft.rows + rows, draft.size) - estimate(draft.rows, draft.size)
        saves = estimate(theirs, size) - (estimate(left, size) if left > 0 else 0.0)
        if costs <= saves:
            for entry in riders:
                draft.add(entry)

    def _preferably(self, draft: _Draft, goal: int) -> Formed:
        """As it is, or only the beginning of it that is of a preferred size."""
        entries, rows = draft.entries, draft.rows
        if self._preferred and rows != goal:
            so_far = 0
            for count, entry in enumerate(draft.entries, start=1):
                so_far += entry.item.rows
                if so_far in self._preferred:
                    entries, rows = draft.entries[:count], so_far
        size = draft.size
        nbytes = draft.nbytes
        if len(entries) < len(draft.entries):
            nbytes = sum(entry.nbytes(size) for entry in entries)
        return Formed(entries, rows, nbytes, size, rows >= goal)

    # --- memory ---------------------------------------------------------------------------

    def limit(self, size: int = 0) -> int:
        """Rows of a batch at most: halved where the device runs out of memory, also for greater
        sizes, since those take more."""
        if not self._limits:
            return self._most
        return min([self._most, *(rows for at, rows in self._limits.items() if at <= size)])

    def out_of_memory(self, rows: int, size: int = 0) -> None:
        """A batch of `rows` did not fit the device."""
        self._limits[size] = max(1, min(self.limit(size), rows) // 2)
        self._ran_well.clear()
        self._ripe = None

    def ran_well(self, rows: int, size: int = 0) -> None:
        """After many batches at a reduced limit, larger ones are tried again."""
        if not self._limits or rows < (limit := self.limit(size)) or limit >= self._most:
            return
        self._ran_well[size] = self._ran_well.get(size, 0) + 1
        if self._ran_well[size] < _RECOVERED:
            return
        del self._ran_well[size]
        for at in [at for at, most in self._limits.items() if at <= size and most <= limit]:
            self._limits[at] = limit * 2
            if limit * 2 >= self._most:
                del self._limits[at]
        self._ripe = None


class _Draft:
    """A batch in the making."""

    __slots__ = (
        "_deadline",
        "_max_bytes",
        "_start",
        "entries",
        "estimate",
        "goal",
        "nbytes",
        "rows",
        "size",
    )

    def __init__(
        self, head: Entry, start: float, estimate: Estimate, goal: int, max_bytes: int
    ) -> None:
        self.entries = [head]
        self.size = head.size
        self.rows = head.item.rows
        self.nbytes = head.nbytes(head.size)
        self.goal = goal
        self.estimate = estimate
        self._start = start
        self._max_bytes = max_bytes
        self._deadline = head.deadline
        if self._deadline < _INF and start + estimate(self.rows, self.size) > self._deadline:
            self._deadline = _INF

    def add(self, entry: Entry) -> None:
        """If it fits, and makes nobody late."""
        item = entry.item
        rows, nbytes = self.rows + item.rows, self.nbytes + entry.nbytes(self.size)
        if rows > self.goal or nbytes > self._max_bytes:
            return
        deadline = self._deadline
        if item.deadline is not None and item.deadline < deadline:
            deadline = item.deadline
        if deadline < _INF and self._start + self.estimate(rows, self.size) > deadline:
            return
        self.entries.append(entry)
        self.rows, self.nbytes, self._deadline = rows, nbytes, deadline


def _first(entries: list[Entry], rows: int) -> list[Entry]:
    """As many of them, in their order, as have so many rows together."""
    taken = []
    for entry in entries:
        if entry.item.rows <= rows:
            taken.append(entry)
            rows -= entry.item.rows
            if not rows:
                break
    return taken


def _due(entry: Entry) -> tuple[float, int]:
    return entry.due, entry.item.item
