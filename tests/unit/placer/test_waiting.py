"""Of which models something waits, by what came and what was looked at."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.placer.core.demand import DemandTracker
from services.placer.core.policy import Policy
from services.placer.picture import Active
from services.placer.waiting import Waiting
from shared.names import ModelId

MODELS = [ModelId(f"m{number}/1") for number in range(4)]
models = st.sampled_from(MODELS)


class Queues(RuleBasedStateMachine):
    """Requests come and are consumed, models come and go, looks are late: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.active: dict[ModelId, Active] = {}
        self.waiting = Waiting(self.active, DemandTracker(Policy()))
        self.now = 100.0

    @rule(model=models)
    def activate(self, model: ModelId) -> None:
        """Or activate again what was being retired, with the depth that it had."""
        if model not in self.active:
            self.active[model] = Active(None)
            self.active[model].depth = 3
            self.waiting.look_at(model)

    @rule(model=models)
    def retire(self, model: ModelId) -> None:
        self.active.pop(model, None)

    @rule(model=models)
    def put(self, model: ModelId) -> None:
        if model in self.active:
            self.waiting.put(model, self.now)
            assert model in self.waiting.asked()

    @rule(depths=st.dictionaries(models, st.integers(0, 2)), late=st.booleans())
    def look(self, depths: dict[ModelId, int], late: bool) -> None:
        """What was asked for before a request came says nothing of it."""
        waited = {model for model, each in self.active.items() if each.waiting_at is not None}
        asked_at = 0.0 if late else self.now + 1
        self.waiting.see(depths, asked_at, self.now + 1)
        for model in depths.keys() & self.active.keys():
            kept = model in waited and (late or depths[model] > 0)
            assert (self.active[model].waiting_at is not None) == kept
            assert (self.active[model].backlog_since is not None) == (depths[model] > 0)
        self.now += 2

    @rule(consumed=st.sets(models))
    def consume(self, consumed: set[ModelId]) -> None:
        self.waiting.consumed(consumed)
        for model in consumed & self.active.keys():
            assert self.active[model].waiting_at is None

    @invariant()
    def whatever_waits_is_asked_for(self) -> None:
        assert self.waiting.asked() == {
            model: each
            for model, each in self.active.items()
            if each.depth or each.waiting_at is not None
        }


TestQueues = Queues.TestCase
