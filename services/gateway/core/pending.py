"""The table of requests that await a reply: who waits, and what an odd reply is.

Invariants (`validate`): an id is either awaited or remembered as ended, never both; at most
`memory` ended ids are remembered, oldest forgotten first. Ending one entry never touches
another: a caller that goes away costs nobody else an answer.

Delivery of replies is at least once, so a reply may find nobody. It is then *late* (its
caller hung up or ran out of time), *double* (already answered) or *unknown* (never ours, or
forgotten, or from before a restart).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Generic, TypeVar

W = TypeVar("W")


class Ended(StrEnum):
    """How a request left the table."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Stray(StrEnum):
    """What a reply is that nobody awaits."""

    LATE = "late"
    DOUBLE = "double"
    UNKNOWN = "unknown"


class Pending(Generic[W]):
    """Waiters by correlation id. A waiter is opaque here (the caller's future)."""

    def __init__(self, memory: int = 10_000) -> None:
        self._memory = memory
        self._waiting: dict[str, W] = {}
        self._ended: dict[str, Ended] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"<Pending {len(self._waiting)} awaited, {len(self._ended)} ended remembered>"

    def add(self, correlation_id: str, waiter: W) -> None:
        """Ids are used once; a second use is a fault of ours (`ValueError`)."""
        if correlation_id in self._waiting or correlation_id in self._ended:
            raise ValueError(f"correlation id {correlation_id!r} was used before")
        self._waiting[correlation_id] = waiter

    def awaits(self, correlation_id: str) -> bool:
        """Whether somebody still waits for this one."""
        return correlation_id in self._waiting

    def resolve(self, correlation_id: str | None) -> W | Stray:
        """A reply came: the waiter that gets it, or what kind of stray the reply is."""
        if correlation_id is None:
            return Stray.UNKNOWN
        waiter = self._end(correlation_id, Ended.ANSWERED)
        if waiter is not None:
            return waiter
        ended = self._ended.get(correlation_id)
        if ended is None:
            return Stray.UNKNOWN
        return Stray.DOUBLE if ended is Ended.ANSWERED else Stray.LATE

    def cancel(self, correlation_id: str) -> W | None:
        """The caller is gone. None when it was no longer awaited."""
        return self._end(correlation_id, Ended.CANCELLED)

    def expire(self, correlation_id: str) -> W | None:
        """The deadline passed. None when it was no longer awaited."""
        return self._end(correlation_id, Ended.EXPIRED)

    def waiting(self) -> list[W]:
        """All who wait now."""
        return list(self._waiting.values())

    def validate(self) -> None:
        """Raises `AssertionError` when a law of this table is broken."""
        assert not self._waiting.keys() & self._ended.keys(), "awaited and ended at once"
        assert len(self._ended) <= self._memory, "remembers too much"

    def _end(self, correlation_id: str, how: Ended) -> W | None:
        waiter = self._waiting.pop(correlation_id, None)
        if waiter is None:
            return None
        self._ended[correlation_id] = how
        if len(self._ended) > self._memory:
            del self._ended[next(iter(self._ended))]  # dicts keep insertion order
        return waiter
