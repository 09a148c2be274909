"""Which queues the placer asks the broker about, and what it makes of the answers."""

from __future__ import annotations

from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from services.placer.metrics import Metrics
from services.placer.observe import Observer
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.control import ModelReport, Report
from shared.models import Footprint
from shared.names import ModelId, model_queue
from shared.store.memory import MemoryState, MemoryStore

FULL, REST, UNBOUND = ModelId("full/1"), ModelId("rest/1"), ModelId("unbound/1")


class Asked(MemoryBroker):
    """Tells three messages in each queue, and remembers who asked."""

    def __init__(self) -> None:
        super().__init__(MemoryExchange(), "test")
        self.asked: list[str] = []

    async def depth(self, queue: str) -> int | None:
        self.asked.append(queue)
        return 3


def seen(model, *, bound=True, saturated=False, per_message=1.0):
    return ModelReport(
        model=model,
        tier="device",
        phase="ready",
        bound=bound,
        footprint=Footprint(10),
        saturated=saturated,
        requests_per_message=per_message,
    )


def knowing(*models: ModelReport) -> Knowledge:
    knowledge = Knowledge(Policy())
    for model in (FULL, REST, UNBOUND):
        knowledge.activate(model, None, why="test")
    knowledge.adopt("w1", {model.model: "test" for model in models}, 1)
    report = Report(
        worker="w1",
        incarnation="x",
        seq=1,
        at=0.0,
        device_kind="cpu",
        device_name="",
        budget_bytes=100,
        used_bytes=0,
        measured_bytes=0,
        generation=1,
        models=models,
    )
    knowledge.see([report], {}, knowledge.clock())
    return knowledge


async def observing() -> tuple[Asked, Observer]:
    broker = Asked()
    await broker.start()
    store = MemoryStore(MemoryState())
    return broker, Observer(broker, store, Metrics(), concurrency=2, limit=10)


async def test_only_what_the_reports_cannot_tell_is_asked():
    """A consumer with room holds all that was sent; a full one, or none, may leave some."""
    broker, observer = await observing()
    knowledge = knowing(seen(FULL, saturated=True), seen(REST))
    assert await observer.depths(knowledge) == {FULL: 3, UNBOUND: 3}
    assert sorted(broker.asked) == sorted([model_queue(FULL), model_queue(UNBOUND)])


async def test_messages_count_as_the_requests_that_they_hold():
    """As its consumers say, and, once there are none, as they said last."""
    broker, observer = await observing()
    knowledge = knowing(seen(FULL, saturated=True, per_message=16.5), seen(REST), seen(UNBOUND))
    assert await observer.depths(knowledge) == {FULL: 50}
    knowledge.see([], {}, knowledge.clock())
    assert (await observer.depths(knowledge))[FULL] == 50
    assert len(broker.asked) > 1


async def test_what_waited_is_asked_again_until_nothing_does():
    """A window that has room again says nothing of what was left in the queue before."""
    broker, observer = await observing()
    knowledge = knowing(seen(FULL), seen(REST), seen(UNBOUND))
    assert await observer.depths(knowledge) == {}
    knowledge.see_depths({REST: 2}, knowledge.clock())
    assert await observer.depths(knowledge) == {REST: 3}
    knowledge.see_depths({REST: 0}, knowledge.clock())
    assert await observer.depths(knowledge) == {}
    assert broker.asked == [model_queue(REST)]


async def test_a_broker_that_is_away_is_not_asked():
    """What was known stays; the next look asks again."""
    broker, observer = await observing()
    knowledge = knowing(seen(FULL, saturated=True))
    await broker.close()
    assert await observer.depths(knowledge) == {}
    assert broker.asked == []


def test_the_age_of_a_backlog_begins_when_it_was_first_seen():
    """It ends with the first look at which nothing waits."""
    knowledge = knowing(seen(FULL), seen(REST), seen(UNBOUND))
    active = knowledge.active[REST]
    knowledge.see_depths({REST: 2}, 10.0)
    knowledge.see_depths({REST: 5}, 11.0)
    assert active.backlog_since == 10.0
    knowledge.see_depths({REST: 0}, 12.0)
    assert active.backlog_since is None
