"""What the services need of a shared store, and nothing more.

Laws that both implementations keep (tests/contract/test_store.py): a report vanishes `ttl_s`
after its last writing; an assignment with a lower fence than the one stored is refused, and so
is a lower generation under the same fence; it goes with its worker, at the latest
`ASSIGNMENT_TTL_S` after the last writing of it or of the worker's report; of several holders at
most one has the lease, and each acquisition has a higher fence than any before, also after the
store lost everything.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from shared.control import Assignment, Report
from shared.errors import Unavailable
from shared.names import ModelId

ASSIGNMENT_TTL_S = 24 * 3600.0
"""How long an assignment outlives the last that was heard of its worker, unless the store is
opened with another time: long enough for an outage, and ids of workers are random by default,
so without an end they would add up."""


class StoreUnavailable(Unavailable):
    """The store cannot be reached. Services go on with what they know."""


class Store(Protocol):
    """One service's access to the shared store. Every call may raise `StoreUnavailable`."""

    async def start(self) -> None: ...
    async def close(self) -> None: ...

    # reports: worker → placer
    async def put_report(self, report: Report, ttl_s: float) -> None: ...
    async def remove_report(self, worker: str) -> None:
        """At a worker's orderly end. Removes its assignment as well."""

    async def reports(self) -> list[Report]:
        """All that have not expired. Undecodable ones are left out and logged."""

    # assignments: placer → worker
    async def put_assignment(self, assignment: Assignment) -> bool:
        """False when a newer placer's or a newer generation's word stands."""

    async def assignment(self, worker: str) -> Assignment | None: ...

    # hints: a wake-up that may be lost; whoever gets none reads again by himself
    async def hint(self, topic: str) -> None:
        """Wakes all that listen to `topic`."""

    def hints(self, *topics: str) -> AsyncIterator[str]:
        """Yields the topic at each hint. After a reconnect each topic is yielded once, since
        hints may have been lost meanwhile. Never raises `StoreUnavailable`; retries."""

    # notes: word to all who listen at this moment, and to nobody later
    async def note(self, topic: str, data: bytes) -> None:
        """Tells `data` to all that listen to `topic`. May be lost: nothing may depend on it."""

    def notes(self, topic: str) -> AsyncIterator[bytes]:
        """Yields each note. Never raises `StoreUnavailable`; retries."""

    # tallies: what each gateway has counted of a model, so that any can tell the sum
    async def put_tallies(
        self, gateway: str, tallies: Mapping[ModelId, bytes], ttl_s: float
    ) -> None:
        """Replaces those of these models; all of the gateway's go `ttl_s` after its last call."""

    async def tallies(self, models: Sequence[ModelId]) -> dict[str, dict[ModelId, bytes]]:
        """By gateway, what there is of `models`."""

    # the placer's lease
    async def acquire_lease(self, holder: str, ttl_s: float) -> int | None:
        """The fence when `holder` has the lease now (again, with the same fence, when it held
        it already and this renews it); None when another holds it."""

    async def release_lease(self, holder: str) -> None: ...

    # the queues that exist: written before a queue is declared, so that no placer forgets one
    async def add_active(self, model: ModelId) -> None: ...
    async def remove_active(self, model: ModelId) -> None: ...
    async def active(self) -> set[ModelId]: ...

    async def epoch(self) -> str:
        """Changes when the store started anew or lost its content."""


TOPIC_REPORTS = "reports"
"""Hinted when a report carries news that should not wait for the next tick."""
TOPIC_REGISTRY = "registry"
"""Hinted when a model was registered or removed, loaded or unloaded."""
TOPIC_LEASE = "lease"
"""Hinted when a placer let its lease go in order: who stands by need not wait."""
TOPIC_CANCELLED = "cancelled"
"""Noted when clients hung up: requests that need not run any more (shared/cancels.py)."""


def topic_assignment(worker: str) -> str:
    """Hinted when this worker's assignment changed."""
    return f"assignment.{worker}"
