"""One planning: collects changes while it keeps the fleet's picture up to date.

Each step finds by columns which models it concerns, and then looks at those alone.
"""

from __future__ import annotations

import msgspec
import numpy as np

from services.placer.core.changes import Bind, Explained, Plan, Retire, Unbind
from services.placer.core.choose import Chooser, Chosen
from services.placer.core.columns import Bools, Ints
from services.placer.core.fleet import Fleet, is_asked
from services.placer.core.policy import Policy
from services.placer.core.refused import Refused
from services.placer.core.view import Binding, ModelView, Move, Pace, View
from services.placer.core.wanted import workers_wanted
from shared.names import ModelId

_REFUSED_WORK = 7
_WEIGHED_WORK = 2
"""What saying no costs, and judging who could make room on one worker, against choosing a place."""


class Planner:
    """The steps of `plan` and `place_one`, to be taken in their order."""

    def __init__(self, view: View, policy: Policy) -> None:
        self.view = view
        self.policy = policy
        self.fleet = Fleet(view, policy)
        self.chooser = Chooser(self.fleet)
        self.columns = self.fleet.columns
        self.bind: list[Bind] = []
        self.unbind: dict[tuple[ModelId, str], Unbind] = {}
        self.retire: list[Retire] = []
        self.refused: list[Refused] = []
        self.pace: Pace = view.pace
        self._wants: dict[ModelId, int] = {}
        self._whys: dict[ModelId, str] = {}
        self._low_since: dict[ModelId, float] = {}
        self._victims: set[ModelId] = set()
        self._retired: set[ModelId] = set()
        self._looked = 0

    def __repr__(self) -> str:
        return f"<Planner +{len(self.bind)} -{len(self.unbind)} at {self.view.at:.3f}>"

    # --- steps ---

    def drop_strays(self) -> None:
        """Bindings of models that are not active, of those that failed to load there, and of
        those that must not be there."""
        fleet = self.fleet
        for worker in np.unique(fleet.binding_worker[fleet.binding_row < 0]).tolist():
            for model in list(fleet.assigned(worker)):
                if model not in self.columns.row:
                    self.remove(model, worker, "not active")
        for worker, seen in enumerate(fleet.workers):
            for model, error in seen.failed.items():
                if model in fleet.assigned(worker) and not seen.is_bound(model):
                    self.remove(model, worker, f"failed to load: {error}")
        for model in self._placed_models():
            self._drop_misplaced(model)

    def relieve_overfull(self) -> None:
        """A measured footprint may be greater than the estimate that was planned with."""
        for worker in self.fleet.overfull():
            while worker in self.fleet.overfull():
                self.remove(self._least_missed(worker), worker, "the device is over its budget")

    def release_surplus(self) -> None:
        """What nobody asks for any more, and copies more than are needed or allowed."""
        columns, count, policy = self.columns, self.fleet.count, self.policy
        unasked = self.view.at - columns.last_active >= policy.deactivate_after_s
        idle = columns.present & unasked & (columns.min_copies == 0) & ~columns.asked
        for model in self._models(idle):
            if self._tidied():
                break
            reason = f"nobody asked for {policy.deactivate_after_s:g} s"
            for worker in self.fleet.holders(model):
                self.remove(model, worker, reason, idle=True)
            self._retire(Retire(model, reason))
        limit = np.minimum(columns.limit, max(self.fleet.serving, 1))
        for model in self._models(columns.present & ~idle & (count > limit)):
            if self._tidied():
                break
            allowed = int(limit[columns.row[model]])
            self._release(model, allowed, f"may have {allowed} copies")
        self._release_low(columns.present & ~idle)

    def raise_wanted(self) -> bool:
        """True when anything was changed. What is too much for one planning is put off: within
        its class and priority, who waits longest for its turn goes first at the next."""
        if self.spent():
            return False
        before = len(self.bind) + len(self.unbind)
        self.refused.clear()
        self.chooser.victims.again()
        fleet, policy = self.fleet, self.policy
        step = max(policy.step_up_min, int(fleet.serving * policy.step_up_share))
        wants = self._wanted()
        waited, put_off = self.view.pace.put_off, dict[ModelId, float]()
        for model in self._due(wants):
            if model in self._retired:
                continue
            if self.spent():
                put_off[model] = waited.get(model, self.view.at)
                continue
            facts = self.view.models[model]
            if self._made_room(facts):
                continue
            self._wants[model] = int(wants[self.columns.row[model]])
            missing = max(self._wants[model], 1) - fleet.copies(model)
            for _ in range(min(missing, step - fleet.on_their_way(model))):
                if self.spent():
                    put_off[model] = self.view.at
                    break
                if not self.add_copy(facts, self._why_more(facts)):
                    break
        self.pace = msgspec.structs.replace(self.pace, put_off=put_off)
        return len(self.bind) + len(self.unbind) != before

    def add_wanted(self, facts: ModelView) -> None:
        """One copy, if more are wanted than there are and none is on its way."""
        fleet = self.fleet
        wanted = int(self._wanted()[self.columns.row[facts.model]])
        if wanted > fleet.copies(facts.model) and not fleet.on_their_way(facts.model):
            self.add_copy(facts, self._why_more(facts))

    def hand_over(self) -> bool:
        """Workers that leave (or lost their engine for long) let go of what others have.
        True when anything was changed."""
        fleet, before = self.fleet, len(self.unbind)
        for worker in np.flatnonzero(~fleet.serves).tolist():
            if self.spent():
                break
            for model in list(fleet.assigned(worker)):
                facts = self.view.models.get(model)
                successors = [other for other in fleet.holders(model) if fleet.serves[other]]
                # Of what has a state there may not be two, so the old one goes first.
                at_once = facts is not None and facts.stateful and successors
                if at_once or any(fleet.consumes(model, other) for other in successors):
                    self.remove(model, worker, "another worker has taken over")
                elif fleet.workers[worker].leaving and not successors and not _is_missed(facts):
                    # Nobody else has room for it, and nobody asks: it need not hold up the rest.
                    why = "its worker leaves, and nobody asks for it"
                    self.remove(model, worker, why, idle=True)
        return len(self.unbind) != before

    def retire_unbound(self, *, only_victims: bool = False) -> None:
        """What has no binding and nobody waiting, and what can never have one."""
        unheld = self._models(self.columns.present & (self.fleet.holding == 0))
        refusals = {no.model: no for no in self.refused}
        for model in sorted(unheld):
            if model in self._retired or (only_victims and model not in self._victims):
                continue
            if not only_victims and (model in self.pace.put_off or self._tidied()):
                continue
            facts, refused = self.view.models[model], refusals.get(model)
            if refused is not None and refused.permanent:
                message = f"{model} cannot be placed: {refused.refusal}"
                self._retire(Retire(model, message, code=refused.code))
            elif not is_asked(facts) and not facts.min_copies and self.view.workers:
                why = "made room for another" if refused is None else str(refused.refusal)
                self._retire(Retire(model, why))

    # --- changes ---

    def add_copy(self, facts: ModelView, reason: str, *, force: bool = False) -> bool:
        """Finds a worker for one more copy, if need be with idle models making room."""
        copies = self.fleet.copies(facts.model)
        too_few = copies < facts.min_copies
        chosen = self.chooser.choose(
            facts,
            may_evict=force or is_asked(facts) or too_few,
            extra=bool(copies) and not too_few and not self._starves(facts),
        )
        self._looked += 1
        if isinstance(chosen, Refused):
            self._looked += _REFUSED_WORK
            self.refused.append(chosen)
            self._whys[facts.model] = str(chosen.refusal)
            return False
        for victim in chosen.victims:
            self.evict(victim, chosen.worker, facts.model)
        self.put(facts.model, chosen, reason)
        return True

    def put(self, model: ModelId, chosen: Chosen, reason: str, *, spare: bool = False) -> None:
        """Binds a copy where it was chosen to be."""
        name = self.fleet.names[chosen.worker]
        if self.unbind.pop((model, name), None) is not None:
            # It was to go from there, and now stays the binding that it was.
            self.fleet.add(model, chosen.worker, self.view.workers[name].assigned[model])
            return
        # A first copy is no charge on what a worker may load of further ones.
        load_s = chosen.load_s if self.fleet.copies(model) else 0.0
        self.fleet.add(model, chosen.worker, Binding(self.view.at, "", spare), load_s)
        why = f"{reason}; {chosen.why}"
        self.bind.append(Bind(model, name, why, load_s, spare, chosen.considered))

    def remove(self, model: ModelId, worker: int, reason: str, *, idle: bool = False) -> None:
        """Unbinds a copy."""
        self.fleet.remove(model, worker)
        name = self.fleet.names[worker]
        self.unbind[model, name] = Unbind(model, name, reason, idle)

    def follow_moves(self, moves: tuple[Move, ...]) -> None:
        """These are under way from now on, or done lately."""
        self.pace = msgspec.structs.replace(self.pace, moves=moves)
        self.fleet.follow_moves(moves)

    def spent(self) -> bool:
        """Whether enough was decided for one planning."""
        weighed = _WEIGHED_WORK * self.chooser.victims.weighed
        return self._looked + weighed + len(self.unbind) >= self.policy.work_per_tick

    @property
    def nobody_waits(self) -> bool:
        """Whether all that is asked has the copies that it needs, or can have no more."""
        return not self.pace.put_off and not any(
            no.kind in {"no_room", "no_worker", "leaving", "overtaken"} for no in self.refused
        )

    # --- parts ---

    def _models(self, rows: Bools) -> list[ModelId]:
        ids = self.columns.ids
        return [model for row in np.flatnonzero(rows).tolist() if (model := ids[row]) is not None]

    def _tidied(self) -> bool:
        """Whether enough was taken away: half of the work is for those that wait."""
        return len(self.unbind) + len(self.retire) >= self.policy.work_per_tick // 2

    def _due(self, wants: Ints) -> list[ModelId]:
        """Models that want more, the most urgent first: who has nothing; by priority; who was put
        off, the longest first; by need."""
        columns, count = self.columns, self.fleet.count
        rows = np.flatnonzero(columns.present & ((wants > count) | (count == 0)))
        waited, at = self.view.pace.put_off, self.view.at
        models = [model for row in rows.tolist() if (model := columns.ids[row]) is not None]
        due = zip(
            (count[rows] > 0).tolist(),
            (-columns.priority[rows]).tolist(),
            [waited.get(model, at) for model in models],
            (-columns.need[rows]).tolist(),
            models,
            strict=True,
        )
        return [model for _, _, _, _, model in sorted(due)]

    def _wanted(self) -> Ints:
        """`plan.want` of all models."""
        columns = self.columns
        needed = np.ceil(columns.need / self.policy.target_utilization - 1e-9).astype(np.int64)
        least = np.maximum(np.maximum(needed, columns.min_copies), 1)
        wanted: Ints = np.minimum(least, np.minimum(columns.limit, self.fleet.serving))
        return wanted

    def _starves(self, facts: ModelView) -> bool:
        """Whether its only copy is asked for more than a device can do: its second waits for
        nothing."""
        return self.fleet.copies(facts.model) == 1 and facts.demand.need > 1.0

    def _placed_models(self) -> list[ModelId]:
        """Models with a word on where they may be."""
        return [model for model in self.columns.placed if self.fleet.holders(model)]

    def _drop_misplaced(self, model: ModelId) -> None:
        fleet = self.fleet
        facts = self.view.models[model]
        matching = self.chooser.matches(facts)
        for worker in fleet.holders(model):
            if matching is not None and not matching[worker]:
                self.remove(model, worker, "the worker has not the labels that it asks for")
        label, taken = facts.placement.spread_by, set()
        if label is None:
            return
        serving = [worker for worker in fleet.holders(model) if fleet.serves[worker]]
        for worker in sorted(serving, key=lambda w: (fleet.assigned(w)[model].since, w)):
            domain = self.chooser.domain(label, worker)
            if domain in taken:
                self.remove(model, worker, f"another copy has the same {label}")
            taken.add(domain)

    def _least_missed(self, worker: int) -> ModelId:
        """What goes first from a device that is over its budget: the idle, the longest unused
        before; then what others have as well; then what is needed least."""

        def missed(model: ModelId) -> tuple[int, int, float, float, ModelId]:
            facts = self.view.models.get(model)
            if facts is None:
                return (-1, 0, 0.0, 0.0, model)
            demand = facts.demand
            rank = 0 if not is_asked(facts) else 1 if len(self.fleet.holders(model)) > 1 else 2
            if rank == 0:
                return (rank, facts.priority, demand.last_active, 0.0, model)
            return (rank, facts.priority, demand.need, demand.last_active, model)

        return min(self.fleet.assigned(worker), key=missed)

    def _release_low(self, some: Bools) -> None:
        """Copies that have not been needed for a while, as `low_since` tells."""
        columns, policy, at, count = self.columns, self.policy, self.view.at, self.fleet.count
        # What traffic it usually has is worth spare copies as long as memory is free.
        spare = columns.usual / (0.5 * policy.spare_above)
        floor = np.maximum(np.maximum(columns.min_copies, 1), spare.astype(np.int64))
        low = policy.release_utilization
        some = some & (count > floor) & (columns.need < low * (count - 1))
        for move in self.pace.moves:
            if move.done is None and move.model in columns.row:
                some[columns.row[move.model]] = False
        since = np.where(np.isnan(columns.low_since), at, columns.low_since)
        hold = np.maximum(policy.hold_down_s, policy.hold_down_loads * columns.load_seconds)
        over = at - since >= hold
        noted = some & ~over
        self._low_since = dict(zip(self._models(noted), since[noted].tolist(), strict=True))
        for model in self._models(some & over):
            row = columns.row[model]
            if self._tidied():
                self._low_since[model] = float(since[row])
                continue
            enough, least, need = int(count[row]), int(floor[row]), float(columns.need[row])
            while enough > least and need < low * (enough - 1):
                enough -= 1
            self._release(model, enough, f"{enough} have been enough for {hold[row]:g} s")

    def _release(self, model: ModelId, keep: int, reason: str) -> None:
        """Spare ones first, then the newest: what served the model before the spike stays."""
        fleet = self.fleet

        def order(worker: int) -> tuple[bool, float, int]:
            binding = fleet.assigned(worker)[model]
            return (binding.spare, binding.since, worker)

        serving = [worker for worker in fleet.holders(model) if fleet.serves[worker]]
        for worker in sorted(serving, key=order)[keep:]:
            self.remove(model, worker, reason)

    def evict(self, victim: ModelId, worker: int, newcomer: ModelId) -> None:
        """Unbinds a copy that makes room."""
        self._victims.add(victim)
        facts = self.view.models.get(victim)
        idle = facts is not None and not is_asked(facts)
        self.remove(victim, worker, f"makes room for {newcomer}", idle=idle)
        if not self.fleet.copies(victim):
            for leaving in self.fleet.holders(victim):
                self.remove(victim, leaving, f"made room for {newcomer}", idle=idle)

    def _made_room(self, facts: ModelView) -> bool:
        """Whether it lost its last binding in this very plan, and nobody will miss it."""
        return (
            facts.model in self._victims
            and not is_asked(facts)
            and not (facts.min_copies or self.fleet.copies(facts.model))
        )

    def _retire(self, gone: Retire) -> None:
        self.retire.append(gone)
        self._retired.add(gone.model)

    def _why_more(self, facts: ModelView) -> str:
        demand = facts.demand
        copies = self.fleet.copies(facts.model)
        if not copies:
            return "has no worker" if not demand.backlog else f"{demand.backlog} requests wait"
        return f"needs {demand.need:.2f} device s/s, has {copies}"

    def result(self, *, whole: bool = True) -> Plan:
        """What was decided."""
        if not whole:
            return Plan(
                bind=tuple(self.bind),
                unbind=tuple(self.unbind.values()),
                retire=tuple(self.retire),
                refused=tuple(self.refused),
                pace=self.pace,
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
                    copies=self.fleet.copies(model),
                    need=float(self.columns.need[self.columns.row[model]]),
                    why=self._whys.get(model, ""),
                )
                for model, wanted_copies in self._wants.items()
            },
            low_since=self._low_since,
            fleet_since=since,
            pace=self.pace,
        )

    def _hurts(self, refused: Refused) -> bool:
        """Whether requests wait in vain; a second copy less is only slower."""
        facts = self.view.models[refused.model]
        unserved = not self.fleet.copies(refused.model)
        return unserved and not refused.permanent and (is_asked(facts) or facts.min_copies > 0)


def _is_missed(facts: ModelView | None) -> bool:
    return facts is not None and (is_asked(facts) or facts.min_copies > 0)
