"""The placer's decision, whole: who is to consume which model's queue, and every "no" with its
reason and numbers.

Laws (tests/property/test_placer_core.py, test_placer_laws.py): planning again right after
applying a plan changes nothing; no worker is ever planned over its budget; a spike of one model
changes no other model's bindings, unless memory forces an idle one to make room, or a worker is
asked for more than its target and others leave it (`core.balance`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from services.placer.core.balance import balance, finish_moves
from services.placer.core.changes import (
    Bind,
    Considered,
    Explained,
    Plan,
    Retire,
    Unbind,
)
from services.placer.core.fleet import is_asked
from services.placer.core.planner import Planner
from services.placer.core.policy import Policy
from services.placer.core.release import (
    drop_strays,
    release_surplus,
    relieve_overfull,
    relieve_quotas,
)
from services.placer.core.spare import add_spare
from services.placer.core.view import ModelView, View
from shared.names import ModelId

__all__ = [
    "Bind", "Considered", "Explained", "Plan", "Retire", "Unbind", "is_asked", "place_one", "plan",
    "relieve", "want",
]  # fmt: skip


def plan(view: View, policy: Policy) -> Plan:
    """Decides for the whole fleet, as of `view.at`."""
    planner = Planner(view, policy)
    # 1. What should not be where it is: unknown, failed, more than the device holds, or more than
    #    its tenant may have.
    drop_strays(planner)
    relieve_overfull(planner)
    relieve_quotas(planner)
    # 2. What is not needed any more goes, slowly; and where a move has come to its end.
    release_surplus(planner)
    finish_moves(planner)
    # 3. What is needed comes, at once; what leaves with a worker that leaves goes when its
    #    successor is chosen. Again while that frees room for somebody who got a "no".
    while planner.raise_wanted() | planner.hand_over():
        pass
    # 4. Bindings leave workers that are asked too much; and where nobody waits, spare copies.
    if balance(planner):
        while planner.raise_wanted() | planner.hand_over():
            pass
    add_spare(planner)
    # 5. What has no binding, and nobody waiting for one, is not active any more.
    planner.retire_unbound()
    return planner.result()


def place_one(view: View, model: ModelId, policy: Policy) -> Plan:
    """The reflex: one binding for a model that has none. An empty plan when it has one; a
    refusal when there is no room. The model must be in `view.models`."""
    planner = Planner(view, policy)
    if not planner.fleet.copies(model):
        planner.add_copy(view.models[model], "first request", force=True)
    planner.retire_unbound(only_victims=True)
    return planner.result(whole=False)


def relieve(view: View, models: Sequence[ModelId], policy: Policy) -> Plan:
    """One more copy for each of these models that wants one now, and nothing else: what `plan`
    would begin with. Who makes room without a binding left is retired as in `plan`."""
    planner = Planner(view, policy)
    for model in models:
        if model in view.models:
            planner.add_wanted(view.models[model])
    planner.retire_unbound(only_victims=True)
    return planner.result(whole=False)


def want(facts: ModelView, workers: int, policy: Policy) -> int:
    """Copies that would serve the model's demand; one when there is none (it is active)."""
    needed = math.ceil(facts.demand.need / policy.target_utilization - 1e-9)
    return min(max(needed, facts.min_copies, 1), facts.copies_limit(workers))
