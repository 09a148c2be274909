"""One planning: collects changes while it keeps the fleet's picture up to date.

Each step finds by columns which models it concerns, and then looks at those alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np

from services.placer.core.changes import Bind, Explained, Plan, Retire, Unbind
from services.placer.core.choose import Chooser, Chosen, PutOff
from services.placer.core.columns import Bools, Ints, columns_of
from services.placer.core.fleet import Fleet, is_asked
from services.placer.core.policy import Policy
from services.placer.core.quotas import Given, barred, by_turns, make_way, put_back
from services.placer.core.refused import Refused
from services.placer.core.view import Binding, ModelView, Move, Pace, View
from services.placer.core.wanted import workers_wanted
from shared.names import ModelId

_REFUSED_WORK = 7
"""What saying no costs, against choosing a place."""


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
        self.low_since: dict[ModelId, float] = {}
        self._victims: set[ModelId] = set()
        self._retired: set[ModelId] = set()
        self._looked = 0
        self._searched: dict[ModelId, frozenset[str]] = {}
        self._over_quota: dict[ModelId, float] = {}
        self._raised = False
        self.unfinished = False
        """Something that is urgent was left for the next planning."""

    def __repr__(self) -> str:
        return f"<Planner +{len(self.bind)} -{len(self.unbind)} at {self.view.at:.3f}>"

    # --- steps ---

    def raise_wanted(self) -> bool:
        """True when anything was changed. What is too much for one planning is put off: within
        its class and priority, who waits longest for its turn goes first at the next."""
        if self.spent():
            if not self._raised:
                waited = self.view.pace.put_off
                due = [m for m in self._due(self._wanted()) if m not in self._retired]
                put_off = {model: waited.get(model, self.view.at) for model in due}
                self.pace = msgspec.structs.replace(self.pace, put_off=put_off)
            return False
        self._raised = True
        self._over_quota.clear()
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
                    if model in self._searched:
                        put_off[model] = waited.get(model, self.view.at)
                    break
        searched = {**self.view.pace.searched, **self._searched}
        self.pace = msgspec.structs.replace(
            self.pace,
            put_off=put_off,
            searched={model: searched[model] for model in put_off if model in searched},
            over_quota=dict(self._over_quota),
        )
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
                holders = fleet.holders(model)
                successors = [n for n in holders if fleet.serves[n] and not fleet.stalled[n]]
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
        unheld = self.models(self.columns.present & (self.fleet.holding == 0))
        refusals = {no.model: no for no in self.refused}
        for model in sorted(unheld):
            if model in self._retired or (only_victims and model not in self._victims):
                continue
            if not only_victims and (model in self.pace.put_off or self.tidied()):
                continue
            facts, refused = self.view.models[model], refusals.get(model)
            if refused is not None and refused.permanent:
                message = f"{model} cannot be placed: {refused.refusal}"
                self.retire_model(Retire(model, message, code=refused.code))
            elif not is_asked(facts) and not facts.min_copies and self.view.workers:
                why = "made room for another" if refused is None else str(refused.refusal)
                self.retire_model(Retire(model, why))

    # --- changes ---

    def add_copy(self, facts: ModelView, reason: str, *, force: bool = False) -> bool:
        """Finds a worker for one more copy, if need be with idle models making room."""
        copies = self.fleet.copies(facts.model)
        too_few = copies < facts.min_copies
        may_evict = force or is_asked(facts) or too_few
        # Of its tenant's quota room is made by its tenant alone, and before anybody else makes any.
        given = self._give_up(facts) if may_evict else []
        chosen = self.chooser.choose(
            facts,
            may_evict=may_evict,
            reclaim=True,
            extra=bool(copies) and not too_few and not self._starves(facts),
        )
        put_back(self.fleet, given)
        self._looked += 1
        if isinstance(chosen, PutOff):
            self._searched[facts.model] = chosen.searched
            return False
        if isinstance(chosen, Refused):
            chosen = self._waited_for_quota(facts, chosen)
            self._looked += _REFUSED_WORK
            self.refused.append(chosen)
            self._whys[facts.model] = str(chosen.refusal)
            return False
        for each in given:
            self.evict(each.model, each.worker, facts.model)
        for victim in chosen.victims:
            self.evict(victim, chosen.worker, facts.model)
        self.put(facts.model, chosen, reason)
        return True

    def _give_up(self, facts: ModelView) -> list[Given]:
        """Copies that the model's tenant gives up for it, taken from the picture."""
        if self.fleet.tenancy.left(facts.model) is None:
            return []
        least, most = self.chooser.needs(facts)
        given = make_way(self.fleet, self.chooser.victims, facts.model, least, most)
        self._looked += len(given)
        return given

    def _waited_for_quota(self, facts: ModelView, no: Refused) -> Refused:
        """Who is asked and has no copy, and whose tenant may have no more, is refused for good
        after a while: its requests are told."""
        if no.kind != "quota" or self.fleet.holders(no.model) or not is_asked(facts):
            return no
        since = self.view.pace.over_quota.get(no.model, self.view.at)
        self._over_quota[no.model] = since
        late = self.view.at - since >= self.policy.quota_wait_s
        return msgspec.structs.replace(no, permanent=no.permanent or late)

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
        searched = self.chooser.victims.work
        return self._looked + searched + len(self.unbind) >= self.policy.work_per_tick

    @property
    def nobody_waits(self) -> bool:
        """Whether all that is asked has the copies that it needs, or can have no more."""
        return not self.pace.put_off and not any(
            no.kind in {"no_room", "no_worker", "leaving", "overtaken"} for no in self.refused
        )

    # --- parts ---

    def models(self, rows: Bools) -> list[ModelId]:
        ids = self.columns.ids
        return [model for row in np.flatnonzero(rows).tolist() if (model := ids[row]) is not None]

    def tidied(self) -> bool:
        """Whether enough was taken away: half of the work is for those that wait."""
        return len(self.unbind) + len(self.retire) >= max(self.policy.work_per_tick // 2, 1)

    def _due(self, wants: Ints) -> Iterable[ModelId]:
        """Models that want more, the most urgent first: who was put off for too long; who has
        nothing; whose tenant holds least over its share; by priority; who was put off, the longest
        first; by need."""
        columns, count = self.columns, self.fleet.count
        rows = np.flatnonzero(columns.present & ((wants > count) | (count == 0)))
        waited, at = self.view.pace.put_off, self.view.at
        models = [model for row in rows.tolist() if (model := columns.ids[row]) is not None]
        since = [waited.get(model, at) for model in models]
        late = at - self.policy.put_off_s
        due = zip(
            [each if each <= late else at for each in since],
            (count[rows] > 0).tolist(),
            (-columns.priority[rows]).tolist(),
            since,
            (-columns.need[rows]).tolist(),
            models,
            strict=True,
        )
        ordered = sorted(due)
        if self.fleet.tenancy.several:
            return by_turns(ordered, self.fleet.tenancy, self.spent)
        return [model for *_, model in ordered]

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
        need = float(self.columns.need[self.columns.row[facts.model]])
        return self.fleet.copies(facts.model) == 1 and need > 1.0

    def evict(self, victim: ModelId, worker: int, newcomer: ModelId) -> None:
        """Unbinds a copy that makes room."""
        self.give(victim, worker, f"makes room for {newcomer}", f"made room for {newcomer}")

    def give(self, victim: ModelId, worker: int, reason: str, rest: str) -> None:
        """Unbinds a copy that others need more; with the last one that serves also those on
        workers that leave, for which `rest` is the reason."""
        self._victims.add(victim)
        facts = self.view.models.get(victim)
        idle = facts is not None and not is_asked(facts)
        self.remove(victim, worker, reason, idle=idle)
        if not self.fleet.copies(victim):
            for leaving in self.fleet.holders(victim):
                self.remove(victim, leaving, rest, idle=idle)

    def _made_room(self, facts: ModelView) -> bool:
        """Whether it lost its last binding in this very plan, and nobody will miss it."""
        return (
            facts.model in self._victims
            and not is_asked(facts)
            and not (facts.min_copies or self.fleet.copies(facts.model))
        )

    def retire_model(self, gone: Retire) -> None:
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
        unfinished = self.unfinished or bool(self.pace.put_off)
        self.pace = msgspec.structs.replace(self.pace, unfinished=unfinished)
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
            barred=barred(self.fleet),
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
            low_since=self.low_since,
            fleet_since=since,
            pace=self.pace,
            tenants=self.fleet.tenancy.told(columns_of(self.view.models), self.columns),
        )

    def _hurts(self, refused: Refused) -> bool:
        """Whether requests wait in vain; a second copy less is only slower."""
        facts = self.view.models[refused.model]
        unserved = not self.fleet.copies(refused.model)
        barred = refused.permanent or refused.kind in {"quota", "suspected"}
        return unserved and not barred and (is_asked(facts) or facts.min_copies > 0)


def _is_missed(facts: ModelView | None) -> bool:
    return facts is not None and (is_asked(facts) or facts.min_copies > 0)
