"""The store's twin in memory: one `MemoryState` is the server, each service has a `MemoryStore`.

It keeps the same laws as Redis (tests/contract/test_store.py), time and loss of content
included. It serves `--embedded`, where all services live in one process, and the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from shared.control import Assignment, Report
from shared.names import ModelId
from shared.store.port import ASSIGNMENT_TTL_S, StoreUnavailable


class MemoryState:
    """What a Redis server would hold. `now` is monotonic seconds."""

    def __init__(
        self,
        now: Callable[[], float] = time.monotonic,
        assignment_ttl_s: float = ASSIGNMENT_TTL_S,
    ) -> None:
        self.now = now
        self.assignment_ttl_s = assignment_ttl_s
        self.reachable = True
        """Tests set it to False: every call then raises `StoreUnavailable`."""
        self._last_fence = 0
        self._listeners: list[tuple[frozenset[str], asyncio.Queue[str]]] = []
        self.note_listeners: list[tuple[str, asyncio.Queue[bytes]]] = []
        self.flush()

    def flush(self) -> None:
        """Loses everything, as FLUSHALL or a restart without persistence does."""
        self.epoch = uuid.uuid4().hex
        self.reports: dict[str, tuple[float, Report]] = {}
        self.assignments: dict[str, Assignment] = {}
        self.assignments_until: dict[str, float] = {}
        self.active: set[ModelId] = set()
        self.tallies: dict[str, tuple[float, dict[ModelId, bytes]]] = {}
        self.lease: tuple[str, int, float] | None = None

    def next_fence(self) -> int:
        """Higher than any before: the wall clock survives a flush, a counter does not."""
        self._last_fence = max(self._last_fence + 1, time.time_ns() // 1000)
        return self._last_fence

    def assignment(self, worker: str) -> Assignment | None:
        if self.assignments_until.get(worker, math.inf) <= self.now():
            self.remove_assignment(worker)
        return self.assignments.get(worker)

    def remove_assignment(self, worker: str) -> None:
        self.assignments.pop(worker, None)
        self.assignments_until.pop(worker, None)

    def renew_assignment(self, worker: str) -> None:
        if self.assignment(worker) is not None:
            self.assignments_until[worker] = self.now() + self.assignment_ttl_s

    def listen(self, topics: frozenset[str]) -> asyncio.Queue[str]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.append((topics, queue))
        return queue

    def unlisten(self, queue: asyncio.Queue[str]) -> None:
        self._listeners = [entry for entry in self._listeners if entry[1] is not queue]

    def announce(self, topic: str) -> None:
        for topics, queue in self._listeners:
            if topic in topics:
                queue.put_nowait(topic)


class MemoryStore:
    """One service's access to a `MemoryState`. See `shared.store.port.Store`."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    async def start(self) -> None:
        self._reach()

    async def close(self) -> None:
        pass

    async def put_report(self, report: Report, ttl_s: float) -> None:
        state = self._reach()
        state.reports[report.worker] = (state.now() + ttl_s, report)
        state.renew_assignment(report.worker)

    async def remove_report(self, worker: str) -> None:
        state = self._reach()
        state.reports.pop(worker, None)
        state.remove_assignment(worker)

    async def reports(self) -> list[Report]:
        state = self._reach()
        now = state.now()
        state.reports = {w: entry for w, entry in state.reports.items() if entry[0] > now}
        return [report for _, report in state.reports.values()]

    async def put_assignment(self, assignment: Assignment) -> bool:
        state = self._reach()
        stored = state.assignment(assignment.worker)
        if (
            stored
            and stored != assignment
            and (stored.fence, stored.generation) >= (assignment.fence, assignment.generation)
        ):
            return False
        state.assignments[assignment.worker] = assignment
        state.renew_assignment(assignment.worker)
        return True

    async def assignment(self, worker: str) -> Assignment | None:
        return self._reach().assignment(worker)

    async def hint(self, topic: str) -> None:
        self._reach().announce(topic)

    async def hints(self, *topics: str) -> AsyncIterator[str]:
        queue = self._state.listen(frozenset(topics))
        try:
            while True:
                yield await queue.get()
        finally:
            self._state.unlisten(queue)

    async def note(self, topic: str, data: bytes) -> None:
        for wanted, queue in self._reach().note_listeners:
            if wanted == topic:
                queue.put_nowait(data)

    async def notes(self, topic: str) -> AsyncIterator[bytes]:
        entry = (topic, asyncio.Queue[bytes]())
        self._state.note_listeners.append(entry)
        try:
            while True:
                yield await entry[1].get()
        finally:
            self._state.note_listeners.remove(entry)

    async def put_tallies(
        self, gateway: str, tallies: Mapping[ModelId, bytes], ttl_s: float
    ) -> None:
        state = self._reach()
        _, present = state.tallies.get(gateway, (0.0, {}))
        state.tallies[gateway] = (state.now() + ttl_s, {**present, **tallies})

    async def tallies(self, models: Sequence[ModelId]) -> dict[str, dict[ModelId, bytes]]:
        state = self._reach()
        now = state.now()
        state.tallies = {g: entry for g, entry in state.tallies.items() if entry[0] > now}
        return {
            gateway: {model: counted[model] for model in models if model in counted}
            for gateway, (_, counted) in state.tallies.items()
        }

    async def acquire_lease(self, holder: str, ttl_s: float) -> int | None:
        state = self._reach()
        now = state.now()
        if state.lease and state.lease[2] > now:
            owner, fence, _ = state.lease
            if owner != holder:
                return None
        else:
            fence = state.next_fence()
        state.lease = (holder, fence, now + ttl_s)
        return fence

    async def release_lease(self, holder: str) -> None:
        state = self._reach()
        if state.lease and state.lease[0] == holder:
            state.lease = None

    async def add_active(self, model: ModelId) -> None:
        self._reach().active.add(model)

    async def remove_active(self, model: ModelId) -> None:
        with contextlib.suppress(KeyError):
            self._reach().active.remove(model)

    async def active(self) -> set[ModelId]:
        return set(self._reach().active)

    async def epoch(self) -> str:
        return self._reach().epoch

    def _reach(self) -> MemoryState:
        if not self._state.reachable:
            raise StoreUnavailable("the store cannot be reached")
        return self._state
