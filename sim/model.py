"""What is simulated: models, workers, arrivals, and what became of them. Data only.

Times are virtual seconds from the start of the run. A `Workload` holds every arrival beforehand,
so that all policies are given the very same requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from shared.control import Report
from shared.models import Case, Manifest
from shared.names import ModelId

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]


class SimModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model as the simulator knows it: its manifest, and what was measured of it."""

    manifest: Manifest
    cases: tuple[Case, ...]
    """Seconds on a device of speed 1 by batch size; between two sizes linear."""
    weights_bytes: int
    load_seconds: float
    """From the disk to the device, at speed 1."""
    swap_seconds: float
    """From the host's memory to the device, at speed 1."""
    architecture: str = ""
    """Models of one architecture share a skeleton; "" : a module of its own."""

    @property
    def id(self) -> ModelId:
        return self.manifest.id


class SimWorker(msgspec.Struct, frozen=True, kw_only=True):
    """One worker with one device."""

    name: str
    budget_bytes: int
    host_bytes: int = 0
    speed: float = 1.0
    """Of computing, over that of the device on which the models were measured."""
    copy_speed: float = 1.0
    """Of loading, likewise."""
    device_kind: str = "sim"
    labels: Mapping[str, str] = {}

    def reported_labels(self) -> dict[str, str]:
        """As a worker reports them: its settings, and what each worker has. It is its own host."""
        own = {"worker": self.name, "host": self.name, "device_kind": self.device_kind}
        return {**self.labels, **own}


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests beforehand. `times` (s, ascending) and `which` (index into `models`) are as long
    as one another."""

    name: str
    models: tuple[SimModel, ...]
    times: Floats
    which: Ints
    duration_s: float
    """Arrivals end here; the run goes on until all are answered, or their time is over."""
    warmup_s: float = 0.0
    """Requests before this are served and not counted."""
    seed: int = 0


Ending = Literal["answered", "late", "refused", "lost"]
"""`late`: not answered before its time was over. `refused`: answered with an error."""
ENDINGS: tuple[Ending, ...] = ("answered", "late", "refused", "lost")


class Change(msgspec.Struct, frozen=True):
    """One change of a binding, or of what a worker holds."""

    at: float
    what: Literal["bound", "unbound", "loaded", "evicted", "worker_added", "worker_removed"]
    model: str = ""
    worker: str = ""
    why: str = ""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a workload under a policy. `latency` (s; nan unless answered) and `ending`
    (index into `ENDINGS`) go with `workload.times`."""

    workload: Workload
    policy: str
    latency: Floats
    ending: Ints
    busy_s: Mapping[str, float]
    """Seconds each worker's device ran batches."""
    changes: tuple[Change, ...] = ()
    load_seconds: float = 0.0
    """All workers' seconds spent loading."""
    workers_over_time: tuple[tuple[float, int], ...] = ()
    events: int = 0
    """Of the simulation itself."""
    wall_s: float = 0.0
    """What simulating it took."""

    def attainment(self) -> float:
        """Share of the counted requests that were answered within their model's `target_ms`:
        what was refused or lost counts as missed. 1.0 when none was counted."""
        targets = np.array([m.manifest.target_ms / 1e3 for m in self.workload.models])
        counted = self.workload.times >= self.workload.warmup_s
        if not counted.any():
            return 1.0
        met = self.latency[counted] <= targets[self.workload.which[counted]]  # nan is not
        return float(met.mean())


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy wants bound, whole, per worker that changes."""

    assigned: Mapping[str, Sequence[ModelId]] = {}
    why: str = ""
    ended: frozenset[str] = frozenset()
    """Of these workers, those that are to finish what they hold and end."""
    shares: Mapping[str, float] = {}
    """Of device time, by tenant, where not 1."""


class Placing(Protocol):
    """Who decides which worker consumes which queue. All of them see the same: reports as the
    workers send them, and the depths of queues; none sees the arrivals that are to come."""

    name: str
    tick_s: float
    """`decide` is asked this often."""

    def start(self, models: Sequence[SimModel], workers: Sequence[SimWorker]) -> Decision:
        """At time 0, before any report."""
        ...

    def decide(
        self, reports: Sequence[Report], depths: Mapping[ModelId, int], now: float
    ) -> Decision:
        """At each tick. `depths`: ready messages of every queue."""
        ...

    def unrouted(self, model: ModelId, now: float) -> Decision:
        """A request came for a model whose queue nobody consumes. It waits in the queue."""
        ...
