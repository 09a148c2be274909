"""The choice of a worker for one more copy of a model, and of who makes room for it.

All workers are judged at once by arrays; the question of memory is asked exactly
(`shared.fit`) only of the best, and only where bounds do not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import msgspec
import numpy as np

from services.placer.core.changes import Considered
from services.placer.core.columns import Bools, Floats, Ints
from services.placer.core.fleet import Fleet
from services.placer.core.refused import Refused
from services.placer.core.victims import Victims
from services.placer.core.view import ModelView, expected
from shared.control import ModelReport
from shared.fit import Refusal, fit, fit_tiers
from shared.models import Footprint
from shared.names import ModelId

_CONSIDERED = 3
"""Workers of which the choice is explained."""
_ONE_BY_ONE = 16
"""As long as no more models are placed, who reports each is looked up worker by worker."""


class Chosen(msgspec.Struct, frozen=True):
    """Where a copy goes, and which models make room for it."""

    worker: int
    why: str
    load_s: float
    considered: tuple[Considered, ...]
    victims: tuple[ModelId, ...] = ()


class _Sizes(msgspec.Struct, frozen=True):
    """What the newcomer takes, per worker or everywhere: bounds of what it adds to what is
    there, and what it is by itself."""

    least: Ints | int
    most: Ints | int


class Chooser:
    """Chooses on one fleet, whose changes it sees."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.victims = Victims(fleet)
        kinds = sorted({each.device_kind for each in fleet.workers})
        self._kinds = kinds
        code = {kind: number for number, kind in enumerate(kinds)}
        self._kind: Ints = np.array([code[each.device_kind] for each in fleet.workers], np.int64)
        self._failing = [n for n, each in enumerate(fleet.workers) if each.failed]
        self._uneven = bool((fleet.slowness != 1.0).any())
        self._per_byte: Floats = fleet.policy.memory_weight / np.maximum(fleet.budget, 1)
        self._matching: dict[tuple[str, str], Bools] = {}
        self._domains: dict[str, list[str]] = {}
        self._lookups = 0
        self._reporting: dict[ModelId, list[int]] | None = None

    def __repr__(self) -> str:
        return f"<Chooser {self.fleet!r}>"

    def choose(
        self,
        facts: ModelView,
        *,
        may_evict: bool = False,
        extra: bool = False,
        among: Bools | None = None,
    ) -> Chosen | Refused:
        """The worker that will serve one more copy soonest: by what is running there, and by
        what it costs to load. One whose device has room is taken before any other; then one that
        has room in its host's memory, and swaps; last one where others must make room. An
        `extra` copy does not go where enough was loaded lately. `among`: one of these."""
        fleet = self.fleet
        reports = self._reports(facts.model)
        score, held_back = self._scores(facts, reports, extra=extra)
        if among is not None:
            score[~among] = np.inf
        sizes = self._sizes(facts, reports)
        free = fleet.free()
        device = np.where(sizes.least <= free, score, np.inf)
        for worker in _ascending(device):
            if _at(sizes.most, worker) <= free[worker] or self._fits_device(facts, worker):
                return self._chosen(facts, worker, score, reports, "")
        room = free + fleet.host
        if fleet.host.any():
            tiers = np.where((sizes.least <= room) & (fleet.host > 0), score, np.inf)
            for worker in _ascending(tiers):
                if self._refusal(facts, worker) is None:
                    return self._chosen(facts, worker, score, reports, ", to be swapped in")
        if may_evict:
            room += self.victims.reclaimable()
            best = self._evicting(facts, np.where(sizes.least <= room, score, np.inf))
            if best is not None:
                worker, victims, regret = best
                return self._chosen(facts, worker, score, reports, "", victims, regret)
        return self._refuse(facts, score, held_back)

    def spare(self, facts: ModelView) -> Chosen | None:
        """A worker whose device has room to spare for a copy that nobody needs yet."""
        fleet, policy = self.fleet, self.fleet.policy
        reports = self._reports(facts.model)
        score, _ = self._scores(facts, reports, extra=True)
        free = fleet.free() - (policy.spare_reserve * fleet.budget).astype(np.int64)
        score[self._sizes(facts, reports).most > free] = np.inf
        score[~fleet.serves] = np.inf
        score[fleet.busy > policy.spare_below] = np.inf
        for worker in _ascending(score):
            return self._chosen(facts, worker, score, reports, "")
        return None

    def matches(self, facts: ModelView) -> Bools | None:
        """Workers with the labels that the model asks for; None: it asks for none."""
        found: Bools | None = None
        for item in facts.placement.worker_selector.items():
            having = self._matching.get(item)
            if having is None:
                label, value = item
                workers = self.fleet.workers
                having = np.array([each.labels.get(label) == value for each in workers], bool)
                self._matching[item] = having
            found = having if found is None else found & having
        return found

    def domain(self, label: str, worker: int) -> str:
        """The worker's value of the label. One without it is a domain of its own."""
        values = self._domains.get(label)
        if values is None:
            values = self._domains[label] = [
                each.labels.get(label, f"\0{each.worker}") for each in self.fleet.workers
            ]
        return values[worker]

    def fits(self, facts: ModelView, worker: int) -> Refusal | None:
        """None when the worker has room for the model, else why not."""
        free = self.fleet.budget[worker] - self.fleet.used[worker]
        size = self.fleet.size_on(worker, facts.model)
        if size.weights_bytes + size.workspace_bytes <= free:
            return None
        return self._refusal(facts, worker)

    # --- parts ------------------------------------------------------------------------------

    def _scores(
        self, facts: ModelView, reports: dict[int, ModelReport], *, extra: bool
    ) -> tuple[Floats, bool]:
        """By worker, inf where it cannot be; and whether some were held back for what they have
        loaded lately. Without what loading costs where nothing is known of the model: that is
        the same everywhere."""
        fleet, policy = self.fleet, self.fleet.policy
        score: Floats = fleet.busy + self._per_byte * fleet.used
        if self._uneven:
            score += fleet.share(facts.model) * (fleet.slowness - 1.0)
        plain = self._load_seconds(None, facts)
        for worker, report in reports.items():
            score[worker] += policy.load_weight * (self._load_seconds(report, facts) - plain)
        score[~fleet.takes] = np.inf
        score[fleet.holders(facts.model)] = np.inf
        for worker in self._failing:
            if facts.model in fleet.workers[worker].failed:
                score[worker] = np.inf
        matching = self.matches(facts)
        if matching is not None:
            score[~matching] = np.inf
        for worker in self.crowded(facts):
            score[worker] = np.inf
        held_back = False
        if extra:
            full = fleet.copied >= policy.load_share * policy.load_window_s
            if full.any():
                held_back = bool(np.isfinite(score[full]).any())
                score[full] = np.inf
        return score, held_back

    def crowded(self, facts: ModelView) -> list[int]:
        """Workers that have the same value of the label by which the model is spread as one
        that serves a copy."""
        label = facts.placement.spread_by
        if label is None:
            return []
        fleet = self.fleet
        taken = {self.domain(label, w) for w in fleet.holders(facts.model) if fleet.serves[w]}
        return [w for w in range(len(fleet.workers)) if self.domain(label, w) in taken]

    def _sizes(self, facts: ModelView, reports: dict[int, ModelReport]) -> _Sizes:
        kinds = [expected(kind, facts) for kind in self._kinds]
        if len(kinds) == 1 and not reports:
            return _Sizes(*_bounds(kinds[0]))
        least = np.array([_bounds(size)[0] for size in kinds], np.int64)[self._kind]
        most = np.array([_bounds(size)[1] for size in kinds], np.int64)[self._kind]
        for worker in reports:
            least[worker], most[worker] = _bounds(self.fleet.size_on(worker, facts.model))
        return _Sizes(least, most)

    def _reports(self, model: ModelId) -> dict[int, ModelReport]:
        """What workers say of the model that could have a copy of it and have none."""
        workers, have = self.fleet.workers, self.fleet.holders(model)
        self._lookups += 1
        if self._reporting is None and self._lookups <= _ONE_BY_ONE:
            found = [(n, each.reported.get(model)) for n, each in enumerate(workers)]
            return {n: told for n, told in found if told is not None and n not in have}
        if self._reporting is None:
            self._reporting = {}
            for number, each in enumerate(workers):
                for reported in each.reported:
                    self._reporting.setdefault(reported, []).append(number)
        told = self._reporting.get(model, ())
        return {n: workers[n].reported[model] for n in told if n not in have}

    def _fits_device(self, facts: ModelView, worker: int) -> bool:
        held = self.fleet.sizes(worker).values()
        size = self.fleet.size_on(worker, facts.model)
        return fit(size, held, self.fleet.workers[worker].budget_bytes) is None

    def _refusal(self, facts: ModelView, worker: int) -> Refusal | None:
        seen = self.fleet.workers[worker]
        size = self.fleet.size_on(worker, facts.model)
        held = self.fleet.sizes(worker).values()
        return fit_tiers(size, held, seen.budget_bytes, seen.host_bytes)

    def _evicting(
        self, facts: ModelView, score: Floats
    ) -> tuple[int, tuple[ModelId, ...], float] | None:
        """Where making room costs least, and who makes it: regret is in the score's unit."""
        best: tuple[int, tuple[ModelId, ...], float] | None = None
        lowest = math.inf
        for worker in _ascending(score):
            if score[worker] >= lowest:
                break
            found = self.victims.make_room(worker, facts)
            if found is not None and score[worker] + found[1] < lowest:
                lowest = float(score[worker]) + found[1]
                best = (worker, *found)
        return best

    def _load_seconds(self, report: ModelReport | None, facts: ModelView) -> float:
        if report is not None and report.tier == "device":
            return 0.0
        policy = self.fleet.policy
        seconds = self.fleet.load_seconds(facts)
        if report is not None and report.tier == "host":
            return report.load_seconds or seconds * policy.host_load_share
        return seconds

    def _chosen(
        self,
        facts: ModelView,
        worker: int,
        score: Floats,
        reports: dict[int, ModelReport],
        how: str,
        victims: tuple[ModelId, ...] = (),
        regret: float = 0.0,
    ) -> Chosen:
        fleet = self.fleet
        report = reports.get(worker)
        tier = "disk" if report is None else report.tier
        busy = max(float(fleet.busy[worker]), 0.0)
        considered = [self._considered(facts, worker, score, reports, regret)]
        for other in islice(_ascending(score), _CONSIDERED):
            if other != worker and len(considered) < _CONSIDERED:
                considered.append(self._considered(facts, other, score, reports))
        return Chosen(
            worker,
            f"weights on {tier}, device {busy:.0%} asked for{how}",
            self._load_seconds(report, facts),
            tuple(considered),
            victims,
        )

    def _considered(
        self,
        facts: ModelView,
        worker: int,
        score: Floats,
        reports: dict[int, ModelReport],
        regret: float = 0.0,
    ) -> Considered:
        fleet = self.fleet
        plain = fleet.policy.load_weight * self._load_seconds(None, facts)
        return Considered(
            worker=fleet.names[worker],
            score=float(score[worker]) + plain + regret,
            busy=float(fleet.busy[worker]),
            load_s=self._load_seconds(reports.get(worker), facts),
            free_bytes=int(fleet.budget[worker] - fleet.used[worker]),
            regret=regret,
        )

    def _refuse(self, facts: ModelView, score: Floats, held_back: bool) -> Refused:
        model, fleet = facts.model, self.fleet
        if not fleet.workers:
            return Refused(model, Refusal("no worker is there"), "no_worker")
        matching = self.matches(facts)
        eligible = range(len(fleet.workers))
        able = list(eligible) if matching is None else np.flatnonzero(matching).tolist()
        if not able:
            asked = ",".join(f"{k}={v}" for k, v in facts.placement.worker_selector.items())
            nobody = Refusal(f"none of {len(fleet.workers)} workers has the labels {asked}")
            return Refused(model, nobody, "no_match", permanent=not fleet.holders(model))
        too_large: dict[int, Refusal] = {}
        most = self._sizes(facts, self._reports(model)).most
        for worker in np.flatnonzero(most > fleet.budget).tolist():
            if matching is not None and not matching[worker]:
                continue
            budget = fleet.workers[worker].budget_bytes
            no = fit(fleet.size_on(worker, model), (), budget) if budget > 0 else None
            if no is not None:
                too_large[worker] = no
        failed = [worker for worker in able if model in fleet.workers[worker].failed]
        if len(too_large.keys() | set(failed)) == len(able) and not fleet.holders(model):
            if failed:
                error = fleet.workers[failed[0]].failed[model]
                told = Refusal(f"it failed to load: {error}")
                return Refused(model, told, "failed_to_load", permanent=True, code="model_failed")
            largest = max(too_large.values(), key=lambda no: no.free_bytes)
            return Refused(model, largest, "too_large", permanent=True)
        closest = self._closest(facts, score)
        if closest is not None:
            hopeless = closest in too_large.values()
            return Refused(model, closest, "too_large" if hopeless else "no_room")
        if not fleet.takes[able].any():
            nobody = Refusal("every worker is leaving or without its engine")
            return Refused(model, nobody, "leaving")
        if held_back:
            policy = fleet.policy
            share = policy.load_share * policy.load_window_s
            least = float(fleet.copied[able].min())
            told = Refusal(
                f"every worker that can take it has loaded for {share:.1f} s or more lately, of "
                f"{policy.load_window_s:g} s; the least {least:.1f} s"
            )
            return Refused(model, told, "loading")
        crowded = set(self.crowded(facts)) - set(fleet.holders(model))
        if crowded.intersection(able):
            label = facts.placement.spread_by
            told = Refusal(f"every worker that can take it shares its {label} with a copy")
            return Refused(model, told, "spread")
        return Refused(model, Refusal("every worker that can take it has it already"), "has_all")

    def _closest(self, facts: ModelView, score: Floats) -> Refusal | None:
        """The "no" of the candidate that has most room."""
        candidates = np.flatnonzero(np.isfinite(score))
        if len(candidates) > _ONE_BY_ONE:
            room = (self.fleet.free() + self.fleet.host)[candidates]
            candidates = candidates[np.argpartition(-room, _ONE_BY_ONE)[:_ONE_BY_ONE]]
        closest: Refusal | None = None
        for worker in candidates[np.argsort(score[candidates], kind="stable")].tolist():
            no = self._refusal(facts, worker)
            if no is not None and (closest is None or no.free_bytes > closest.free_bytes):
                closest = no
        return closest


def _bounds(size: Footprint) -> tuple[int, int]:
    """The least and the most that it adds to what is used on a device."""
    least = size.weights_bytes - sum(share.nbytes for share in size.shares)
    return least, size.weights_bytes + size.workspace_bytes


def _at(sizes: Ints | int, worker: int) -> int:
    return sizes if isinstance(sizes, int) else int(sizes[worker])


def _ascending(score: Floats) -> Iterator[int]:
    """Workers by score, then by name, without those of inf: the best few are found at once, and
    all are sorted only for who asks for more."""
    if not len(score):
        return
    left = score.copy()
    for _ in range(4):
        best = int(left.argmin())
        if left[best] == np.inf:
            return
        yield best
        left[best] = np.inf
    order = np.argsort(left, kind="stable")
    for worker in order.tolist():
        if left[worker] == np.inf:
            return
        yield worker
