"""Small fleets and workloads for the simulator's tests, and placings that decide little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shared.control import Report
from shared.models import Case, Manifest
from shared.names import ModelId
from sim.model import Decision, SimModel, SimWorker, Workload

MIB = 1 << 20


def model(
    number: int = 0,
    *,
    seconds: Mapping[int, float] | None = None,
    mib: int = 1,
    load_seconds: float = 0.1,
    swap_seconds: float = 0.01,
    workspace_bytes: int = 0,
    **spec,
) -> SimModel:
    cases = seconds or {1: 0.005, 16: 0.020}
    manifest = Manifest(
        name=f"m{number}",
        version=1,
        digest="sha256:" + "0" * 64,
        size_bytes=mib * MIB,
        created_at=0.0,
        **({"max_batch_size": 16} | spec),
    )
    return SimModel(
        manifest=manifest,
        cases=tuple(Case(rows, 0, took, workspace_bytes) for rows, took in cases.items()),
        weights_bytes=mib * MIB,
        load_seconds=load_seconds,
        swap_seconds=swap_seconds,
    )


def worker(number: int = 0, *, room_mib: int = 1000, host_mib: int = 0, **more) -> SimWorker:
    return SimWorker(
        name=f"w{number}", budget_bytes=room_mib * MIB, host_bytes=host_mib * MIB, **more
    )


def requests(models: Sequence[SimModel], *arrivals: tuple[float, int]) -> Workload:
    """`arrivals`: when, and of which model."""
    ordered = sorted(arrivals)
    return Workload(
        name="by hand",
        models=tuple(models),
        times=np.array([at for at, _ in ordered]),
        which=np.array([which for _, which in ordered], np.int32),
        duration_s=ordered[-1][0] if ordered else 0.0,
    )


def poisson(
    models: Sequence[SimModel],
    rates: Sequence[float],
    *,
    begin: float = 0.0,
    end: float,
    seed: int = 0,
) -> Workload:
    """Requests per second by model."""
    random = np.random.default_rng(seed)
    times, which = [], []
    for index, rate in enumerate(rates):
        count = random.poisson(rate * (end - begin))
        times.append(random.uniform(begin, end, count))
        which.append(np.full(count, index, np.int32))
    order = np.argsort(np.concatenate(times), kind="stable")
    return Workload(
        name="poisson",
        models=tuple(models),
        times=np.concatenate(times)[order],
        which=np.concatenate(which)[order],
        duration_s=end,
        seed=seed,
    )


def joined(*workloads: Workload) -> Workload:
    times = np.concatenate([workload.times for workload in workloads])
    order = np.argsort(times, kind="stable")
    return Workload(
        name="joined",
        models=workloads[0].models,
        times=times[order],
        which=np.concatenate([workload.which for workload in workloads])[order],
        duration_s=max(workload.duration_s for workload in workloads),
    )


class Fixed:
    """Assigns what it is told at the start, and keeps what it is shown."""

    name = "fixed"
    tick_s = 0.2

    def __init__(self, assigned: Mapping[str, Sequence[SimModel]]) -> None:
        self._assigned = {worker: [m.id for m in models] for worker, models in assigned.items()}
        self.seen: list[tuple[float, Sequence[Report]]] = []
        self.unrouted_at: list[tuple[float, ModelId]] = []

    def start(self, models: Sequence[SimModel], workers: Sequence[SimWorker]) -> Decision:
        return Decision(assigned=self._assigned, why="fixed")

    def decide(
        self, reports: Sequence[Report], depths: Mapping[ModelId, int], now: float
    ) -> Decision:
        self.seen.append((now, reports))
        return Decision()

    def unrouted(self, model: ModelId, now: float) -> Decision:
        self.unrouted_at.append((now, model))
        return Decision()
