"""Roost's own placer as a `Placing`: its knowledge, its plan and its reflex, on virtual time.

What services/placer/{cycle,activate,apply,recover}.py do around the core with store and broker is
done here in the same order, without either. Left out is what those guard against and what cannot
happen here: a lease that is lost, a store that forgets, a registry that changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from services.placer.config import PlacerConfig
from services.placer.core.depths import DepthQuestions
from services.placer.core.plan import Plan, place_one, plan
from services.placer.core.policy import Policy
from services.placer.core.verify import verify
from services.placer.core.wanted import Wanted
from services.placer.knowledge import Active, Knowledge
from services.placer.looks import next_look_s, unclear
from shared.control import Report
from shared.layout import aligned
from shared.models import Footprint
from shared.names import ModelId
from shared.tenants import Quota
from sim.model import Decision, SimModel, SimWorker

_NOTHING: Final = Decision()
_CONFIG: Final = PlacerConfig()


class _Written(NamedTuple):
    """What stands in the store for one worker."""

    models: frozenset[ModelId] = frozenset()
    ends: bool = False


class Roost:
    """The real placer, in one virtual process."""

    prompt: Final = True
    """It is asked at once when a worker has news, as well."""
    tick_s: float
    """Until the next cycle: shorter where a backlog is to be looked at again."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        name: str = "roost",
        tick_s: float = _CONFIG.tick_s,
        profiled: bool = True,
        quotas: Mapping[str, Quota] | None = None,
    ) -> None:
        """`profiled`: footprints of all models were measured beforehand
        (`Settings.profiled`). `quotas`: of tenants (`Manifest.tenant`)."""
        self.name = name
        self.tick_s = self._tick_s = tick_s
        self.now = 0.0
        self.policy = policy or _CONFIG.policy()
        self.knowledge = Knowledge(self.policy, clock=lambda: self.now)
        self.knowledge.bound_tenants(quotas or {})
        self._profiled = profiled
        self._models: dict[ModelId, SimModel] = {}
        self._questions = DepthQuestions(_CONFIG.depth_questions)
        self._written: dict[str, _Written] = {}
        self._generations: dict[str, int] = {}
        """Of each worker that there ever was: the store keeps its assignment."""

    def __repr__(self) -> str:
        return f"<Roost {self.knowledge}>"

    @property
    def wanted(self) -> Wanted:
        """How many workers there should be."""
        return self.knowledge.last_plan.wanted

    def leave(self, worker: str) -> None:
        """Whoever runs the workers takes this one away: what it has is bound elsewhere first."""
        if worker in self.knowledge.reports:
            self.knowledge.leave(worker, "the fleet shrinks")

    def start(self, models: Sequence[SimModel], workers: Sequence[SimWorker]) -> Decision:  # noqa: ARG002 — it waits for their reports
        self._models = {model.id: model for model in models}
        for model in models:
            if model.manifest.min_copies:
                self._activate(model, "min_copies")
        return _NOTHING

    def decide(
        self, reports: Sequence[Report], depths: Mapping[ModelId, int], now: float
    ) -> Decision:
        """One cycle (services/placer/cycle.py)."""
        self.now = now
        knowledge = self.knowledge
        # 1. Observe.
        for report in reports:
            if report.worker not in knowledge.reports:
                self._adopt(report)
        knowledge.see(reports, {}, now)
        self._look(depths)
        # 2. Plan.
        decided = plan(knowledge.view(), self.policy)
        # 3. Verify.
        verified, refused = verify(decided, knowledge.view())
        # 4. Apply.
        knowledge.commit(verified)
        decision = self._follow(verified)
        self._retire(depths)
        # 5. Explain.
        knowledge.remember(msgspec.structs.replace(verified, refused=(*decided.refused, *refused)))
        if verified.pace.unfinished:
            self.tick_s = 0.0  # the rest has its turn at once
        return decision

    def unrouted(self, model: ModelId, now: float) -> Decision:
        """The reflex (services/placer/activate.py)."""
        self.now = now
        knowledge = self.knowledge
        active = knowledge.active.get(model)
        decision = _NOTHING
        if active is None or not active.declared or not knowledge.copies(model):
            self._activate(self._models[model], "first request")
            found = place_one(knowledge.view(), model, self.policy)
            knowledge.commit(found)
            decision = self._follow(found)
        knowledge.wait(model)
        return decision

    # --- parts ------------------------------------------------------------------------------

    def _activate(self, model: SimModel, why: str) -> Active:
        """What the repository knows of it comes along."""
        active = self.knowledge.activate(model.id, model.manifest, why=why)
        self.knowledge.defaults[model.manifest.name] = model.manifest.version
        active.declared = True
        weights = aligned(model.weights_bytes)
        if not active.looked_into:
            active.looked_into = True
            if model.swap_seconds and not model.manifest.stateful:
                active.estimate = Footprint(weights, measured=False)
        if self._profiled:
            workspace = max((case.workspace_bytes for case in model.cases), default=0)
            size = Footprint(weights, workspace, pinned=model.manifest.stateful)
            for kind in self.knowledge.device_kinds():
                active.known = {kind: size, **active.known}
        return active

    def _adopt(self, report: Report) -> None:
        worker = report.worker
        self.knowledge.adopt(worker, {}, self._generations.get(worker, 0))
        self._written.pop(worker, None)

    def _look(self, depths: Mapping[ModelId, int]) -> None:
        """Depths of the queues of which only the broker knows (services/placer/observe.py)."""
        knowledge = self.knowledge
        found = {model: depths[model] for model in self._questions.choose(*unclear(knowledge))}
        knowledge.see_depths(found, self.now)
        self.tick_s = min(self._tick_s, next_look_s(knowledge, found))

    def _follow(self, plan_: Plan) -> Decision:
        """What is not written yet, with the generation that it gets (services/placer/apply.py)."""
        knowledge = self.knowledge
        changed: dict[str, tuple[ModelId, ...]] = {}
        ended: set[str] = set()
        for worker, wanted in knowledge.assigned.items():
            ends = worker in knowledge.leaving and not wanted
            written = _Written(frozenset(wanted), ends)
            if self._written.get(worker, _Written()) == written:
                continue
            self._written[worker] = written
            changed[worker] = tuple(wanted)
            ended.update([worker] if ends else [])
            generation = self._generations.get(worker, 0) + 1
            self._generations[worker] = knowledge.generations[worker] = generation
        if not changed:
            return _NOTHING
        return Decision(
            assigned=changed,
            why=str(plan_)[:500],
            ended=frozenset(ended),
            shares=knowledge.shares,
        )

    def _retire(self, depths: Mapping[ModelId, int]) -> None:
        """The queue of a model goes when nobody holds anything of it."""
        knowledge = self.knowledge
        for model in list(knowledge.retiring):
            if knowledge.in_hand(model):
                continue
            knowledge.forget(model)
            if depths[model]:
                # Asked in the very moment in which it went.
                self._activate(self._models[model], "requests were left")
                knowledge.wait(model)
