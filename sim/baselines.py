"""Placements to compare with, each as good as we could make it. They decide for the same simulated
workers as Roost's placer does; where they are told what is to come, they say so.

| name | rule | source |
|---|---|---|
| `static` | each model on one worker, packed by the true mean rates of the whole run (an oracle) | |
| `static-replicated` | the same, and copies into all spare memory | AlpaServe's greedy placement |
| `static-replicated-0.05`, `-0.1` | ... of models whose copies have at least so much to do, in device-seconds per second: often better, as copies make batches smaller | ours |
| `static-everywhere` | every model on every worker that can swap it: Roost's worker under no placer | |
| `periodic` | `static-replicated-0.1` anew each minute, by the true rates of the last one (an oracle of the past), kept where it hardly matters | AlpaServe's re-placement |
| `clairvoyant` | the same every 10 s, by the true rates of the next 10: what no policy can know | |
| `modelmesh` | loads on a miss, evicts the least recently used; copies every 10 s by requests per minute | `ModelMesh.java` |
| `ray-serve` | multiplexed: loads on a miss, least recently used; another copy when nobody took a request for 1-2 s | `multiplex.py`, `request_router.py` |
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from shared.control import Report
from shared.names import ModelId
from sim.model import Decision, SimModel, SimWorker, Workload
from sim.packing import (
    Bin,
    everywhere,
    mean_rates,
    placement,
    replicated,
    single_homed,
)

Pack = Callable[[Sequence[SimModel], Sequence[SimWorker], Mapping[ModelId, float]], list[Bin]]

_NEVER_S = 60.0
"""A tick of a policy that has nothing to decide."""


class Static:
    """One placement for the whole run."""

    tick_s = _NEVER_S

    def __init__(self, workload: Workload, name: str, pack: Pack) -> None:
        self.name = name
        self._rates = mean_rates(workload)
        self._pack = pack

    def start(self, models: Sequence[SimModel], workers: Sequence[SimWorker]) -> Decision:
        return Decision(assigned=placement(self._pack(models, workers, self._rates)), why=self.name)

    def decide(
        self, reports: Sequence[Report], depths: Mapping[ModelId, int], now: float
    ) -> Decision:
        del reports, depths, now
        return Decision()

    def unrouted(self, model: ModelId, now: float) -> Decision:
        del model, now
        return Decision()


def static(workload: Workload) -> Static:
    return Static(workload, "static", single_homed)


def static_replicated(workload: Workload, least: float = 0.0) -> Static:
    """`least`: what a copy must have to do so that there is one more (`packing.replicated`)."""
    name = f"static-replicated-{least:g}" if least else "static-replicated"
    return Static(workload, name, partial(replicated, least=least))


def static_everywhere(workload: Workload) -> Static:
    return Static(workload, "static-everywhere", everywhere)


class Periodic(Static):
    """Packed anew every `period_s`, at once and for nothing but the loads that it causes; by the
    rates of the last period, or of the next one if it is `clairvoyant`."""

    def __init__(
        self, workload: Workload, period_s: float = 60.0, *, clairvoyant: bool = False
    ) -> None:
        super().__init__(workload, "clairvoyant" if clairvoyant else "periodic", self._packed)
        self.tick_s = period_s
        self._clairvoyant = clairvoyant
        if clairvoyant:
            self._rates = mean_rates(workload, 0.0, period_s)
        self._workload = workload
        self._models: Sequence[SimModel] = ()
        self._workers: Sequence[SimWorker] = ()
        self._placed: dict[str, list[ModelId]] = {}

    def _packed(
        self,
        models: Sequence[SimModel],
        workers: Sequence[SimWorker],
        rates: Mapping[ModelId, float],
    ) -> list[Bin]:
        return replicated(models, workers, rates, self._placed, least=0.1)

    def start(self, models: Sequence[SimModel], workers: Sequence[SimWorker]) -> Decision:
        self._models, self._workers = models, workers
        decision = super().start(models, workers)
        self._placed = {name: list(held) for name, held in decision.assigned.items()}
        return decision

    def decide(
        self, reports: Sequence[Report], depths: Mapping[ModelId, int], now: float
    ) -> Decision:
        del reports, depths
        if now <= 0 or now >= self._workload.duration_s:
            return Decision()
        since = now if self._clairvoyant else max(now - self.tick_s, 0.0)
        rates = mean_rates(self._workload, since, since + self.tick_s)
        placed = placement(self._packed(self._models, self._workers, rates))
        changed = {
            name: held for name, held in placed.items() if set(held) != set(self._placed[name])
        }
        self._placed = placed
        return Decision(assigned=changed, why="packed anew")


class Caching:
    """What ModelMesh and Ray Serve have in common: a model is loaded when it is asked for and is
    nowhere, and the least recently used one makes room. It sees what reports say, 5 times a
    second; both systems see their own requests at once, so within that time ties are random."""

    name = "caching"
    tick_s = 0.2

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._models: dict[ModelId, SimModel] = {}
        self._bins: dict[str, Bin] = {}
        self._used: dict[tuple[str, ModelId], float] = {}
        self._loaded: dict[tuple[str, ModelId], float] = {}
        self._counted: dict[tuple[str, ModelId], int] = {}

    def start(self, models: Sequence[SimModel], workers: Sequence[SimWorker]) -> Decision:
        """All models where they fit, each once, in no order: a cache that has been used before."""
        self._models = {model.id: model for model in models}
        bins = single_homed(models, workers, {})
        self._bins = {each.worker.name: each for each in bins}
        for each in bins:
            for model in each.models:
                self._loaded[each.worker.name, model] = self._used[each.worker.name, model] = -60.0
        return Decision(assigned=placement(bins), why="as it was")

    def decide(
        self, reports: Sequence[Report], depths: Mapping[ModelId, int], now: float
    ) -> Decision:
        arrived: dict[tuple[str, ModelId], int] = {}
        for report in reports:
            for seen in report.models:
                key = (report.worker, seen.model)
                new = seen.arrived - self._counted.get(key, 0)
                self._counted[key] = seen.arrived
                if new > 0:
                    arrived[key] = new
                    self._used[key] = now
        changed: set[str] = set()
        # What was evicted with requests in its queue is missed as soon as that is seen.
        for model, depth in depths.items():
            if depth and not self._holders(model):
                changed |= self._load(model, now)
        changed |= self.scale(arrived, depths, now)
        return self._decision(changed)

    def unrouted(self, model: ModelId, now: float) -> Decision:
        if self._holders(model):
            return Decision()
        return self._decision(self._load(model, now))

    def scale(
        self,
        arrived: Mapping[tuple[str, ModelId], int],
        depths: Mapping[ModelId, int],
        now: float,
    ) -> set[str]:
        """More copies, or fewer. Returns the workers that change."""
        raise NotImplementedError

    def choose(self, model: SimModel, now: float, *, more: bool) -> str | None:
        """The worker for one more copy; `more`: it has one already."""
        raise NotImplementedError

    # --- parts ---

    def _holders(self, model: ModelId) -> list[str]:
        return [name for name, each in self._bins.items() if model in each.models]

    def _open_to(self, model: SimModel) -> list[Bin]:
        return [
            each
            for each in self._bins.values()
            if each.may_have(model) and Bin(each.worker).has_room(model, host=False)
        ]

    def _oldest(self, each: Bin) -> float:
        """When the least recently used model of the worker was used."""
        name = each.worker.name
        return min((self._used.get((name, model), -60.0) for model in each.models), default=-60.0)

    def _load(self, model: ModelId, now: float, *, more: bool = False) -> set[str]:
        facts = self._models[model]
        if len(self._holders(model)) >= facts.manifest.copies_limit(len(self._bins)):
            return set()
        name = self.choose(facts, now, more=more)
        if name is None:
            return set()
        kept = self._bins[name]
        by_age = sorted(kept.models, key=lambda each: (self._used.get((name, each), -60.0), each))
        for victim in by_age:
            if kept.has_room(facts, host=False):
                break
            kept = kept.without(victim)
        kept.add(facts)
        self._bins[name] = kept
        self._used[name, model] = self._loaded[name, model] = now
        return {name}

    def _drop(self, model: ModelId, name: str) -> None:
        self._bins[name] = self._bins[name].without(model)

    def _decision(self, changed: set[str]) -> Decision:
        return Decision(
            assigned={name: list(self._bins[name].models) for name in sorted(changed)},
            why=self.name,
        )


class ModelMesh(Caching):
    """Rules of `ModelMesh.java`, without its rule that gives what was used 7 to 40 minutes ago a
    second copy, and without its janitor, which takes copies away every six minutes at the
    earliest: runs are shorter than both."""

    _EVERY_S = 10.0

    def __init__(self, seed: int = 0, scale_up_rpm: float = 2000.0) -> None:
        """`scale_up_rpm`: requests per minute and copy from which one more is made. ModelMesh's
        default; what suits a fleet depends on what one copy can do."""
        super().__init__(seed)
        self.name = "modelmesh" if scale_up_rpm == 2000.0 else f"modelmesh-{scale_up_rpm:g}rpm"
        self._threshold = scale_up_rpm
        self._recent: dict[tuple[str, ModelId], int] = {}
        self._rpm: dict[str, float] = {}
        self._scaled_at = 0.0

    def scale(
        self,
        arrived: Mapping[tuple[str, ModelId], int],
        depths: Mapping[ModelId, int],
        now: float,
    ) -> set[str]:
        del depths
        for key, count in arrived.items():
            self._recent[key] = self._recent.get(key, 0) + count
        elapsed = now - self._scaled_at
        if elapsed < self._EVERY_S - 1e-9:
            return set()
        per_minute = {key: count * 60 / elapsed for key, count in self._recent.items()}
        self._recent, self._scaled_at = {}, now
        self._rpm = dict.fromkeys(self._bins, 0.0)
        by_model: dict[ModelId, float] = {}
        for (name, model), rpm in per_minute.items():
            self._rpm[name] = self._rpm.get(name, 0.0) + rpm
            by_model[model] = by_model.get(model, 0.0) + rpm
        changed: set[str] = set()
        for model, rpm in sorted(by_model.items(), key=lambda each: (-each[1], each[0])):
            holders = self._holders(model)
            if not holders or rpm / len(holders) < self._threshold:
                continue
            facts = self._models[model]
            lately = elapsed + 10.0 + 2 * facts.load_seconds
            if any(now - self._loaded[name, model] < lately for name in holders):
                continue
            more = min(int(rpm / len(holders) / self._threshold), len(self._open_to(facts)))
            if more > 2:
                more = min(more, max(len(self._bins) // 3, 1))
            for _ in range(more):
                changed |= self._load(model, now, more=True)
        return changed

    def choose(self, model: SimModel, now: float, *, more: bool) -> str | None:
        open_to = self._open_to(model)
        if not open_to:
            return None
        free = [each for each in open_to if each.has_room(model, host=False)]
        if not free:
            # All full: where the least recently used is oldest.
            return min(open_to, key=lambda each: (self._oldest(each), each.worker.name)).worker.name
        least = min(len(each.models) for each in free)
        short = [each for each in free if len(each.models) <= 1.25 * least + 1]
        quiet = min(self._rpm.get(each.worker.name, 0.0) for each in short)
        used = max((self._used.get((name, model.id), -1e9) for name in self._bins), default=-1e9)
        factor = 1.1 if more else 1.5 if now - used < 5 else 3.0 if now - used < 720 else 4.0
        picked = [
            each.worker.name
            for each in short
            if self._rpm.get(each.worker.name, 0.0) <= factor * quiet + 1e-9
        ]
        return picked[int(self._rng.integers(len(picked)))]


class RayServe(Caching):
    """Model multiplexing of a deployment of fixed size. A request waits 1 to 2 seconds (drawn)
    for a replica that has its model; then it goes to the one with the fewest models."""

    name = "ray-serve"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._waits_until: dict[ModelId, float] = {}

    def scale(
        self,
        arrived: Mapping[tuple[str, ModelId], int],
        depths: Mapping[ModelId, int],
        now: float,
    ) -> set[str]:
        del arrived
        changed: set[str] = set()
        waiting = {model for model, depth in depths.items() if depth}
        for model in self._waits_until.keys() - waiting:
            del self._waits_until[model]
        for model in sorted(waiting):
            until = self._waits_until.setdefault(model, now + float(self._rng.uniform(1.0, 2.0)))
            if now >= until and self._holders(model):
                del self._waits_until[model]
                changed |= self._load(model, now, more=True)
        return changed

    def choose(self, model: SimModel, now: float, *, more: bool) -> str | None:
        del now, more
        open_to = self._open_to(model)
        if not open_to:
            return None
        # Fewest models, and of two drawn at random the one that was asked for less lately.
        fewest = min(len(each.models) for each in open_to)
        among = [each for each in open_to if len(each.models) == fewest]
        drawn = self._rng.choice(len(among), size=min(2, len(among)), replace=False)
        pair = [among[int(each)] for each in drawn]
        return min(pair, key=lambda each: (self._oldest(each), each.worker.name)).worker.name
