"""The placer's laws over time: the real loop (reports, view, plan, verify, commit) with workers
that die, fail, fall silent and repeat themselves, and with placers that replace each other."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.placer.core.changes import applied
from services.placer.core.plan import place_one, plan
from services.placer.core.policy import Policy
from services.placer.core.verify import verify
from services.placer.core.view import View, footprint, residents
from services.placer.knowledge import Knowledge
from shared.control import ModelReport, Report
from shared.fit import can_be_served, fit_tiers
from shared.models import Footprint, Manifest, Placement
from shared.names import ModelId
from shared.tenants import Quota
from tests.property.test_placer_core import NOW, POLICY, served, views

TICK_S = 0.2
MODELS = [ModelId(f"m{number}/1") for number in range(7)]
SIZES = dict(zip(MODELS, (10, 20, 30, 40, 10, 20, 70), strict=True))
PLACEMENTS = {
    MODELS[3]: Placement(worker_selector={"zone": "a"}),
    MODELS[4]: Placement(spread_by="zone"),
    MODELS[5]: Placement(alone=True),
}


@given(views())
@settings(max_examples=80, deadline=None)
def test_no_model_starves_while_another_holds_what_it_does_not_need(view: View) -> None:
    """Who is refused for want of room would find none if all that is idle, old enough and not to
    be kept went from any one worker."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    held = {model for worker in after.workers.values() for model in worker.assigned}

    def needed(model: ModelId, since: float) -> bool:
        facts = after.models.get(model)
        if facts is None:
            return False
        age = max(POLICY.victim_min_age_s, POLICY.victim_min_age_loads * facts.load_seconds)
        idle = NOW - facts.demand.last_active >= POLICY.victim_idle_s
        asked = facts.waiting or facts.demand.backlog > 0
        return asked or not idle or NOW - since < age or facts.min_copies > 0

    for no in decided.refused:
        facts = view.models[no.model]
        if no.model in held or not (facts.waiting or facts.demand.backlog):
            continue
        for worker in after.workers.values():
            selector = facts.placement.worker_selector
            matches = selector.items() <= worker.labels.items()
            if not worker.takes_new or no.model in worker.failed or not matches:
                continue
            stay = [m for m, each in worker.assigned.items() if needed(m, each.since)]
            size = footprint(worker, no.model, facts)
            others = residents(worker, stay, after.models)
            assert fit_tiers(size, others, worker.budget_bytes, worker.host_bytes) is not None


@given(views())
@settings(max_examples=80, deadline=None)
def test_who_is_to_be_alone_is(view: View) -> None:
    """Wherever a copy was put: nobody is beside it, and it is beside nobody."""
    decided = plan(view, POLICY)
    after = applied(view, decided)
    for new in decided.bind:
        assigned = after.workers[new.worker].assigned
        alone = [m for m in assigned if m in after.models and after.models[m].placement.alone]
        assert not alone or len(assigned) == 1


@given(views(), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_what_is_put_off_is_taken_up_at_the_next_plannings(view: View, work: int) -> None:
    """However little one planning decides, it takes away no more than that, and says so while a
    worker has more than it can serve. Nobody's turn never comes: after a few plannings no worker
    has too much, and what is asked is bound, or was refused with a reason."""
    policy = msgspec.structs.replace(POLICY, work_per_tick=work)
    refused: set[ModelId] = set()
    for _ in range(40):  # 10 models at most, and 6 on each of 5 workers
        decided = plan(view, policy)
        over = [gone for gone in decided.unbind if gone.reason == "the device is over its budget"]
        assert len(over) <= work // 2
        view = applied(view, decided)
        too_much = any(w.budget_bytes and not served(view, w) for w in view.workers.values())
        assert decided.pace.unfinished or not too_much
        refused |= {no.model for no in decided.refused}
        view = msgspec.structs.replace(view, at=view.at + TICK_S)
    assert not too_much
    held = {model for worker in view.workers.values() for model in worker.assigned}
    for model, facts in view.models.items():
        if facts.waiting or facts.demand.backlog:
            assert model in held or model in refused


@given(views(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_dead_workers_models_are_placed_again_in_one_tick(
    view: View, data: st.DataObject
) -> None:
    """What was asked and only there is elsewhere after one plan, or refused with a reason."""
    settled = applied(view, plan(view, POLICY))
    if not settled.workers:
        return
    dead = data.draw(st.sampled_from(sorted(settled.workers)))
    rest = {name: worker for name, worker in settled.workers.items() if name != dead}
    decided = plan(msgspec.structs.replace(settled, workers=rest), POLICY)
    after = applied(msgspec.structs.replace(settled, workers=rest), decided)
    held = {model for worker in after.workers.values() for model in worker.assigned}
    refused = {no.model for no in decided.refused}
    for model in settled.workers[dead].assigned:
        facts = settled.models[model]
        if facts.waiting or facts.demand.backlog:
            assert model in held or model in refused


class _Worker:
    """One worker as the placer sees it: it follows its assignment when it reports."""

    def __init__(self, name: str, born: float) -> None:
        self.name = name
        self.born = born
        self.seq = 0
        self.bound: set[ModelId] = set()
        self.broken: set[ModelId] = set()
        self.arrived: dict[ModelId, int] = {}
        self.held: dict[ModelId, int] = {}
        self.generation = 0

    def report(self, at: float) -> Report:
        self.seq += 1
        return Report(
            worker=self.name,
            incarnation=f"{self.born}",
            seq=self.seq,
            at=at,
            device_kind="sim",
            device_name="sim",
            budget_bytes=100,
            used_bytes=0,
            measured_bytes=0,
            generation=self.generation,
            labels={"zone": "a" if self.name in {"w0", "w1"} else "b"},
            models=tuple(
                ModelReport(
                    model=model,
                    tier="disk" if model in self.broken else "device",
                    phase="failed" if model in self.broken else "ready",
                    bound=model not in self.broken,
                    footprint=Footprint(SIZES[model], 2),
                    held=self.held.get(model, 0),
                    arrived=self.arrived.get(model, 0),
                    seconds_per_item=0.01,
                    load_seconds=0.1,
                    last_used=at,
                    error="it is broken" if model in self.broken else None,
                )
                for model in sorted(self.bound)
            ),
        )


class Loop(RuleBasedStateMachine):
    """One placer's term after another, over the same workers and the same store."""

    tenants: Mapping[ModelId, str] = {}
    """Whose models are; nobody's where nothing is said."""

    @initialize()
    def begin(self) -> None:
        self.now = 1000.0
        self.fence = 0
        self.workers: dict[str, _Worker] = {}
        self.told: dict[str, Report] = {}
        self.stored: dict[str, tuple[int, int, frozenset[ModelId]]] = {}
        self.depths = dict.fromkeys(MODELS, 0)
        self.stale: list[tuple[int, Knowledge]] = []
        self.quotas: dict[str, Quota] = {}
        self.new_placer()
        self.join(0)

    # --- what happens ---

    @rule()
    def new_placer(self) -> None:
        """Another takes the lease; the one before has not noticed yet."""
        if self.fence:
            self.stale.append((self.fence, self.knowledge))
        self.fence += 1
        self.knowledge = Knowledge(Policy(), clock=lambda: self.now)
        self.knowledge.bound_tenants(self.quotas)
        for model in MODELS:
            name = model.removesuffix("/1")
            manifest = Manifest(
                name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=SIZES[model],
                created_at=0.0, placement=PLACEMENTS.get(model, Placement()),
                tenant=self.tenants.get(model, ""),
            )  # fmt: skip
            self.knowledge.activate(model, manifest, why="law")
            self.knowledge.defaults[name] = 1

    @rule(number=st.integers(0, 3))
    def join(self, number: int) -> None:
        """A worker starts, or starts again: it knows nothing of what it had."""
        name = f"w{number}"
        self.workers[name] = _Worker(name, self.now)
        self._hear(name)

    @rule(number=st.integers(0, 3))
    def die(self, number: int) -> None:
        self.workers.pop(f"w{number}", None)
        self.told.pop(f"w{number}", None)
        self.stored.pop(f"w{number}", None)

    @rule(model=st.sampled_from(MODELS), requests=st.sampled_from([1, 5, 100]))
    def ask(self, model: ModelId, requests: int) -> None:
        """They wait in the queue, or where it is consumed."""
        consumers = [worker for worker in self.workers.values() if model in worker.bound]
        if not consumers:
            self.depths[model] += requests
            if model in self.knowledge.active:
                self.knowledge.wait(model)
        for worker in consumers:
            worker.held[model] = worker.held.get(model, 0) + requests
            worker.arrived[model] = worker.arrived.get(model, 0) + requests

    @rule(number=st.integers(0, 3), model=st.sampled_from(MODELS))
    def break_load(self, number: int, model: ModelId) -> None:
        worker = self.workers.get(f"w{number}")
        if worker is not None and model not in worker.bound:
            worker.broken.add(model)

    @rule(lost=st.sets(st.integers(0, 3)), doubled=st.booleans(), answered=st.booleans())
    def tick(self, lost: set[int], doubled: bool, answered: bool) -> None:
        """A look at what has been told, some of it old and some of it twice."""
        self.now += TICK_S
        for name, worker in self.workers.items():
            if answered:
                worker.held.clear()
            if int(name[1:]) not in lost:
                self._hear(name)
        self._look()
        if doubled:
            before = [self._rates(), self._assigned()]
            self._look()
            assert [self._rates(), self._assigned()] == before, "a doubled report did something"
        self._check_placed()

    @rule(seconds=st.sampled_from([1.0, 11.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: bool(self.stale))
    @rule(model=st.sampled_from(MODELS))
    def stale_placer_writes(self, model: ModelId) -> None:
        """It still believes that the lease is its own: the store refuses what it says."""
        fence, knowledge = self.stale.pop()
        before = dict(self.stored)
        known = [report for name, report in self.told.items() if name in knowledge.reports]
        knowledge.see(known, {}, self.now)
        if model in knowledge.active:
            knowledge.commit(place_one(knowledge.view(), model, Policy()))
        self._write(knowledge, fence)
        newer = {name for name, (by, _, _) in before.items() if by > fence}
        assert all(self.stored[name] == before[name] for name in newer)

    # --- what must hold ---

    @invariant()
    def no_worker_is_over_its_budget(self) -> None:
        for worker in self.knowledge.view().workers.values():
            sizes = residents(worker, worker.assigned, self.knowledge.view().models)
            assert can_be_served(sizes, worker.budget_bytes, worker.host_bytes)

    @invariant()
    def copies_are_where_they_may_be(self) -> None:
        for name, models in self.knowledge.assigned.items():
            if name in self.told:
                assert MODELS[3] not in models or name in {"w0", "w1"}
        homes = [name for name, models in self.knowledge.assigned.items() if MODELS[4] in models]
        zones = [self.told[name].labels["zone"] for name in homes if name in self.told]
        assert len(zones) == len(set(zones))

    # --- parts ---

    def _check_planned(self, before: View, after: View) -> None:
        """Around each plan that was committed."""

    def _hear(self, name: str) -> None:
        worker = self.workers[name]
        _, generation, models = self.stored.get(name, (0, 0, frozenset()))
        if generation >= worker.generation:
            worker.generation = generation
            for model in models - worker.bound - worker.broken:
                worker.held[model] = worker.held.get(model, 0) + self.depths[model]
                worker.arrived[model] = worker.arrived.get(model, 0) + self.depths[model]
                self.depths[model] = 0
            for model in worker.bound - models:
                self.depths[model] += worker.held.pop(model, 0)
            worker.bound = set(models)
        self.told[name] = worker.report(self.now)

    def _adopt(self, name: str) -> None:
        _, generation, models = self.stored.get(name, (0, 0, frozenset()))
        self.knowledge.adopt(name, dict.fromkeys(sorted(models), "stored"), generation)

    def _look(self) -> None:
        knowledge = self.knowledge
        for name in self.told.keys() - knowledge.reports.keys():
            if name not in knowledge.assigned:
                self._adopt(name)
        for model in MODELS:
            if self.depths[model] and model not in knowledge.active:
                manifest = knowledge.retiring[model].active.manifest
                knowledge.activate(model, manifest, why="asked again")
        knowledge.see(list(self.told.values()), dict(self.depths), self.now)
        before = knowledge.view()
        kept, refused = verify(plan(before, knowledge.policy), knowledge.view())
        assert not refused
        knowledge.commit(kept)
        knowledge.remember(kept)
        self._check_planned(before, knowledge.view())
        again = plan(knowledge.view(), knowledge.policy)
        left = bool(self.tenants) and bool(kept.retire)  # what those asked for is others' now
        assert left or not again.changes, f"{kept}\nthen {again}"
        self._write(knowledge, self.fence)

    def _write(self, knowledge: Knowledge, fence: int) -> None:
        """As the store does it: a lower fence than what stands there is refused."""
        for name, models in knowledge.assigned.items():
            by, generation, stands = self.stored.get(name, (0, 0, frozenset()))
            if by <= fence and name in self.told and stands != models.keys():
                self.stored[name] = (fence, generation + 1, frozenset(models))
                knowledge.generations[name] = generation + 1

    def _check_placed(self) -> None:
        """Whatever is asked is assigned to a living worker, or was refused with its reason."""
        knowledge = self.knowledge
        assert knowledge.assigned.keys() <= self.told.keys()
        refused = {no.model for no in knowledge.last_plan.refused}
        retired = {gone.model for gone in knowledge.last_plan.retire}
        for model, facts in knowledge.view().models.items():
            if facts.waiting or facts.demand.backlog:
                assert knowledge.copies(model) or model in refused or model in retired

    def _rates(self) -> dict[ModelId, float]:
        rows = self.knowledge.tracker.rows
        return {model: float(rows.rate[row]) for model, row in rows.row.items()}

    def _assigned(self) -> dict[str, set[ModelId]]:
        return {name: set(models) for name, models in self.knowledge.assigned.items()}


TestLoop = Loop.TestCase
TestLoop.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
