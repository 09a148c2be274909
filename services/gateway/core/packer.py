"""Which requests travel together, and when: pure.

Of each *lane* (one routing key at one priority) one publish is under way at a time, and what comes
meanwhile waits and goes out together when that one ends. So nothing is delayed while the lane is
idle, and the busier the broker or the gateway, the more each message holds. What is enough for a
full pack goes at once: waiting could not make it any fuller. And when a publish is slow, what waits
behind it is told to `hurry`: a broker that confirms late may take messages in time.

It is fair without counting who asks: never more than one pack waits in a lane, and all of it goes
out next, in the order in which it came. So nobody's flood keeps anybody here.

Laws (`validate`): a request waits in one place or in none; a lane in which something waits has a
publish under way; less than a full pack waits; a lane without either is forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
"""What names a request."""
L = TypeVar("L", bound=Hashable)
"""What names a lane."""


@dataclass(slots=True)
class _Lane(Generic[K]):
    under_way: int = 0
    """Publishes."""
    waiting: dict[K, int] = field(default_factory=dict)
    """Bytes of each request."""
    nbytes: int = 0


class Packer(Generic[L, K]):
    """The lanes of one gateway."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` of bodies in one pack; a larger request travels alone."""
        self._max_bytes = max_bytes
        self._lanes: dict[L, _Lane[K]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def __repr__(self) -> str:
        return f"Packer({len(self)} waiting, {len(self._lanes)} lanes)"

    def offer(self, lane: L, request: K, nbytes: int, limit: int) -> list[K]:
        """A request came; at most `limit` of its kind go together. Returns those that are to be
        published now, together: it alone, what waited with or without it, or none. The caller
        says `ended` once for each answer that is not empty."""
        found = self._lanes.get(lane)
        if found is None:
            found = self._lanes[lane] = _Lane()
        if not found.under_way or limit <= 1 or nbytes > self._max_bytes:
            found.under_way += 1
            return [request]
        full = []
        if found.nbytes + nbytes > self._max_bytes:
            full = self._take(found)
        found.waiting[request] = nbytes
        found.nbytes += nbytes
        if len(found.waiting) >= limit:
            return self._take(found)
        return full

    def withdraw(self, lane: L, request: K) -> bool:
        """Nobody waits for it any more. False when it does not wait here: then it went out."""
        found = self._lanes.get(lane)
        nbytes = None if found is None else found.waiting.pop(request, None)
        if found is None or nbytes is None:
            return False
        found.nbytes -= nbytes
        return True

    def ended(self, lane: L) -> list[K]:
        """A publish of this lane ended, well or not. Returns what goes out next, as `offer`."""
        found = self._lanes[lane]
        found.under_way -= 1
        if found.waiting:
            return self._take(found)
        if not found.under_way:
            del self._lanes[lane]
        return []

    def hurry(self, lane: L) -> list[K]:
        """The publish takes longer than it should: returns what goes out beside it, as `offer`."""
        found = self._lanes.get(lane)
        return self._take(found) if found is not None and found.waiting else []

    def _take(self, lane: _Lane[K]) -> list[K]:
        taken = list(lane.waiting)
        lane.waiting.clear()
        lane.nbytes = 0
        lane.under_way += 1
        return taken

    def validate(self) -> None:
        """Raises `AssertionError` when a law is broken."""
        seen: set[K] = set()
        for lane in self._lanes.values():
            assert lane.nbytes == sum(lane.waiting.values()) <= self._max_bytes, "counted wrong"
            assert lane.under_way > 0, "nobody will send what waits, or the lane is of no use"
            assert not seen & lane.waiting.keys(), "a request waits twice"
            seen |= lane.waiting.keys()
