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
from services.placer.core.labels import Labels
from services.placer.core.refused import Refused
from services.placer.core.refusing import refuse
from services.placer.core.tenancy import whole_bytes
from services.placer.core.victims import Victims
from services.placer.core.view import ModelView, expected
from shared.control import ModelReport
from shared.fit import Refusal, fit, fit_tiers
from shared.models import Footprint
from shared.names import ModelId

_CONSIDERED = 3
"""Workers of which the choice is explained."""


class Chosen(msgspec.Struct, frozen=True):
    """Where a copy goes, and which models make room for it."""

    worker: int
    why: str
    load_s: float
    considered: tuple[Considered, ...]
    victims: tuple[ModelId, ...] = ()


class PutOff(msgspec.Struct, frozen=True):
    """Who makes room was searched for as long as one planning may: it goes on at the next."""

    searched: frozenset[str]
    """Workers where nobody can, as it was when they were looked at."""


class _Sizes(msgspec.Struct, frozen=True):
    """What the newcomer takes, per worker or everywhere: bounds of what it adds to what is
    there, and what it is by itself."""

    least: Ints | int
    most: Ints | int


class Chooser:
    """Chooses on one fleet, whose changes it sees."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.labels = Labels(fleet)
        self.victims = Victims(fleet)
        kinds = sorted({each.device_kind for each in fleet.workers})
        self._kinds = kinds
        code = {kind: number for number, kind in enumerate(kinds)}
        self._kind: Ints = np.array([code[each.device_kind] for each in fleet.workers], np.int64)
        self._failing = [n for n, each in enumerate(fleet.workers) if each.failed]
        self._uneven = bool((fleet.slowness != 1.0).any())
        self._per_byte: Floats = fleet.policy.memory_weight / np.maximum(fleet.budget, 1)
        self._loose: dict[ModelId, list[int]] = {}
        """Who reports a model that is not assigned to it by the view."""
        for number, room in enumerate(fleet.rooms):
            for model in room.loose:
                self._loose.setdefault(model, []).append(number)

    def __repr__(self) -> str:
        return f"<Chooser {self.fleet!r}>"

    def choose(
        self,
        facts: ModelView,
        *,
        may_evict: bool = False,
        reclaim: bool = False,
        extra: bool = False,
        among: Bools | None = None,
    ) -> Chosen | Refused | PutOff:
        """The worker that will serve one more copy soonest: by what is running there, and by
        what it costs to load. One whose device has room is taken before any other; then one that
        has room in its host's memory, and swaps; last one where others must make room (`reclaim`:
        also what is asked, of tenants that hold more than their share). An
        `extra` copy does not go where enough was loaded lately. `among`: one of these."""
        fleet = self.fleet
        reports = self._reports(facts.model)
        score, held_back = self._scores(facts, reports, extra=extra)
        if among is not None:
            score[~among] = np.inf
        sizes = self._sizes(facts, reports)
        no = self._over_quota(facts, score, sizes)
        if no is not None:
            return no
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
            room += self.victims.reclaimable(facts.model, reclaim=reclaim)
            candidates = np.where(sizes.least <= room, score, np.inf)
            best = self._evicting(facts, candidates, reclaim=reclaim)
            if isinstance(best, PutOff):
                return best
            if best is not None:
                worker, victims, regret = best
                return self._chosen(facts, worker, score, reports, "", victims, regret)
        return refuse(fleet, self.labels, facts, score, sizes.most, held_back=held_back)

    def spare(self, facts: ModelView) -> Chosen | None:
        """A worker whose device has room to spare for a copy that nobody needs yet."""
        fleet, policy = self.fleet, self.fleet.policy
        reports = self._reports(facts.model)
        score, _ = self._scores(facts, reports, extra=True)
        free = fleet.free() - (policy.spare_reserve * fleet.budget).astype(np.int64)
        sizes = self._sizes(facts, reports)
        score[sizes.most > free] = np.inf
        if self._over_quota(facts, score, sizes) is not None:
            return None
        score[~fleet.serves] = np.inf
        score[fleet.busy > policy.spare_below] = np.inf
        for worker in _ascending(score):
            return self._chosen(facts, worker, score, reports, "")
        return None

    def needs(self, facts: ModelView) -> tuple[int, int]:
        """The least and the most that one more copy would count for its tenant, by where it may
        be; 0 where it can be nowhere."""
        reports = self._reports(facts.model)
        score, _ = self._scores(facts, reports, extra=False)
        most = np.broadcast_to(self._sizes(facts, reports).most, score.shape)
        able = most[np.isfinite(score)]
        return (int(able.min()), int(able.max())) if len(able) else (0, 0)

    def fits(self, facts: ModelView, worker: int) -> Refusal | None:
        """None when the worker has room for the model and its tenant may have it, else why not."""
        free = self.fleet.budget[worker] - self.fleet.used[worker]
        size = self.fleet.size_on(worker, facts.model)
        no = self.fleet.tenancy.refusal(facts.model, whole_bytes(size))
        if no is not None:
            return no
        if size.weights_bytes + size.workspace_bytes <= free:
            return None
        return self._refusal(facts, worker)

    # --- parts ------------------------------------------------------------------------------

    def _over_quota(self, facts: ModelView, score: Floats, sizes: _Sizes) -> Refused | None:
        """Takes out of the score where a copy would be more than its tenant may have; says so when
        it was all."""
        tenancy = self.fleet.tenancy
        left = tenancy.left(facts.model)
        if left is None:
            return None
        most = np.broadcast_to(sizes.most, score.shape)
        able = most[np.isfinite(score)]
        score[most > left] = np.inf
        if not len(able) or np.isfinite(score).any():
            return None
        need = int(able.min())
        told = tenancy.refusal(facts.model, need)
        assert told is not None, "it was more than is left"
        hopeless = need > int(tenancy.quota[tenancy.of(facts.model)])
        never = hopeless and not self.fleet.holders(facts.model)
        return Refused(facts.model, told, "quota", permanent=never, code="resource_exhausted")

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
        matching = self.labels.matches(facts)
        if matching is not None:
            score[~matching] = np.inf
        for worker in self.labels.crowded(facts):
            score[worker] = np.inf
        held_back = False
        if extra:
            full = fleet.copied >= policy.load_share * policy.load_window_s
            if full.any():
                held_back = bool(np.isfinite(score[full]).any())
                score[full] = np.inf
        return score, held_back

    def _sizes(self, facts: ModelView, reports: dict[int, ModelReport]) -> _Sizes:
        if facts.placement.alone:
            whole = [self.fleet.size_on(n, facts.model) for n in range(len(self.fleet.workers))]
            taken: Ints = np.array([size.weights_bytes for size in whole], np.int64)
            return _Sizes(taken, taken)
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
        fleet = self.fleet
        told = {*self._loose.get(model, ()), *fleet.left(model)}
        found = [(n, fleet.workers[n].reported.get(model)) for n in told]
        have = fleet.holders(model) if found else ()
        return {n: each for n, each in found if each is not None and n not in have}

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
        self, facts: ModelView, score: Floats, *, reclaim: bool
    ) -> tuple[int, tuple[ModelId, ...], float] | PutOff | None:
        """Where making room costs least, and who makes it: regret is in the score's unit. Of
        those that were looked at, when there is no work left for more."""
        best: tuple[int, tuple[ModelId, ...], float] | None = None
        lowest = math.inf
        names, before = self.fleet.names, self.fleet.view.pace.searched.get(facts.model)
        searched = set(before or ())
        for worker in _ascending(score):
            if score[worker] >= lowest:
                break
            if names[worker] in searched:
                continue
            if self.victims.spent():
                return best or PutOff(frozenset(searched))
            found = self.victims.make_room(worker, facts, reclaim=reclaim)
            if found is None:
                searched.add(names[worker])
            elif score[worker] + found[1] < lowest:
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
