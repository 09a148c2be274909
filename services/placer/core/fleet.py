"""The picture of the fleet that a planning works on, and the choice of a worker for a copy."""

from __future__ import annotations

from typing import Literal

import msgspec

from services.placer.core.policy import Policy
from services.placer.core.view import Binding, ModelView, View, WorkerView, footprint
from shared.fit import Refusal, can_be_served, fit, fit_tiers, used_bytes
from shared.models import Footprint
from shared.names import ModelId

Kind = Literal[
    "no_room", "too_large", "failed_to_load", "no_worker", "leaving", "has_all", "overtaken"
]
"""Why not, in a word: for metrics, where a text with numbers or a model's own error would make
series without end. `overtaken`: the fleet changed while it was planned."""


class Refused(msgspec.Struct, frozen=True):
    """A copy that could not be placed."""

    model: ModelId
    refusal: Refusal
    kind: Kind
    permanent: bool = False
    """No worker that is there can ever take it; waiting is in vain."""
    code: str = "unavailable"


class Chosen(msgspec.Struct, frozen=True):
    """Where a copy goes, and which idle models make room for it."""

    worker: str
    why: str
    victims: tuple[ModelId, ...] = ()


class Fleet:
    """Assignments as they would be after the changes made so far.

    Laws: `count[m]` is the number of serving workers to which `m` is assigned; only assigned
    models count against a budget, since a worker drops unbound weights by itself.
    """

    def __init__(self, view: View, policy: Policy) -> None:
        self.view = view
        self.policy = policy
        self.serving = [name for name, worker in view.workers.items() if worker.serves]
        self.assigned: dict[str, dict[ModelId, Binding]] = {}
        self.count: dict[ModelId, int] = {}
        self._holders: dict[ModelId, list[str]] = {}
        for name, worker in view.workers.items():
            self.assigned[name] = dict(worker.assigned)
            for model in worker.assigned:
                self._holders.setdefault(model, []).append(name)
                if worker.serves:
                    self.count[model] = self.count.get(model, 0) + 1
        self._cached: dict[str, dict[ModelId, Footprint]] = {}
        self._busy = {name: self._utilization(name) for name in view.workers}

    def __repr__(self) -> str:
        return f"Fleet({ {name: sorted(models) for name, models in self.assigned.items()} })"

    def holders(self, model: ModelId) -> list[str]:
        """Workers to which the model is assigned, serving or not."""
        return list(self._holders.get(model, ()))

    def add(self, model: ModelId, worker: str) -> None:
        self.assigned[worker][model] = Binding(self.view.at)
        self._holders.setdefault(model, []).append(worker)
        if self.view.workers[worker].serves:
            self.count[model] = self.count.get(model, 0) + 1
        seen, facts = self.view.workers[worker], self.view.models.get(model)
        self.sizes(worker)[model] = footprint(seen, model, facts)
        self._busy[worker] += self._share(model)

    def keep(self, model: ModelId, worker: str) -> None:
        """What was removed and added again is the binding that it was."""
        self.assigned[worker][model] = self.view.workers[worker].assigned[model]

    def remove(self, model: ModelId, worker: str) -> None:
        self._busy[worker] -= self._share(model)
        self.sizes(worker).pop(model)
        del self.assigned[worker][model]
        self._holders[model].remove(worker)
        if self.view.workers[worker].serves:
            self.count[model] -= 1

    def sizes(self, worker: str) -> dict[ModelId, Footprint]:
        """Footprint of each model assigned to the worker."""
        cached = self._cached.get(worker)
        if cached is None:
            seen, models = self.view.workers[worker], self.view.models
            cached = self._cached[worker] = {
                model: footprint(seen, model, models.get(model)) for model in self.assigned[worker]
            }
        return cached

    def on_their_way(self, model: ModelId) -> int:
        """Copies assigned to serving workers that do not consume the queue yet."""
        return sum(
            not self.view.workers[name].is_bound(model)
            or self.assigned[name][model].since >= self.view.at
            for name in self._holders.get(model, ())
            if self.view.workers[name].serves
        )

    def is_overfull(self, worker: str) -> bool:
        """False without a budget: the engine has not said yet what the device has."""
        held, seen = self.sizes(worker).values(), self.view.workers[worker]
        if seen.budget_bytes <= 0 or not held:
            return False
        return not can_be_served(held, seen.budget_bytes, seen.host_bytes)

    def used_bytes(self, *, on_device: bool = False) -> int:
        """What all that is assigned to serving workers takes there, or what of it cannot wait in
        a host's memory. What several have counts once per worker: so it would elsewhere."""
        return sum(
            used_bytes(
                size
                for size in self.sizes(name).values()
                if size.pinned or not size.copyable or not on_device
            )
            for name in self.serving
        )

    def least_missed(self, worker: str) -> ModelId:
        """What goes first from a device that is over its budget: the idle, the longest unused
        before; then what others have as well; then what is needed least."""

        def missed(model: ModelId) -> tuple[int, int, float, float, ModelId]:
            facts = self.view.models.get(model)
            if facts is None:
                return (-1, 0, 0.0, 0.0, model)
            busy = facts.waiting or facts.demand.backlog > 0
            rank = 0 if not busy else 1 if len(self._holders[model]) > 1 else 2
            demand = facts.demand
            if rank == 0:
                return (rank, facts.priority, demand.last_active, 0.0, model)
            return (rank, facts.priority, demand.need, demand.last_active, model)

        return min(self.assigned[worker], key=missed)

    def choose(self, facts: ModelView, *, may_evict: bool) -> Chosen | Refused:
        """The worker that will serve one more copy soonest: by what is running there, and by
        what it costs to load. One whose device has room is taken before any other; then one that
        has room in its host's memory, and swaps; last one where others must make room."""
        model = facts.model
        candidates = [
            worker
            for name, worker in self.view.workers.items()
            if worker.takes_new and model not in self.assigned[name] and model not in worker.failed
        ]
        candidates.sort(key=lambda worker: (self._score(worker, facts), worker.worker))
        closest: Refusal | None = None
        swaps: WorkerView | None = None
        for worker in candidates:
            refusal = self._fits(worker, facts, without=())
            if refusal is None:
                if self._fits_device(worker, facts):
                    return Chosen(worker.worker, self._why(worker, facts))
                swaps = swaps or worker
            elif closest is None or refusal.free_bytes > closest.free_bytes:
                closest = refusal
        if swaps is not None:
            return Chosen(swaps.worker, f"{self._why(swaps, facts)}, to be swapped in")
        for worker in candidates if may_evict else ():
            victims = self._make_room(worker, facts)
            if victims is not None:
                return Chosen(worker.worker, self._why(worker, facts), victims)
        return self._refuse(facts, closest)

    # --- parts ---

    def _fits(
        self, worker: WorkerView, facts: ModelView, without: tuple[ModelId, ...]
    ) -> Refusal | None:
        sizes = self.sizes(worker.worker)
        stay = [size for model, size in sizes.items() if model not in without]
        size = footprint(worker, facts.model, facts)
        return fit_tiers(size, stay, worker.budget_bytes, worker.host_bytes)

    def _fits_device(self, worker: WorkerView, facts: ModelView) -> bool:
        held = self.sizes(worker.worker).values()
        return fit(footprint(worker, facts.model, facts), held, worker.budget_bytes) is None

    def _make_room(self, worker: WorkerView, facts: ModelView) -> tuple[ModelId, ...] | None:
        """The fewest victims, the longest unused first, with which the model fits."""
        if fit(footprint(worker, facts.model, facts), (), worker.budget_bytes) is not None:
            return None
        ranked = sorted(
            (rank, model)
            for model in self.assigned[worker.worker]
            if model != facts.model
            for rank in (self._victim_rank(worker.worker, model),)
            if rank is not None
        )
        taken: list[ModelId] = []
        for _, model in ranked:
            taken.append(model)
            if self._fits(worker, facts, tuple(taken)) is None:
                break
        else:
            return None
        for model in list(taken):
            spared = tuple(m for m in taken if m != model)
            if self._fits(worker, facts, spared) is None:
                taken.remove(model)
        return tuple(taken)

    def _victim_rank(self, worker: str, model: ModelId) -> tuple[int, int, float] | None:
        """None when the model may not be taken from this worker, else what goes first."""
        facts = self.view.models.get(model)
        if facts is None:
            return (-1, 0, 0.0)
        policy, at = self.policy, self.view.at
        if self.assigned[worker][model].since >= at:
            return None
        age = at - self.assigned[worker][model].since
        least_age = max(policy.victim_min_age_s, policy.victim_min_age_loads * facts.load_seconds)
        copies = self.count.get(model, 0)
        serves = self.view.workers[worker].serves
        if age < least_age or (serves and copies <= facts.min_copies):
            return None
        demand = facts.demand
        if not facts.waiting and not demand.backlog:
            if at - demand.last_active >= policy.victim_idle_s:
                return (0, facts.priority, demand.last_active)
            return None
        # A copy more than its demand wants waits only for its hold-down to be over.
        if copies > 1 and demand.need <= policy.target_utilization * (copies - 1):
            return (1, facts.priority, demand.last_active)
        return None

    def _refuse(self, facts: ModelView, closest: Refusal | None) -> Refused:
        model, workers = facts.model, self.view.workers.values()
        if not workers:
            return Refused(model, Refusal("no worker is there"), "no_worker")
        too_large = {
            worker.worker: no
            for worker in workers
            if worker.budget_bytes > 0
            and (no := fit(footprint(worker, model, facts), (), worker.budget_bytes)) is not None
        }
        failed = [worker for worker in workers if model in worker.failed]
        impossible = too_large.keys() | {worker.worker for worker in failed}
        if len(impossible) == len(workers) and not self._holders.get(model):
            if failed:
                error = Refusal(f"it failed to load: {failed[0].failed[model]}")
                return Refused(model, error, "failed_to_load", permanent=True, code="model_failed")
            largest = max(too_large.values(), key=lambda no: no.free_bytes)
            return Refused(model, largest, "too_large", permanent=True)
        if closest is not None:
            hopeless = closest in too_large.values()
            return Refused(model, closest, "too_large" if hopeless else "no_room")
        if not any(worker.takes_new for worker in workers):
            nobody = Refusal("every worker is leaving or without its engine")
            return Refused(model, nobody, "leaving")
        return Refused(model, Refusal("every worker that can take it has it already"), "has_all")

    def _score(self, worker: WorkerView, facts: ModelView) -> float:
        filled = 0.0
        if worker.budget_bytes > 0:
            filled = used_bytes(self.sizes(worker.worker).values()) / worker.budget_bytes
        return (
            self._busy[worker.worker]
            + self.policy.load_weight * self._load_seconds(worker, facts)
            + self.policy.memory_weight * filled
        )

    def _load_seconds(self, worker: WorkerView, facts: ModelView) -> float:
        report = worker.reported.get(facts.model)
        if report is not None and report.tier == "device":
            return 0.0
        seconds = facts.load_seconds or self.policy.unknown_load_s
        if report is not None and report.tier == "host":
            return report.load_seconds or seconds * self.policy.host_load_share
        return seconds

    def _why(self, worker: WorkerView, facts: ModelView) -> str:
        report = worker.reported.get(facts.model)
        tier = "disk" if report is None else report.tier
        busy = max(self._busy[worker.worker], 0.0)
        return f"weights on {tier}, device {busy:.0%} asked for"

    def _utilization(self, worker: str) -> float:
        return sum(self._share(model) for model in self.assigned[worker])

    def _share(self, model: ModelId) -> float:
        facts = self.view.models.get(model)
        if facts is None or not facts.demand.need:
            return 0.0
        return facts.demand.need / max(self.count.get(model, 0), 1)
