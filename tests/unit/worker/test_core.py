"""What the core decides when models, subscriptions and batches meet."""

from __future__ import annotations

import msgspec

from services.worker.core.events import (
    Action,
    Answer,
    Assigned,
    BatchRan,
    Bury,
    ConsumerStarted,
    ConsumerStopped,
    DeathKept,
    EngineLost,
    EngineStarted,
    Fact,
    FetchModel,
    ForgetModel,
    GiveBack,
    Item,
    ItemArrived,
    ItemCancelled,
    ItemSettled,
    KeepDeath,
    KillEngine,
    LoadModel,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    Refuse,
    RunBatch,
    StartConsumer,
    StopConsumer,
)
from services.worker.core.worker import WorkerCore
from shared.models import Case, Manifest
from shared.names import model_id

A, B = model_id("a", 1), model_id("b", 1)


def loaded(model: str, batch_s: float = 0.004, rows: tuple[int, ...] = (1,)) -> ModelLoaded:
    return ModelLoaded(model, (), 10, 0.1, tuple(Case(each, 0, batch_s) for each in rows))


def fetched(model: str, digit: str = "0") -> ModelFetched:
    manifest = Manifest(
        name=model.partition("/")[0],
        version=1,
        digest="sha256:" + digit * 64,
        size_bytes=10,
        created_at=0.0,
        max_batch_size=4,
    )
    return ModelFetched(model, manifest)


class Desk:
    """A core with models ready and bound, and what it last said."""

    def __init__(self, *models: str, batch_s: float = 0.004, **limits) -> None:
        self.core = WorkerCore(**limits)
        self.now = 0.0
        self.tell(EngineStarted(1000, "cpu"), Assigned(models, 1, 1))
        self.subscriptions: dict[str, int] = {}
        for model in models:
            self.tell(fetched(model))
        for model in models:
            for start in self.tell(loaded(model, batch_s, (1, 4))):
                if isinstance(start, StartConsumer):
                    self.subscriptions[start.model] = start.subscription
                    self.tell(ConsumerStarted(start.subscription))
        self.last = 0

    def tell(self, *facts: Fact) -> list[Action]:
        actions = self.core.handle(list(facts), self.now)
        self.core.validate()
        return actions

    def arrive(self, model: str, count: int = 1, nbytes: int = 1) -> list[Action]:
        facts = []
        for _ in range(count):
            self.last += 1
            item = Item(
                item=self.last,
                model=model,
                subscription=self.subscriptions[model],
                arrived=self.now,
                nbytes=nbytes,
            )
            facts.append(ItemArrived(item))
        return self.tell(*facts)


def of(kind: type, actions: list[Action]) -> list:
    return [action for action in actions if isinstance(action, kind)]


def test_a_free_device_is_never_kept_waiting():
    """One request runs at once; those that come meanwhile run together."""
    desk = Desk(A)
    assert [run.items for run in of(RunBatch, desk.arrive(A))] == [(1,)]
    assert of(RunBatch, desk.arrive(A, 3)) == []
    desk.now += 0.004
    actions = desk.tell(BatchRan(1, (), 0.004, 0))
    assert [answer.items for answer in of(Answer, actions)] == [(1,)]
    assert [run.items for run in of(RunBatch, actions)] == [(2, 3, 4)]


def test_little_is_queued_ahead():
    """Full batches up to ten milliseconds of work, one that is not full only at the end."""
    desk = Desk(A)
    assert [len(run.items) for run in of(RunBatch, desk.arrive(A, 20))] == [4, 4, 4]
    slow = Desk(A, batch_s=0.1)
    assert len(of(RunBatch, slow.arrive(A, 20))) == 1
    assert slow.core.next_wakeup(0.0) == 0.1 - 0.010
    slow.now = 0.095
    assert len(of(RunBatch, slow.tell())) == 1


def test_what_nobody_waits_for_any_more_is_not_run():
    """It leaves those that wait; what runs, runs, and what is settled is nobody's."""
    desk = Desk(A)
    desk.arrive(A, 1)
    desk.arrive(A, 3)
    cancelled = desk.tell(ItemCancelled(3), ItemCancelled(1), ItemCancelled(99))
    assert [refused.item for refused in of(Refuse, cancelled)] == [3]
    desk.now += 0.004
    actions = desk.tell(ItemSettled(3), BatchRan(1, (), 0.004, 0), ItemCancelled(3))
    assert [run.items for run in of(RunBatch, actions)] == [(2, 4)]
    assert of(Refuse, actions) == []


def test_a_spiking_model_leaves_others_their_share():
    """Two batches in a row, then whoever waits."""
    desk = Desk(A, B, batch_s=0.1)
    desk.arrive(A, 30)
    desk.now += 0.001
    desk.arrive(B)
    order = []
    for batch in range(1, 5):
        desk.now += 0.1
        order += [run.model for run in of(RunBatch, desk.tell(BatchRan(batch, (), 0.1, 0)))]
    assert B in order[:2]


def test_an_unbound_model_finishes_what_runs_and_gives_back_the_rest():
    """First the consumer stops, then what waits goes back, and the answer of the rest counts."""
    desk = Desk(A, batch_s=1.0)
    desk.arrive(A, 6)
    stops = of(StopConsumer, desk.tell(Assigned((), 1, 2)))
    assert len(stops) == 1
    back = of(GiveBack, desk.tell(ConsumerStopped(stops[0].subscription)))
    assert [action.item for action in back] == [5, 6]
    assert len(of(Answer, desk.tell(BatchRan(1, (), 1.0, 0)))) == 1
    assert not desk.core.empty
    desk.tell(*(ItemSettled(number) for number in range(1, 7)))
    assert desk.core.empty


def test_held_bytes_are_bounded():
    """The model that crosses the bound stops consuming until half is free again."""
    desk = Desk(A, max_held_bytes=10, batch_s=1.0)
    stops = of(StopConsumer, desk.arrive(A, 6, nbytes=2))
    assert len(stops) == 1
    back = of(GiveBack, desk.tell(ConsumerStopped(stops[0].subscription)))
    assert [action.item for action in back] == [6]
    desk.tell(BatchRan(1, (), 1.0, 0))
    assert of(StartConsumer, desk.tell(ItemSettled(6), ItemSettled(1))) == []
    assert of(StartConsumer, desk.tell(*(ItemSettled(n) for n in (2, 3, 4))))


def test_a_lost_engine_s_batch_is_tried_item_by_item():
    """What was queued behind it is given back; who runs alone at two deaths is buried."""
    desk = Desk(A)
    runs = of(RunBatch, desk.arrive(A, 8))
    assert [len(run.items) for run in runs] == [4, 4]
    actions = desk.tell(EngineLost("killed"))
    assert [action.item for action in of(GiveBack, actions)] == [5, 6, 7, 8]
    for stop in of(StopConsumer, actions):
        desk.tell(ConsumerStopped(stop.subscription))
    for life in range(2):
        loads = of(LoadModel, desk.tell(EngineStarted(1000, "cpu")))
        assert [load.model for load in loads] == [A]
        actions = desk.tell(loaded(A))
        assert [run.items for run in of(RunBatch, actions)] == [(1,)], life
        actions = desk.tell(EngineLost("killed"))
    assert [(b.item, b.fault.code) for b in of(Bury, actions)] == [(1, "quarantined")]


def test_expired_items_never_run():
    """They are refused when their time comes, not when their turn comes."""
    desk = Desk(A, batch_s=1.0)
    desk.arrive(A)
    item = Item(
        item=99, model=A, subscription=desk.subscriptions[A], arrived=0.0, deadline=0.5, nbytes=1
    )
    desk.tell(ItemArrived(item))
    assert desk.core.next_wakeup(0.0) == 0.5
    desk.now = 0.5
    refused = of(Refuse, desk.tell())
    assert [(r.item, r.fault.code) for r in refused] == [(99, "deadline_exceeded")]


def test_an_older_word_changes_nothing():
    """Fences before generations."""
    desk = Desk(A)
    assert of(StopConsumer, desk.tell(Assigned((), 0, 99))) == []
    assert of(StopConsumer, desk.tell(Assigned((), 2, 1)))


def dies_at_once(desk: Desk, times: int) -> list[Action]:
    """Each engine loads A, runs what waits for it, and dies of it; the last one's actions."""
    actions: list[Action] = []
    for _ in range(times):
        actions = desk.tell(EngineLost("killed"))
        for stop in of(StopConsumer, actions):
            desk.tell(ConsumerStopped(stop.subscription))
        if of(LoadModel, desk.tell(EngineStarted(1000, "cpu"))):
            desk.tell(loaded(A))
    return actions


def test_each_death_is_written_down_for_the_other_workers():
    """As it is buried, and not before: one engine may end of anything."""
    desk = Desk(A)
    assert of(RunBatch, desk.arrive(A))
    assert of(KeepDeath, dies_at_once(desk, 1)) == []
    first = dies_at_once(desk, 1)
    assert [(death.model, death.kind) for death in of(KeepDeath, first)] == [(A, "request")]


def test_a_verdict_that_is_not_written_down_is_a_suspicion():
    """Other workers, which cannot read it yet, are not to try; assigned here or not."""
    desk = Desk()
    desk.tell(Assigned((A,), 1, 2))
    deaths, actions = [], desk.tell(fetched(A))
    for _ in range(2):
        assert of(LoadModel, actions)
        deaths += of(KeepDeath, desk.tell(EngineLost("killed")))
        actions = desk.tell(EngineStarted(1000, "cpu"))
    assert [death.kind for death in deaths] == ["load"]
    for generation in (3, 4):
        (report,) = desk.core.reports()
        assert report.suspect
        desk.tell(Assigned((), 1, generation))
    desk.tell(DeathKept(A))
    assert desk.core.reports() == ()


def test_what_all_workers_know_is_for_them_to_forgive():
    """Quarantined here, and written down: fetched anew it is what they say. Before that is written
    down it stays as it is, whatever they say."""
    desk = Desk(A)
    desk.arrive(A, 3)
    assert of(RunBatch, desk.arrive(A)) == []
    deaths = of(KeepDeath, dies_at_once(desk, 3) + dies_at_once(desk, 2))
    assert len(deaths) == 2
    desk.tell(DeathKept(A))
    for generation, kept, loads in ((2, None, False), (4, A, True)):
        if kept is not None:
            desk.tell(DeathKept(kept))
        desk.now += 10.0
        desk.tell(Assigned((), 1, generation))
        desk.tell(Assigned((A,), 1, generation + 1))
        assert bool(of(LoadModel, desk.tell(fetched(A)))) == loads
    assert desk.core.reports()[0].error is None


def test_what_other_workers_found_out_is_not_tried_here():
    """It is fetched, says why, and neither loaded nor consumed until it is fetched again."""
    desk = Desk(B)
    desk.tell(Assigned((A, B), 1, 2))
    held = msgspec.structs.replace(fetched(A), quarantined="it ended 2 engines as it was loaded")
    actions = desk.tell(held)
    assert [load.model for load in of(LoadModel, actions)] == []
    report = next(each for each in desk.core.reports() if each.model == A)
    assert (report.phase, report.error) == (
        "failed", "quarantined: it ended 2 engines as it was loaded",
    )  # fmt: skip
    desk.tell(Assigned((B,), 1, 3))
    desk.tell(Assigned((A, B), 1, 4))
    assert [load.model for load in of(LoadModel, desk.tell(fetched(A)))] == [A]


def test_a_model_whose_requests_kill_engines_is_quarantined():
    """At the second buried request: what waits is told, and only another file is tried again."""
    desk = Desk(A)
    desk.arrive(A, 4)
    assert of(RunBatch, desk.arrive(A)) == []
    first = dies_at_once(desk, 3)
    assert [bury.item for bury in of(Bury, first)] == [1]
    second = dies_at_once(desk, 2)
    assert [bury.item for bury in of(Bury, second)] == [2]
    refused = of(Refuse, second)
    assert [refusal.item for refusal in refused] == [3, 4]
    assert {refusal.fault.code for refusal in refused} == {"quarantined"}
    (report,) = desk.core.reports()
    assert (report.phase, report.error) == (
        "failed",
        "quarantined: 2 of its requests ended 2 engines each",
    )
    for generation, digit in ((2, "0"), (4, "0"), (6, "1")):
        desk.now += 10.0
        desk.tell(Assigned((), 1, generation))
        assert of(FetchModel, desk.tell(Assigned((A,), 1, generation + 1)))
        assert desk.core.reports()[0].error == report.error
        assert bool(of(LoadModel, desk.tell(fetched(A, digit)))) == (digit == "1")
    assert desk.core.reports()[0].error is None


def test_a_batch_that_hangs_costs_the_engine_its_life():
    """After its time-out, or twenty times its estimate; what hung is tried alone."""
    desk = Desk(A, batch_timeout_s=2.0)
    desk.arrive(A)
    assert desk.core.next_wakeup(0.0) == 2.0
    desk.now = 1.9
    assert of(KillEngine, desk.tell()) == []
    desk.now = 2.0
    (kill,) = of(KillEngine, desk.tell())
    assert kill.reason == "a batch of a/1 was running for 2 s"
    assert desk.core.next_wakeup(desk.now) is None
    assert of(RunBatch, desk.arrive(A)) == []
    actions = dies_at_once(desk, 2)
    assert [bury.item for bury in of(Bury, actions)] == [1]
    slow = Desk(A, batch_timeout_s=2.0, batch_s=0.5)
    slow.arrive(A)
    assert slow.core.next_wakeup(0.0) == 10.0


def test_a_load_that_hangs_costs_the_engine_its_life():
    """Nothing is begun on the engine meanwhile, and after the second the model is left alone."""
    desk = Desk(A, load_timeout_s=5.0)
    desk.tell(Assigned((A, B), 1, 2))
    actions = desk.tell(fetched(B))
    for _ in range(2):
        assert [load.model for load in of(LoadModel, actions)] == [B]
        assert desk.core.next_wakeup(desk.now) == desk.now + 5.0
        desk.now += 5.0
        (kill,) = of(KillEngine, desk.tell())
        assert kill.reason == "b/1 was loading for 5 s"
        assert of(RunBatch, desk.arrive(A)) == []
        for stop in of(StopConsumer, desk.tell(EngineLost(kill.reason))):
            desk.tell(ConsumerStopped(stop.subscription))
        desk.tell(*map(ItemSettled, range(1, desk.last + 1)))
        loads = of(LoadModel, desk.tell(EngineStarted(1000, "cpu")))
        assert [load.model for load in loads] == [A]
        actions = desk.tell(loaded(A))
        (start,) = of(StartConsumer, actions)
        desk.subscriptions[A] = start.subscription
        desk.tell(ConsumerStarted(start.subscription))
    assert of(LoadModel, actions) == []
    assert "quarantined" in str(desk.core.state.get(B).error)
    assert of(RunBatch, desk.arrive(A))


def test_a_model_that_nothing_hangs_on_is_forgotten():
    """Once it is neither wanted, nor on the device, nor held."""
    desk = Desk(A)
    desk.arrive(A)
    desk.tell(BatchRan(1, (), 0.004, 0))
    (stop,) = of(StopConsumer, desk.tell(Assigned((), 1, 2)))
    desk.tell(ConsumerStopped(stop.subscription))
    assert of(ForgetModel, desk.tell(ItemSettled(1))) == []
    assert A in desk.core.state.models
    desk.tell(Assigned((B,), 1, 3))
    desk.core.state.device.budget_bytes = 10
    desk.tell(fetched(B))
    assert [gone.model for gone in of(ForgetModel, desk.tell(ModelEvicted(A)))] == [A]
    assert desk.core.state.models.keys() == {B}
