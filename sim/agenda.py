"""Virtual time: what is to happen when, in the order of time and then of asking."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """Law: time never goes back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0
        """Events that happened."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0
        self._last: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<Agenda now={self.now:.6f} ahead={len(self._heap)}>"

    def at(self, when: float, act: Callable[..., None], *args: Any) -> None:
        """Calls `act` at `when`; what is due before now happens now."""
        self._asked += 1
        heappush(self._heap, (max(when, self.now), self._asked, act, args))

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        self._asked += 1
        heappush(self._heap, (self.now + seconds, self._asked, act, args))

    def at_last(self, act: Callable[[], None]) -> None:
        """Calls `act` when all else of this moment has happened, and what came of it."""
        self._last.append(act)

    @property
    def next_at(self) -> float:
        if self._last:
            return self.now
        return self._heap[0][0] if self._heap else float("inf")

    def step(self) -> None:
        """The next event, and all others of that moment."""
        heap = self._heap
        if not self._last:
            self.now = heap[0][0]
        while True:
            while heap and heap[0][0] == self.now:
                _, _, act, args = heappop(heap)
                act(*args)
                self.done += 1
            if not self._last:
                return
            last, self._last = self._last, []
            for each in last:
                each()
            self.done += len(last)
