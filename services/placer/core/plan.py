"""The placer's decision, whole: who is to consume which model's queue, and every "no" with its
reason and numbers.

Laws (tests/property/test_placer_core.py): planning again right after applying a plan changes
nothing; no worker is ever planned over its budget; a spike of one model changes no other
model's bindings, unless memory forces an idle one to make room.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from services.placer.core.fleet import Fleet, Refused
from services.placer.core.policy import Policy
from services.placer.core.view import Demand, FleetSince, ModelView, View
from services.placer.core.wanted import Wanted, workers_wanted
from shared.names import ModelId


class Bind(msgspec.Struct, frozen=True):
    model: ModelId
    worker: str
    reason: str


class Unbind(msgspec.Struct, frozen=True):
    model: ModelId
    worker: str
    reason: str
    idle: bool = False
    """Right only while nothing is asked of the model."""


class Retire(msgspec.Struct, frozen=True):
    """The model stops being active: its routing keys go, and its queue when it is empty."""

    model: ModelId
    reason: str
    code: str | None = None
    """When set, what is left in the queue is answered with this error and `reason`."""


class Explained(msgspec.Struct, frozen=True):
    """Why a model has as many bindings as it has."""

    want: int
    copies: int
    need: float
    why: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to change, and why nothing else."""

    bind: tuple[Bind, ...] = ()
    unbind: tuple[Unbind, ...] = ()
    retire: tuple[Retire, ...] = ()
    refused: tuple[Refused, ...] = ()
    wanted: Wanted = Wanted()
    explained: Mapping[ModelId, Explained] = {}
    low_since: Mapping[ModelId, float] = {}
    """To be kept for the next view: since when each model has had a copy too many."""
    fleet_since: FleetSince = FleetSince()

    @property
    def changes(self) -> bool:
        return bool(self.bind or self.unbind or self.retire)

    def additions(self) -> Plan:
        """Only what takes nothing from anybody: for when the view may be incomplete."""
        disturbed = {gone.worker for gone in self.unbind}
        return msgspec.structs.replace(
            self,
            bind=tuple(new for new in self.bind if new.worker not in disturbed),
            unbind=(),
            retire=(),
            low_since={},
        )

    def __str__(self) -> str:
        said = [f"+{b.model}@{b.worker} ({b.reason})" for b in self.bind]
        said += [f"-{u.model}@{u.worker} ({u.reason})" for u in self.unbind]
        said += [f"retire {r.model} ({r.reason})" for r in self.retire]
        said += [f"no {r.model}: {r.refusal}" for r in self.refused]
        return "; ".join(said) or "nothing to change"


def plan(view: View, policy: Policy) -> Plan:
    """Decides for the whole fleet, as of `view.at`."""
    planner = _Planner(view, policy)
    # 1. What should not be where it is: unknown, failed, or more than the device holds.
    planner.drop_strays()
    planner.relieve_overfull()
    # 2. What is not needed any more goes, slowly.
    planner.release_surplus()
    # 3. What is needed comes, at once; what leaves with a worker that leaves goes when its
    #    successor is chosen. Again while that frees room for somebody who got a "no".
    while planner.raise_wanted() | planner.hand_over():
        pass
    # 4. What has no binding, and nobody waiting for one, is not active any more.
    planner.retire_unbound()
    return planner.result()


def place_one(view: View, model: ModelId, policy: Policy) -> Plan:
    """The reflex: one binding for a model that has none. An empty plan when it has one; a
    refusal when there is no room. The model must be in `view.models`."""
    planner = _Planner(view, policy)
    if not planner.fleet.count.get(model):
        planner.add_copy(view.models[model], "first request", force=True)
    planner.retire_unbound(only_victims=True)
    return planner.result(whole=False)


def want(facts: ModelView, workers: int, policy: Policy) -> int:
    """Copies that would serve the model's demand; one when there is none (it is active)."""
    needed = math.ceil(facts.demand.need / policy.target_utilization - 1e-9)
    return min(max(needed, facts.min_copies, 1), facts.copies_limit(workers))


class _Planner:
    """One planning: collects changes while it keeps the fleet's picture up to date."""

    def __init__(self, view: View, policy: Policy) -> None:
        self.view = view
        self.policy = policy
        self.fleet = Fleet(view, policy)
        self.bind: list[Bind] = []
        self.unbind: dict[tuple[ModelId, str], Unbind] = {}
        self.retire: list[Retire] = []
        self.refused: list[Refused] = []
        self.wants: dict[ModelId, int] = {}
        self.whys: dict[ModelId, str] = {}
        self.low_since: dict[ModelId, float] = {}
        self.victims: set[ModelId] = set()

    # --- steps ---

    def drop_strays(self) -> None:
        """Bindings of models that are not active, and of those that failed to load there."""
        for worker in self.view.workers.values():
            for model in worker.assigned:
                if model not in self.view.models:
                    self._remove(model, worker.worker, "not active")
                elif model in worker.failed and not worker.is_bound(model):
                    self._remove(model, worker.worker, f"failed to load: {worker.failed[model]}")

    def relieve_overfull(self) -> None:
        """A measured footprint may be greater than the estimate that was planned with."""
        for name in self.view.workers:
            while self.fleet.is_overfull(name):
                model = self.fleet.least_missed(name)
                self._remove(model, name, "the device is over its budget")

    def release_surplus(self) -> None:
        for model, facts in self.view.models.items():
            current = self.fleet.count.get(model, 0)
            idle_s = self.view.at - facts.demand.last_active
            if (
                idle_s >= self.policy.deactivate_after_s
                and not facts.min_copies
                and not is_asked(facts)
            ):
                reason = f"nobody asked for {self.policy.deactivate_after_s:g} s"
                for worker in self.fleet.holders(model):
                    self._remove(model, worker, reason, idle=True)
                self.retire.append(Retire(model, reason))
                continue
            limit = facts.copies_limit(max(len(self.fleet.serving), 1))
            if current > limit:
                self._release(model, limit, f"may have {limit} copies")
                current = limit
            self._release_when_low(facts, current)

    def raise_wanted(self) -> bool:
        """True when anything was changed."""
        before = len(self.bind) + len(self.unbind)
        self.refused.clear()
        step = max(
            self.policy.step_up_min, int(len(self.fleet.serving) * self.policy.step_up_share)
        )
        retired = {gone.model for gone in self.retire}
        due = []
        for model, facts in self.view.models.items():
            if model in retired or self._made_room(facts):
                continue
            copies = self.fleet.count.get(model, 0)
            wanted = self.wants[model] = want(facts, len(self.fleet.serving), self.policy)
            if wanted > copies or not copies:
                due.append((copies > 0, -facts.priority, -facts.demand.need, model))
        for _, _, _, model in sorted(due):
            facts = self.view.models[model]
            copies = self.fleet.count.get(model, 0)
            room = step - self.fleet.on_their_way(model)
            for _ in range(min(max(self.wants[model], 1) - copies, room)):
                if not self.add_copy(facts, self._why_more(facts)):
                    break
        return len(self.bind) + len(self.unbind) != before

    def hand_over(self) -> bool:
        """Workers that leave (or lost their engine for long) let go of what others have.
        True when anything was changed."""
        before = len(self.unbind)
        for worker in self.view.workers.values():
            if worker.serves:
                continue
            for model in list(self.fleet.assigned[worker.worker]):
                facts = self.view.models.get(model)
                successors = [
                    other
                    for name in self.fleet.holders(model)
                    if (other := self.view.workers[name]).serves
                ]
                # Of what has a state there may not be two, so the old one goes first.
                at_once = facts is not None and facts.stateful and successors
                if at_once or any(other.is_bound(model) for other in successors):
                    self._remove(model, worker.worker, "another worker has taken over")
        return len(self.unbind) != before

    def retire_unbound(self, *, only_victims: bool = False) -> None:
        retired = {gone.model for gone in self.retire}
        candidates = self.victims if only_victims else self.view.models
        refusals = {no.model: no for no in self.refused}
        for model in sorted(candidates):
            facts = self.view.models.get(model)
            if facts is None or model in retired or self.fleet.holders(model):
                continue
            refused = refusals.get(model)
            if refused is not None and refused.permanent:
                message = f"{model} cannot be placed: {refused.refusal}"
                self.retire.append(Retire(model, message, code=refused.code))
            elif not is_asked(facts) and not facts.min_copies and self.view.workers:
                why = "made room for another" if refused is None else str(refused.refusal)
                self.retire.append(Retire(model, why))

    # --- parts ---

    def add_copy(self, facts: ModelView, reason: str, *, force: bool = False) -> bool:
        """Finds a worker for one more copy, if need be with idle models making room."""
        too_few = self.fleet.count.get(facts.model, 0) < facts.min_copies
        may_evict = force or is_asked(facts) or too_few
        chosen = self.fleet.choose(facts, may_evict=may_evict)
        if isinstance(chosen, Refused):
            self.refused.append(chosen)
            self.whys[facts.model] = str(chosen.refusal)
            return False
        for victim in chosen.victims:
            self.victims.add(victim)
            self._evict(victim, chosen.worker, facts.model)
        self.fleet.add(facts.model, chosen.worker)
        if self.unbind.pop((facts.model, chosen.worker), None) is not None:
            self.fleet.keep(facts.model, chosen.worker)  # it was to go from there, and now stays
            return True
        self.bind.append(Bind(facts.model, chosen.worker, f"{reason}; {chosen.why}"))
        return True

    def _release_when_low(self, facts: ModelView, current: int) -> None:
        model, need = facts.model, facts.demand.need
        floor = max(1, facts.min_copies)
        low = self.policy.release_utilization
        if current <= floor or need >= low * (current - 1):
            return
        since = facts.low_since if facts.low_since is not None else self.view.at
        hold = max(self.policy.hold_down_s, self.policy.hold_down_loads * facts.load_seconds)
        if self.view.at - since < hold:
            self.low_since[model] = since
            return
        enough = current
        while enough > floor and need < low * (enough - 1):
            enough -= 1
        self._release(model, enough, f"{enough} have been enough for {hold:g} s")

    def _release(self, model: ModelId, keep: int, reason: str) -> None:
        """The newest bindings go first: what served the model before the spike stays."""
        serving = [w for w in self.fleet.holders(model) if self.view.workers[w].serves]
        serving.sort(key=lambda w: (self.fleet.assigned[w][model].since, w))
        for worker in serving[keep:]:
            self._remove(model, worker, reason)

    def _evict(self, victim: ModelId, worker: str, newcomer: ModelId) -> None:
        self.victims.add(victim)
        facts = self.view.models.get(victim)
        idle = facts is not None and not is_asked(facts)
        self._remove(victim, worker, f"makes room for {newcomer}", idle=idle)
        if not self.fleet.count.get(victim):
            for leaving in self.fleet.holders(victim):
                self._remove(victim, leaving, f"made room for {newcomer}", idle=idle)

    def _made_room(self, facts: ModelView) -> bool:
        """Whether it lost its last binding in this very plan, and nobody will miss it."""
        return (
            facts.model in self.victims
            and not is_asked(facts)
            and not (facts.min_copies or self.fleet.count.get(facts.model))
        )

    def _remove(self, model: ModelId, worker: str, reason: str, *, idle: bool = False) -> None:
        self.fleet.remove(model, worker)
        self.unbind[model, worker] = Unbind(model, worker, reason, idle)

    def _why_more(self, facts: ModelView) -> str:
        demand = facts.demand
        copies = self.fleet.count.get(facts.model, 0)
        if not copies:
            return "has no worker" if not demand.backlog else f"{demand.backlog} requests wait"
        return f"needs {demand.need:.2f} device s/s, has {copies}"

    def result(self, *, whole: bool = True) -> Plan:
        if not whole:
            return Plan(
                bind=tuple(self.bind),
                unbind=tuple(self.unbind.values()),
                retire=tuple(self.retire),
                refused=tuple(self.refused),
            )
        wanted, since = workers_wanted(
            self.view,
            self.policy,
            unplaceable=[no for no in self.refused if self._hurts(no)],
            assigned_bytes=self.fleet.used_bytes(),
            device_bytes=self.fleet.used_bytes(on_device=True),
        )
        return Plan(
            bind=tuple(self.bind),
            unbind=tuple(self.unbind.values()),
            retire=tuple(self.retire),
            refused=tuple(self.refused),
            wanted=wanted,
            explained={
                model: Explained(
                    want=wanted_copies,
                    copies=self.fleet.count.get(model, 0),
                    need=self.view.models[model].demand.need,
                    why=self.whys.get(model, ""),
                )
                for model, wanted_copies in self.wants.items()
            },
            low_since=self.low_since,
            fleet_since=since,
        )

    def _hurts(self, refused: Refused) -> bool:
        """Whether requests wait in vain; a second copy less is only slower."""
        facts = self.view.models[refused.model]
        unserved = not self.fleet.count.get(refused.model)
        return unserved and not refused.permanent and (is_asked(facts) or facts.min_copies > 0)


def is_asked(facts: ModelView) -> bool:
    """Whether anything waits for the model or runs on it."""
    demand: Demand = facts.demand
    return facts.waiting or demand.backlog > 0
