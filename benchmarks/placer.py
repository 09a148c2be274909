"""N7, the placer's part: what one tick of it costs, from reports to what is wanted, and what an
active model costs that nobody asks for.

Times are CPU seconds of the one thread that it runs in: the decision waits for nothing, and on a
machine that is shared the wall clock would measure the others."""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.statistics import median, quantile
from services.placer.core.plan import place_one, plan, relieve
from services.placer.core.policy import Policy
from services.placer.core.verify import verify
from services.placer.knowledge import Active, Knowledge
from shared.control import ModelReport, Report
from shared.models import Footprint, Manifest
from shared.names import ModelId

_FLEETS = ((100, 4), (300, 60), (1_000, 100), (10_000, 1_000))
_REFLEX_FLEET = (300, 60)
"""The fleet of which 10 ms is asked: the others show how it grows."""
_COPIES = 2
_CHANGES = 2_000
_SPIKES = 20
_TICK_S = 0.2
_LEAST_TICKS = 60
_GB = 1 << 30
T = TypeVar("T")
_EVERY = 5
"""Ticks of 200 ms between a worker's reports, where it reports once a second, or at news. With the
default of 0.25 s nearly all have a new one at each tick: the other half of the figures."""
_PARTS = ("see", "view", "plan", "verify", "commit")
_TICK_REACH_MS = 100.0
_REFLEX_REACH_MS = 10.0


class Fleet:
    """Workers that report as real ones do, whole, without a network: what they tell follows
    what is assigned to them, a tick later."""

    def __init__(self, models: int, workers: int, seed: int = 0, *, every: int = 1) -> None:
        """Each worker reports at every so many ticks."""
        self.time = 1000.0
        self._every = every
        self._last: dict[str, Report] = {}
        self._random = random.Random(seed)
        self.knowledge = Knowledge(Policy(), clock=lambda: self.time)
        self.models = [ModelId(f"m{number}/1") for number in range(models)]
        self.workers = [f"w{number:04}" for number in range(workers)]
        self._answered = dict.fromkeys(self.models, 0)
        self._used = dict.fromkeys(self.models, 0.0)
        self.held = dict.fromkeys(self.models, 0)
        self.rate = dict.fromkeys(self.models, 0)
        self._seq = 0
        # Room for half as many again: who spikes finds it, and spare copies do, too.
        self._budget = int(models * _COPIES / workers * 1.5) * _GB + _GB
        for model in self.models:
            self.knowledge.activate(model, _manifest(model), why="benchmark")
        homes: dict[str, dict[ModelId, str]] = {worker: {} for worker in self.workers}
        for model in self.models:
            for worker in self._random.sample(self.workers, min(_COPIES, workers)):
                homes[worker][model] = "benchmark"
        for worker, assigned in homes.items():
            self.knowledge.adopt(worker, assigned, 1)

    def reports(self) -> list[Report]:
        """Of all workers. A new one is an object of its own, as if it had been decoded."""
        self._seq += 1
        copies = {model: self.knowledge.copies(model) for model in self.models}
        for number, worker in enumerate(self.workers):
            if worker not in self._last or (number + self._seq) % self._every == 0:
                self._last[worker] = self._report(worker)
        for model, rate in self.rate.items():
            if rate:
                self._answered[model] += rate // max(copies[model], 1)
                self._used[model] = self.time
        return list(self._last.values())

    def _report(self, worker: str) -> Report:
        return Report(
            worker=worker,
            incarnation="a",
            seq=self._seq,
            at=self.time,
            device_kind="sim",
            device_name="sim",
            budget_bytes=self._budget,
            used_bytes=0,
            measured_bytes=0,
            generation=1,
            models=tuple(
                ModelReport(
                    model=model,
                    tier="device",
                    phase="ready",
                    bound=True,
                    footprint=Footprint(_GB, 1 << 20),
                    held=self.held[model],
                    arrived=self._answered[model],
                    seconds_per_item=0.01,
                    load_seconds=0.05,
                    last_used=self._used[model],
                )
                for model in self.knowledge.assigned.get(worker, ())
            ),
        )

    def change(self, models: int, *, most: int) -> None:
        """So many models are asked more or less often than before."""
        for model in self._random.sample(self.models, min(models, len(self.models))):
            self.rate[model] = self._random.randint(0, most)
            self.held[model] = self._random.randint(0, 1)

    def spike(self, models: int, *, held: int) -> list[ModelId]:
        """So many models hold so many requests on each of their workers."""
        spiking = self._random.sample(self.models, models)
        for model in spiking:
            self.held[model] = held
        return spiking

    def calm(self, models: list[ModelId]) -> None:
        for model in models:
            self.held[model] = 0

    def tick(self) -> tuple[dict[str, float], int]:
        """Seconds by part, and the changes that were decided."""
        self.time += _TICK_S
        reports, seconds = self.reports(), dict[str, float]()
        knowledge = self.knowledge

        def timed(part: str, what: Callable[[], T]) -> T:
            began = time.thread_time()
            result = what()
            seconds[part] = seconds.get(part, 0.0) + time.thread_time() - began
            return result

        timed("see", lambda: knowledge.see(reports, {}, self.time))
        view = timed("view", knowledge.view)
        decided = timed("plan", lambda: plan(view, knowledge.policy))
        # As the cycle does: nothing has changed meanwhile.
        kept, _ = timed("verify", lambda: verify(decided, view))
        timed("commit", lambda: knowledge.commit(kept))
        timed("commit", lambda: knowledge.remember(kept))
        return seconds, len(kept.bind) + len(kept.unbind)

    def relief(self) -> float:
        """Seconds from the reports that tell of a model that does not keep up, to the copy that it
        gets before anything else is planned (`Cycle`)."""
        [spiking] = self.spike(1, held=64)
        self.time += _TICK_S / 10
        self._seq += 1
        for worker in self.workers:
            if spiking in self.knowledge.assigned[worker]:
                self._last[worker] = self._report(worker)
        reports, knowledge = list(self._last.values()), self.knowledge
        began = time.thread_time()
        knowledge.see(reports, {}, self.time)
        knowledge.commit(relieve(knowledge.view(), [spiking], knowledge.policy))
        took = time.thread_time() - began
        self.calm([spiking])
        self.tick()  # unmeasured
        return took

    def reflex(self, number: int) -> float:
        """Seconds to find the first worker for a model that came just now."""
        model = ModelId(f"new{number}/1")
        newcomer = Active(_manifest(model))
        began = time.thread_time()
        place_one(self.knowledge.view((model, newcomer)), model, self.knowledge.policy)
        return time.thread_time() - began


async def run(
    device: str, *, ticks: int = 100, fleets: tuple[tuple[int, int], ...] = _FLEETS
) -> Outcome:
    """Ticks at which a fifth of the workers have reported anew (once a second each), and ticks at
    which all have (as by default, four times a second): the reach of 100 ms is that of a whole
    tick of the largest fleet, whatever changes. `device` is not used: the core runs on one core
    of the CPU. Raises `ValueError` for fewer ticks than a p99 needs to mean anything."""
    if ticks < _LEAST_TICKS:
        raise ValueError(f"{ticks} ticks tell no p99; {_LEAST_TICKS} at least")
    del device
    began = time.monotonic()
    figures: list[Figure] = []
    # As the service does when it starts (`services.placer.__main__`).
    gc.collect()
    gc.freeze()
    collector = _Collector()
    gc.callbacks.append(collector)
    try:
        _measure(figures, ticks, fleets, collector)
    finally:
        gc.callbacks.remove(collector)
        gc.unfreeze()
    figures.append(Figure("memory of an idle active model", idle_bytes(), "B", 2048))
    figures.sort(key=lambda figure: figure.reach is None)
    return Outcome(
        name="placer",
        what="ticks of the placer's core: reports of a fifth of the workers or of all, view, plan, "
        "verify, commit; and the reflex, from reports or a first request to the choice",
        machine=machine("cpu", "not used"),
        figures=tuple(figures),
        at=now(),
        seconds=time.monotonic() - began,
    )


class _Collector:
    """Seconds that garbage collections took, whoever caused them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.thread_time()
        else:
            self.seconds += time.thread_time() - self._began


def _measure(
    figures: list[Figure], ticks: int, fleets: tuple[tuple[int, int], ...], collector: _Collector
) -> None:
    for models, workers in fleets:
        size = f"{models:,} models x {workers:,} workers"
        largest = (models, workers) == fleets[-1]
        for every, told in ((_EVERY, ""), (1, ", all workers report")):
            fleet = Fleet(models, workers, every=every)
            fleet.change(models // 5, most=4)
            for _ in range(2 * _EVERY):
                fleet.tick()
            for what, run_one in _loads(fleet, models):
                measured, collected = [], []
                for _ in range(ticks):
                    before = collector.seconds
                    measured.append(run_one())
                    collected.append((collector.seconds - before) * 1e3)
                load = f"{size}, {what}{told}"
                reach = _TICK_REACH_MS if largest else None
                figures += _figures(load, measured, reach=reach)
                figures.append(
                    Figure(f"{load}: garbage collection, p99", quantile(collected, 0.99), "ms")
                )
        reach = _REFLEX_REACH_MS if (models, workers) == _REFLEX_FLEET else None
        reflexes = (
            ("a first request", [fleet.reflex(number) for number in range(ticks)]),
            ("a model that does not keep up", [fleet.relief() for _ in range(ticks)]),
        )
        for what, seconds in reflexes:
            told = f"{size}, reflex to {what}: p99"
            figures.append(Figure(told, quantile(seconds, 0.99) * 1e3, "ms", reach))


def idle_bytes(models: int = 5_000) -> float:
    """What the placer holds per active model that has no binding and is not asked."""
    names = [ModelId(f"idle{number}/1") for number in range(models)]
    manifests = [_manifest(name) for name in names]
    knowledge = Knowledge(Policy(), clock=lambda: 1000.0)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for name, manifest in zip(names, manifests, strict=True):
        knowledge.activate(name, manifest, why="idle")
    knowledge.view()
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / models


def _loads(
    fleet: Fleet, models: int
) -> Iterator[tuple[str, Callable[[], tuple[dict[str, float], int]]]]:
    def spikes() -> tuple[dict[str, float], int]:
        spiking = fleet.spike(min(_SPIKES, models // 5), held=60)
        measured = fleet.tick()
        fleet.calm(spiking)
        return measured

    def changes() -> tuple[dict[str, float], int]:
        fleet.change(min(_CHANGES, models // 5), most=4)
        return fleet.tick()

    def decisions() -> tuple[dict[str, float], int]:
        # Each asks for one copy more: 2 x 16 x 0.01 s within 0.2 s.
        spiking = fleet.spike(min(_CHANGES, models // 5), held=16)
        measured = fleet.tick()
        fleet.calm(spiking)
        for _ in range(2):  # released, unmeasured: the next round starts from about here
            fleet.time += 30.0
            fleet.tick()
        return measured

    yield "at rest", fleet.tick
    yield "20 spikes", spikes
    yield "2,000 models change", changes
    yield "2,000 models need more", decisions


def _figures(
    what: str, measured: list[tuple[dict[str, float], int]], *, reach: float | None
) -> list[Figure]:
    whole = [sum(seconds.values()) * 1e3 for seconds, _ in measured]
    plans = [seconds["plan"] * 1e3 for seconds, _ in measured]
    figures = [
        Figure(f"{what}: whole tick, p99", quantile(whole, 0.99), "ms", reach),
        Figure(f"{what}: plan, p99", quantile(plans, 0.99), "ms"),
        Figure(f"{what}: whole tick, p50", median(whole), "ms"),
        Figure(f"{what}: bindings changed, most", max(n for _, n in measured), ""),
    ]
    for part in _PARTS:
        part_ms = [seconds[part] * 1e3 for seconds, _ in measured]
        figures.append(Figure(f"{what}: {part}, p50", median(part_ms), "ms"))
    return figures


def _manifest(model: ModelId) -> Manifest:
    name = model.removesuffix("/1")
    digest = "sha256:" + name.encode().hex().zfill(64)[-64:]
    return msgspec.structs.replace(_ANY, name=name, digest=digest)


_ANY = Manifest(name="m", version=1, digest="sha256:" + "0" * 64, size_bytes=_GB, created_at=0.0)
