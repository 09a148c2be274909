"""Bindings leave workers that are asked too much for others that are asked clearly less.

Several may be on their way at once; each is bound at its target before it goes at its source.
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
        spiking = fleet.count > 1
        self.passing: Floats = np.where(
            spiking, np.maximum(columns.need - columns.usual, 0.0), columns.catching_up
        )
        """Of what each is asked for, what is soon over, or has workers of its own."""
        self._leave_out_spikes()
        for move in planner.pace.moves:
            if move.done is None:
                self.left -= 1
                self._foresee(move)

    def __repr__(self) -> str:
        return f"<Balance {self.fleet.busy.round(2).tolist()}>"

    def run(self) -> None:
        while self.left > 0 and not self.planner.spent():
            hot = self._hottest()
            if hot is None:
                break
            if self._relieve(hot):
                self.left -= 1
            else:
                self.stuck[hot] = True

    def _leave_out_spikes(self) -> None:
        """What works off a backlog is over before a move would help. And a spiking model gets
        workers of its own: the neighbours that it finds there stay."""
        fleet = self.fleet
        for row in np.flatnonzero(self.passing * (fleet.count > 0)):
            model = self.planner.columns.ids[int(row)]
            if model is not None:
                holders = fleet.holders(model)
                share = float(self.passing[row]) / int(fleet.count[row])
                fleet.busy[holders] -= share * fleet.slowness[holders]

    def _share(self, model: ModelId) -> float:
        row = self.planner.columns.row[model]
        passing = float(self.passing[row]) / max(int(self.fleet.count[row]), 1)
        return self.fleet.share(model) - passing

    def _foresee(self, move: Move) -> None:
        """The source has its share now, and the others will have it."""
        fleet = self.fleet
        source, holders = fleet.number.get(move.source), fleet.holders(move.model)
        rest = [worker for worker in holders if worker != source]
        if source in holders and rest:
            share = self._share(move.model)
            fleet.busy[source] -= share * fleet.slowness[source]
            fleet.busy[rest] += share / len(rest) * fleet.slowness[rest]

    def _hottest(self) -> int | None:
        """The worker that is asked for most, if that is too much and others have clearly less."""
        policy, busy = self.planner.policy, self.fleet.busy
        hot = int(np.where(self.stuck, -np.inf, busy).argmax())
        if self.stuck[hot] or busy[hot] <= policy.target_utilization:
            return None
        least = float(busy[self.open].min(initial=np.inf))
        return hot if busy[hot] - least > policy.uneven_above else None

    def _relieve(self, hot: int) -> bool:
        """Moves the binding with which both ends come nearest to each other."""
        fleet, planner, policy = self.fleet, self.planner, self.planner.policy
        before = float(fleet.busy[hot])
        half = (before - float(fleet.busy[self.open].min())) / 2
        found = []
        for model in fleet.assigned(hot):
            share = self._share(model)
            if share >= policy.move_least and self._may_move(model, hot):
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

    def _may_move(self, model: ModelId, hot: int) -> bool:
        fleet, planner, columns = self.fleet, self.planner, self.planner.columns
        row = columns.row[model]
        # What is asked of a newcomer is not known before the average has seen it.
        settled = planner.view.at - fleet.assigned(hot)[model].since >= planner.policy.fast_tau_s
        return (
            settled
            and model not in self.moved
            and int(fleet.count[row]) < min(int(columns.limit[row]), fleet.serving)
            and fleet.workers[hot].is_bound(model)
            and not fleet.on_their_way(model)
        )

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
