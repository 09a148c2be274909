"""Bindings leave workers that are asked too much for others that are asked clearly less.

A model that has several copies gets one more elsewhere, and who has time takes more of its queue;
else, and where that does not help for long, bindings move. Several may be on their way at once;
each is bound at its target before it goes at its source.
While a move is under way, and for a while after it, nothing undoes it (`Pace`).
"""

from __future__ import annotations

import msgspec
import numpy as np

from services.placer.core.choose import Chosen
from services.placer.core.columns import Bools, Floats
from services.placer.core.planner import Planner
from services.placer.core.view import Move
from shared.names import ModelId


def finish_moves(planner: Planner) -> None:
    """The old binding of a move goes once the new one consumes."""
    fleet, at, policy = planner.fleet, planner.view.at, planner.policy
    kept = []
    for move in planner.pace.moves:
        if move.done is not None:
            if at - move.done < policy.move_rest_s:
                kept.append(move)
            continue
        # -1: gone, and so no holder.
        source, target = (fleet.number.get(each, -1) for each in (move.source, move.target))
        if not {source, target} <= set(fleet.holders(move.model)):
            continue
        if fleet.consumes(move.model, target):
            planner.remove(move.model, source, f"moved to {move.target}")
            kept.append(msgspec.structs.replace(move, done=at))
        elif at - move.since < policy.move_timeout_s:
            kept.append(move)
    planner.follow_moves(tuple(kept))


def balance(planner: Planner) -> bool:
    """Begins moves from the hottest workers, while each makes the hotter of two clearly cooler.
    True when anybody made room for one, so that others may find more room than before."""
    at, policy, pace = planner.view.at, planner.policy, planner.pace
    if pace.balanced is not None and at - pace.balanced < policy.move_every_s:
        return False
    planner.pace = msgspec.structs.replace(pace, balanced=at)
    before = len(planner.unbind)
    if planner.fleet.serving > 1:
        _Balance(planner).run()
    return len(planner.unbind) != before


class _Balance:
    """`Fleet.busy` becomes what workers will be asked for once all moves have come to their end."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.fleet = fleet = planner.fleet
        self.moved = {move.model for move in planner.pace.moves}
        self.left = planner.policy.moves_at_once
        self.open: Bools = fleet.takes & fleet.serves
        self.stuck: Bools = ~fleet.serves
        columns = planner.columns
        # What works off a backlog is over before a move would help.
        fleet.busy -= fleet.spread(columns.catching_up)
        asked = columns.need - columns.catching_up
        copies = np.maximum(fleet.count, 1)
        self.share: Floats = asked / copies
        """What each copy is asked for."""
        usual = np.where(fleet.count > 1, np.minimum(columns.usual, asked), asked)
        self.surge: Floats = (asked - usual) / copies
        """Of that, beyond what is usual for a model that has got several."""
        self.free = self._hot_for_long() | self._uneven(fleet.busy - fleet.spread(asked - usual))
        """Workers that bindings may leave. For others only what surges gets more copies: in a spike
        these soon help, and the neighbours that it finds stay."""
        for move in planner.pace.moves:
            if move.done is None:
                self.left -= 1
                self._foresee(move)

    def __repr__(self) -> str:
        return f"<Balance {self.fleet.busy.round(2).tolist()}>"

    def run(self) -> None:
        while self.left > 0 and not self.planner.spent():
            uneven = self._uneven(self.fleet.busy) & ~self.stuck
            if not uneven.any():
                break
            hot = int(np.where(uneven, self.fleet.busy, -np.inf).argmax())
            if self._add_copy(hot) or (self.free[hot] and self._relieve(hot)):
                self.left -= 1
            else:
                self.stuck[hot] = True

    def _uneven(self, busy: Floats) -> Bools:
        """Workers that are asked for too much, while others are asked for clearly less."""
        policy = self.planner.policy
        least = float(busy[self.open].min(initial=np.inf))
        uneven: Bools = (busy > policy.target_utilization) & (busy - least > policy.uneven_above)
        return uneven

    def _hot_for_long(self) -> Bools:
        """Workers that further copies of what surges have not relieved."""
        planner, names = self.planner, self.fleet.names
        at, before = planner.view.at, planner.pace.hot
        uneven = np.flatnonzero(self._uneven(self.fleet.busy)).tolist()
        hot = {names[worker]: before.get(names[worker], at) for worker in uneven}
        planner.pace = msgspec.structs.replace(planner.pace, hot=hot)
        since = np.array([hot.get(name, np.inf) for name in names])
        long: Bools = at - since >= planner.policy.neighbours_stay_s
        return long

    def _foresee(self, move: Move) -> None:
        """The source has its share now, and the others will have it."""
        fleet = self.fleet
        source, holders = fleet.number.get(move.source), fleet.holders(move.model)
        rest = [worker for worker in holders if worker != source]
        if source in holders and rest:
            share = float(self.share[self.planner.columns.row[move.model]])
            fleet.busy[source] -= share * fleet.slowness[source]
            fleet.busy[rest] += share / len(rest) * fleet.slowness[rest]

    def _add_copy(self, hot: int) -> bool:
        """One more copy, where there is room, of what has several and asks this worker for most:
        who has time takes more of a queue."""
        fleet, planner, policy = self.fleet, self.planner, self.planner.policy
        before = float(fleet.busy[hot])
        several = [
            (float(self.share[row]), model, row)
            for model in fleet.assigned(hot)
            if fleet.count[row := planner.columns.row[model]] > 1
            and (self.free[hot] or self.surge[row] >= policy.move_gain)
            and self._may_have_another(model, row)
        ]
        if not several:
            return False
        share, model, row = max(several)
        copies = int(fleet.count[row])
        each = share * copies / (copies + 1)
        cooler = self.open & (fleet.busy + each * fleet.slowness <= before - policy.move_gain)
        if each < policy.move_least or not cooler.any():
            return False
        chosen = planner.chooser.choose(planner.view.models[model], extra=True, among=cooler)
        if not isinstance(chosen, Chosen):
            return False
        busy, holders = fleet.busy.copy(), fleet.holders(model)
        planner.put(model, chosen, f"{fleet.names[hot]} is asked for {before:.0%}")
        busy[holders] -= (share - each) * fleet.slowness[holders]
        busy[chosen.worker] += each * fleet.slowness[chosen.worker]
        fleet.busy = busy
        self.moved.add(model)
        return True

    def _relieve(self, hot: int) -> bool:
        """Moves the binding with which both ends come nearest to each other."""
        fleet, planner, policy = self.fleet, self.planner, self.planner.policy
        before = float(fleet.busy[hot])
        half = (before - float(fleet.busy[self.open].min())) / 2
        found = []
        for model in fleet.assigned(hot):
            row = planner.columns.row[model]
            share = float(self.share[row])
            if share >= policy.move_least and self._may_move(model, row, hot):
                found.append((abs(share * float(fleet.slowness[hot]) - half), model, share))
        for _, model, share in sorted(found)[: policy.move_tries]:
            after = fleet.busy + share * fleet.slowness
            cooler = self.open & (after <= before - policy.move_gain)
            if not cooler.any():
                continue
            chosen = planner.chooser.choose(
                planner.view.models[model], may_evict=True, extra=True, among=cooler
            )
            if isinstance(chosen, Chosen):
                self._move(model, hot, chosen, share)
                return True
        return False

    def _may_have_another(self, model: ModelId, row: int) -> bool:
        fleet, columns = self.fleet, self.planner.columns
        return (
            model not in self.moved
            and int(fleet.count[row]) < min(int(columns.limit[row]), fleet.serving)
            and not fleet.on_their_way(model)
        )

    def _may_move(self, model: ModelId, row: int, hot: int) -> bool:
        fleet, planner = self.fleet, self.planner
        # What is asked of a newcomer is not known before the average has seen it.
        settled = planner.view.at - fleet.assigned(hot)[model].since >= planner.policy.fast_tau_s
        bound = fleet.workers[hot].is_bound(model)
        return settled and bound and self._may_have_another(model, row)

    def _move(self, model: ModelId, hot: int, chosen: Chosen, share: float) -> None:
        fleet, planner = self.fleet, self.planner
        source, target = fleet.names[hot], fleet.names[chosen.worker]
        for victim in chosen.victims:
            planner.evict(victim, chosen.worker, model)
        busy = fleet.busy.copy()
        reason = f"from {source}, {busy[hot]:.0%} asked for"
        planner.put(model, chosen, reason)
        busy[hot] -= share * fleet.slowness[hot]
        busy[chosen.worker] += share * fleet.slowness[chosen.worker]
        fleet.busy = busy
        self.moved.add(model)
        move = Move(model, source, target, planner.view.at)
        planner.follow_moves((*planner.pace.moves, move))
