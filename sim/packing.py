"""Putting models onto workers by known rates: what the static baselines are made of."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from shared.models import Footprint
from shared.names import ModelId
from sim.model import Floats, SimModel, SimWorker, Workload
from sim.workloads import footprint

Placement = dict[str, list[ModelId]]
"""Models by worker."""


class Bin:
    """One worker while it is filled. `shared.fit.fit_tiers`, kept up to date instead of summed
    anew; simulated models share nothing, and have copies."""

    def __init__(self, worker: SimWorker) -> None:
        self.worker = worker
        self.models: dict[ModelId, SimModel] = {}
        self.load = 0.0
        """Device-seconds per second."""
        self._weights = 0
        self._workspace = 0
        self._largest = 0

    def __repr__(self) -> str:
        return f"Bin({self.worker.name}: {len(self.models)} models, load {self.load:.2f})"

    def has_room(self, model: SimModel, *, host: bool) -> bool:
        """`host`: what does not fit the device may wait in the host's memory."""
        size = footprint(model)
        used = self._weights + size.weights_bytes + max(self._workspace, size.workspace_bytes)
        if used <= self.worker.budget_bytes:
            return True
        if not host or not self.worker.host_bytes:
            return False
        largest = max(self._largest, size.weights_bytes + size.workspace_bytes)
        fits_both = used <= self.worker.budget_bytes + self.worker.host_bytes
        return fits_both and largest <= self.worker.budget_bytes

    def may_have(self, model: SimModel) -> bool:
        own = self.worker.reported_labels()
        selector = model.manifest.placement.worker_selector
        return model.id not in self.models and all(
            own.get(label) == value for label, value in selector.items()
        )

    def add(self, model: SimModel) -> None:
        size: Footprint = footprint(model)
        self.models[model.id] = model
        self._weights += size.weights_bytes
        self._workspace = max(self._workspace, size.workspace_bytes)
        self._largest = max(self._largest, size.weights_bytes + size.workspace_bytes)

    def without(self, model: ModelId) -> Bin:
        """Another one, with the rest of the models. Their load is not carried over."""
        rest = Bin(self.worker)
        for each in self.models.values():
            if each.id != model:
                rest.add(each)
        return rest


def mean_rates(
    workload: Workload, since: float = 0.0, until: float | None = None
) -> dict[ModelId, float]:
    """Requests per second of each model in [since, until): what only an oracle knows."""
    until = workload.duration_s if until is None else until
    first, last = np.searchsorted(workload.times, (since, until))
    counts = np.bincount(workload.which[first:last], minlength=len(workload.models))
    seconds = max(until - since, 1e-9)
    return {
        model.id: float(count) / seconds
        for model, count in zip(workload.models, counts, strict=True)
    }


def load_of(model: SimModel, rate: float) -> float:
    """Device-seconds per second that `rate` requests per second ask for, in batches as large as
    half of the latency target collects (Nexus' squishy packing): what is asked often is cheaper
    per request."""
    if not rate:
        return 0.0
    limit = max(model.manifest.max_batch_size, 1)
    rows = min(max(rate * model.manifest.target_ms / 2e3, 1.0), float(limit))
    return rate * batch_seconds(model, rows) / rows


def batch_seconds(model: SimModel, rows: float) -> float:
    """Between two measured sizes linear; beyond them in proportion to the nearest."""
    known: dict[int, float] = {case.rows: case.seconds for case in model.cases if case.seconds > 0}
    sizes: Floats = np.array(sorted(known), dtype=float)
    if not len(sizes):
        return 0.0
    if rows > sizes[-1]:
        return known[int(sizes[-1])] * rows / float(sizes[-1])
    return float(np.interp(rows, sizes, [known[int(size)] for size in sizes]))


def single_homed(
    models: Sequence[SimModel],
    workers: Sequence[SimWorker],
    rates: Mapping[ModelId, float],
    before: Mapping[str, Sequence[ModelId]] | None = None,
) -> list[Bin]:
    """The longest-processing-time rule: the heaviest model first, onto the least loaded worker
    that has room on its device, else one with room in its host's memory. What fits nowhere is
    left out. A worker that had the model `before` is taken when it is hardly busier."""
    bins = [Bin(worker) for worker in workers]
    loads = {model.id: load_of(model, rates.get(model.id, 0.0)) for model in models}
    slack = _SLACK * sum(loads.values()) / max(len(bins), 1)
    had = {name: set(held) for name, held in (before or {}).items()}
    for model in sorted(models, key=lambda each: (-loads[each.id], each.id)):
        for host in (False, True):
            open_to = [
                each for each in bins if each.may_have(model) and each.has_room(model, host=host)
            ]
            if open_to:
                chosen = min(open_to, key=lambda each: _busy(each, model, had, slack))
                chosen.add(model)
                chosen.load += loads[model.id] / chosen.worker.speed
                break
    return bins


def replicated(
    models: Sequence[SimModel],
    workers: Sequence[SimWorker],
    rates: Mapping[ModelId, float],
    before: Mapping[str, Sequence[ModelId]] | None = None,
    *,
    host: bool = False,
    least: float = 0.0,
) -> list[Bin]:
    """Copies into all memory (AlpaServe's greedy rule, without its model parallelism): one more
    goes to the model with the most load per copy, as long as there is memory; then all copies are
    packed, the heaviest first, onto the least loaded worker with room. `least`: whose load per copy
    (device-seconds per second) is not above this gets none: each copy takes its part of the
    requests, and smaller batches cost more per request."""
    loads = {model.id: load_of(model, rates.get(model.id, 0.0)) for model in models}
    counts = _copies(models, workers, loads, host=host, least=least)
    slack = _SLACK * sum(loads.values()) / max(len(workers), 1)
    had = {name: set(held) for name, held in (before or {}).items()}
    bins = [Bin(worker) for worker in workers]
    share = {model.id: loads[model.id] / counts[model.id] for model in models}
    for model in sorted(models, key=lambda each: (-share[each.id], each.id)):
        taken: set[str | None] = set()
        for copy in range(counts[model.id]):
            chosen = None
            for tier in (False, True) if host or not copy else (False,):
                open_to = [
                    each
                    for each in bins
                    if each.may_have(model)
                    and each.has_room(model, host=tier)
                    and (_domain(each.worker, model) not in taken or not copy)
                ]
                if open_to:
                    chosen = min(open_to, key=lambda each: _busy(each, model, had, slack))
                    break
            if chosen is None:
                break
            chosen.add(model)
            chosen.load += share[model.id] / chosen.worker.speed
            if model.manifest.placement.spread_by:
                taken.add(_domain(chosen.worker, model))
    placed = {name for each in bins for name in each.models}
    if len(placed) < len(models):
        # Copies have taken the last room of a model, or there was none: those count first.
        alone = single_homed(models, workers, rates, before)
        if len({name for each in alone for name in each.models}) > len(placed):
            return alone
    return bins


def _copies(
    models: Sequence[SimModel],
    workers: Sequence[SimWorker],
    loads: Mapping[ModelId, float],
    *,
    host: bool,
    least: float,
) -> dict[ModelId, int]:
    """How many each model gets."""
    counts = {model.id: 1 for model in models}
    by_id = {model.id: model for model in models}
    room = sum(worker.budget_bytes + host * worker.host_bytes for worker in workers)
    room -= sum(footprint(model).weights_bytes for model in models)
    queue = [(-loads[model.id], model.id) for model in models]
    heapq.heapify(queue)
    while queue and -queue[0][0] >= least:
        _, name = heapq.heappop(queue)
        model, size = by_id[name], footprint(by_id[name]).weights_bytes
        if size > room or counts[name] >= model.manifest.copies_limit(len(workers)):
            continue
        room -= size
        counts[name] += 1
        heapq.heappush(queue, (-loads[name] / counts[name], name))
    return counts


def everywhere(
    models: Sequence[SimModel], workers: Sequence[SimWorker], rates: Mapping[ModelId, float]
) -> list[Bin]:
    """`replicated` into the hosts' memory as well: where that holds all, every model is
    everywhere."""
    return replicated(models, workers, rates, host=True)


def placement(bins: Sequence[Bin]) -> Placement:
    return {each.worker.name: list(each.models) for each in bins}


_SLACK = 0.05
"""Of the mean load: a worker this much busier is still taken when it has the model already."""


def _busy(
    each: Bin, model: SimModel, had: Mapping[str, set[ModelId]], slack: float
) -> tuple[float, int, str]:
    name = each.worker.name
    stays = slack if model.id in had.get(name, ()) else 0.0
    return (each.load - stays, len(each.models), name)


def _domain(worker: SimWorker, model: SimModel) -> str | None:
    label = model.manifest.placement.spread_by
    if label is None:
        return None
    own = {"worker": worker.name, "device_kind": worker.device_kind, **worker.labels}
    return own.get(label)
