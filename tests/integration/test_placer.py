"""The whole placer among fake workers: over the twins in memory, and once over real services."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog.testing

from services.placer.core.policy import Policy
from shared import names
from shared.broker.memory import MemoryBroker
from shared.connect import open_broker, open_store
from shared.models import Profile
from shared.names import ModelId, model_queue
from shared.repository import Repository
from shared.store.memory import MemoryStore
from shared.store.port import TOPIC_REGISTRY, StoreUnavailable
from tests.placer_rig import MB, FakeWorker, Rig, memory_rig, until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with memory_rig(tmp_path) as made:
        yield made


def routes(rig: Rig) -> dict[str, set[str]]:
    assert rig.exchange is not None
    return {key: queues for key, queues in rig.exchange.bindings.items() if queues}


async def test_a_first_request_activates_its_model_and_is_answered(rig):
    """Nobody prepared anything: the request falls through, and comes back answered."""
    model = rig.register("bert")
    rig.register("never-asked")
    worker = await rig.start_worker("w1")
    placer = await rig.start_placer()
    reply = await rig.ask("bert")
    assert (reply.headers[names.HEADER_CODE], reply.body) == ("ok", b"bert/1")
    await until(
        lambda: routes(rig) == {"bert": {model_queue(model)}, "bert/1": {model_queue(model)}}
    )
    again = await rig.ask("bert/1")
    assert again.body == b"bert/1"
    assert worker.bound == {model}
    fleet = (await placer.get("/fleet")).json()
    [told] = fleet["workers"]
    assert (told["worker"], told["engine_up"], told["budget_bytes"]) == ("w1", True, 10 * MB)
    [seat] = told["models"]
    assert (seat["model"], seat["tier"], seat["bound"], seat["bytes"]) == (
        model,
        "device",
        True,
        MB,
    )
    story = (await placer.get("/explain/bert")).json()
    assert [seat["worker"] for seat in story["workers"]] == ["w1"]
    assert "first request" in story["workers"][0]["reason"]
    assert [event["what"] for event in story["events"]][:2] == ["activated", "assigned"]
    idle = (await placer.get("/explain/never-asked/1")).json()
    assert idle["state"] == "registered, nobody asks for it"


async def test_a_burst_of_first_requests_activates_once(rig):
    """However many arrive at once: one activation, one binding, all answered."""
    rig.register("bert")
    worker = await rig.start_worker("w1")
    placer = await rig.start_placer()
    requests = [await rig.send("bert") for _ in range(100)]
    for request in requests:
        await rig.reply(request)
    assert [{a.model for a in given.models} for given in worker.assignments].count({"bert/1"}) == 1
    metrics = (await placer.get("/metrics")).text
    assert "roost_placer_activations_total 1.0" in metrics
    assert 'roost_bindings{model="bert",version="1"} 1.0' in metrics


async def test_unknown_and_wrong_names_are_answered(rig):
    """Each with its code; nothing stays in the queue of the unrouted."""
    rig.register("bert")
    await rig.start_worker("w1")
    await rig.start_placer()
    for key, code in (
        ("nobody", "not_found"),
        ("bert/7", "not_found"),
        ("../etc", "invalid_argument"),
        ("bert/0", "invalid_argument"),
        ("", "invalid_argument"),
    ):
        reply = await rig.ask(key)
        assert reply.headers[names.HEADER_CODE] == code, key
        assert reply.headers[names.HEADER_RETRYABLE] is False
    assert await rig.depth(names.UNROUTED) == 0


async def test_what_cannot_be_answered_is_kept_as_a_dead_letter(rig):
    """Without a reply queue that is one, an unknown model's request is evidence."""
    await rig.start_placer()
    await rig.send("nobody", reply_to=None)
    await rig.send("nobody", reply_to="somebody.elses.queue")
    end = time.monotonic() + 5
    while await rig.depth(names.DEAD) != 2:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_what_came_too_late_is_said_to_be(rig):
    """A deadline that has passed costs no activation."""
    rig.register("bert")
    placer = await rig.start_placer()
    reply = await rig.ask("bert", headers={names.HEADER_DEADLINE: int(time.time() * 1000) - 1})
    assert reply.headers[names.HEADER_CODE] == "deadline_exceeded"
    assert (await placer.get("/fleet")).json()["active_models"] == 0


async def test_a_request_waits_for_the_first_worker(rig):
    """Without any worker the request waits in its model's queue, more workers are wanted, and
    whoever joins gets it at once."""
    rig.register("bert")
    placer = await rig.start_placer()
    deadline = int(time.time() * 1000) + 20_000
    request = await rig.send("bert", headers={names.HEADER_DEADLINE: deadline}, message_id="mine")
    end = time.monotonic() + 5
    while not (await placer.get("/fleet/workers-wanted")).json().get("reasons"):
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
    worker = await rig.start_worker("w1")
    assert (await rig.reply(request)).body == b"bert/1"
    [(_, message)] = worker.answered
    assert message.headers[names.HEADER_CLIENT_MESSAGE_ID] == "mine"
    assert 0 < message.expiration_ms <= 20_000


async def test_a_model_larger_than_every_worker_is_refused_with_numbers(rig):
    """Waiting would be in vain."""
    rig.register("huge", size=100 * MB)
    await rig.start_worker("w1", models=10)
    placer = await rig.start_placer()
    await until_workers(placer, 1)
    reply = await rig.ask("huge")
    assert reply.headers[names.HEADER_CODE] == "unavailable"
    assert b"104,857,600 bytes, 10,485,760 are free" in reply.body
    metrics = (await placer.get("/metrics")).text
    assert 'roost_placer_refusals_total{reason="too_large"} 1.0' in metrics
    await rig.gone(model_queue(ModelId("huge/1")))


async def test_what_was_measured_counts_for_the_first_worker_as_well(rig):
    """A model that waited for it is not judged by its file alone, which is small here."""
    model = rig.register("bert", size=1)
    profile = Profile(device_kind="cpu", weights_bytes=100 * MB)
    Repository(str(rig.root)).profiles.put(model, profile)
    placer = await rig.start_placer()
    request = await rig.send("bert")
    end = time.monotonic() + 10
    while not (await placer.get("/fleet")).json()["active_models"]:
        assert time.monotonic() < end, "it is known that somebody asks"
        await asyncio.sleep(0.01)
    worker = await rig.start_worker("w1", models=10)
    reply = await rig.reply(request)
    assert reply.headers[names.HEADER_CODE] == "unavailable"
    assert b"104,857,600 bytes, 10,485,760 are free" in reply.body
    assert not any(given.models for given in worker.assignments)


async def test_a_full_queue_is_said_to_be(rig):
    """The queue's limit rejects the message; its sender is told to come again."""
    model = rig.register("bert")
    worker = await rig.start_worker("w1")
    worker.answering = False
    worker.prefetch = 1
    await rig.start_placer()
    rig.exchange.max_length[model_queue(model)] = 2
    requests = [await rig.send("bert") for _ in range(20)]
    await until(lambda: rig.replies)
    [reply] = rig.replies[next(iter(rig.replies))]
    assert reply.headers[names.HEADER_CODE] == "resource_exhausted"
    assert reply.headers[names.HEADER_RETRYABLE] is True
    rig.exchange.max_length.clear()
    await worker.release()
    for request in requests:
        await rig.reply(request)


async def test_the_longest_unused_makes_room_for_a_newcomer(rig):
    """The budget is full: exactly one idle model goes, the least recently used one."""
    for name in ("a", "b", "c", "newcomer"):
        rig.register(name)
    worker = await rig.start_worker("w1", models=3)
    placer = await rig.start_placer()
    for name in ("b", "a", "c", "b"):
        asked = time.monotonic()
        await rig.ask(name)
        await until_idle(placer, name, asked)  # who was asked last is not a matter of one report
    asked = time.monotonic()
    assert (await rig.ask("newcomer")).body == b"newcomer/1"
    assert worker.bound == {"b/1", "c/1", "newcomer/1"}
    await rig.gone(model_queue(ModelId("a/1")))
    story = (await placer.get("/explain/a")).json()
    assert story["events"][-1]["what"] == "retired"
    assert any("makes room for newcomer/1" in (e["why"] or "") for e in story["events"])
    # And it comes back when it is asked again.
    await until_idle(placer, "newcomer", asked)
    assert (await rig.ask("a")).body == b"a/1"


async def test_a_spike_gets_a_second_worker_and_gives_it_back(rig):
    """Only the spiking model's bindings change, up at once and down after a while."""
    for name in ("hot", "cold"):
        rig.register(name)
    first = await rig.start_worker("w1")
    placer = await rig.start_placer()
    await rig.ask("hot")
    await rig.ask("cold")
    second = await rig.start_worker("w2")
    await until_workers(placer, 2)
    first.answering = second.answering = False
    first.seconds_per_item = second.seconds_per_item = 0.05
    requests = [await rig.send("hot") for _ in range(40)]
    await until(lambda: second.bound == {"hot/1"}, what="a second binding")
    assert first.bound == {"hot/1", "cold/1"}
    await first.release()
    await second.release()
    for request in requests:
        await rig.reply(request)
    await until(lambda: not second.bound, what="the second binding is given back")
    assert first.bound == {"hot/1", "cold/1"}


async def test_a_dead_workers_models_go_to_another(rig):
    """Its requests are answered by whoever takes over; nothing is lost."""
    rig.register("bert")
    first = await rig.start_worker("w1")
    placer = await rig.start_placer()
    await rig.ask("bert")
    first.answering = False
    request = await rig.send("bert")
    await until(lambda: first.held.get(ModelId("bert/1")))
    second = await rig.start_worker("w2")
    await until_workers(placer, 2)
    await first.die()
    assert (await rig.reply(request)).body == b"bert/1"
    assert second.bound == {"bert/1"}


async def test_a_hung_workers_models_are_served_before_it_is_given_up(rig):
    """It consumes still, and its report has not ended: what is asked of it has another copy by
    then, and what it holds is its own until it is gone."""
    rig.register("bert")
    hung = await rig.start_worker("w1")
    placer = await rig.start_placer()
    await rig.ask("bert")
    second = await rig.start_worker("w2")
    await until_workers(placer, 2)
    hung.answering = False
    request = await rig.send("bert")
    await until(lambda: hung.held.get(ModelId("bert/1")))
    await hung.hang()
    await until(lambda: second.bound == {"bert/1"})
    assert hung.bound == {"bert/1"}
    fleet = (await placer.get("/fleet")).json()["workers"]
    assert {each["worker"]: each["stalled"] for each in fleet} == {"w1": True, "w2": False}
    await hung.die()
    assert (await rig.reply(request)).body == b"bert/1"


async def test_what_is_asked_of_a_dead_engine_is_served_elsewhere_at_once(rig):
    """The worker says so itself, and keeps what it is assigned: its engine will be back."""
    rig.register("bert")
    first = await rig.start_worker("w1")
    placer = await rig.start_placer()
    await rig.ask("bert")
    second = await rig.start_worker("w2")
    await until_workers(placer, 2)
    first.answering = False
    request = await rig.send("bert")
    await until(lambda: first.held.get(ModelId("bert/1")))
    first.engine_up = False
    began = time.monotonic()
    await first.send_report()
    await until(lambda: second.bound == {"bert/1"})
    assert time.monotonic() - began < Policy().engine_grace_s
    assert first.bound == {"bert/1"}
    first.engine_up = True
    await first.release()
    assert (await rig.reply(request)).body == b"bert/1"


async def test_an_idle_model_is_deactivated(rig):
    """Its routes, its binding and its queue go; the next request activates it again."""
    rig.register("bert")
    worker = await rig.start_worker("w1")
    await rig.start_placer(deactivate_after_s=0.3)
    await rig.ask("bert")
    await rig.gone(model_queue(ModelId("bert/1")))
    await until(lambda: not worker.bound)
    assert routes(rig) == {}
    assert await rig.store.active() == set()
    assert (await rig.ask("bert")).body == b"bert/1"


async def test_min_copies_are_kept_without_any_request(rig):
    """And are not deactivated either."""
    worker = await rig.start_worker("w1")
    await rig.start_placer(deactivate_after_s=0.1)
    rig.register("warm", min_copies=1)
    await rig.store.hint(TOPIC_REGISTRY)
    await until(lambda: worker.bound == {"warm/1"})
    await asyncio.sleep(0.4)
    assert worker.bound == {"warm/1"}


async def test_a_new_version_takes_over_the_name(rig):
    """Requests by name go to the newest version, those by version to theirs, never to both."""
    rig.register("bert")
    await rig.start_worker("w1")
    await rig.start_placer()
    await rig.ask("bert")
    await until(lambda: "bert" in routes(rig))
    rig.register("bert", version=2)
    await rig.store.hint(TOPIC_REGISTRY)
    await until(lambda: "bert" not in routes(rig), what="the name leads nowhere for a while")
    assert (await rig.ask("bert")).body == b"bert/2"
    await until(lambda: routes(rig).get("bert") == {"roost.model.bert.2"})
    assert (await rig.ask("bert/1")).body == b"bert/1"
    assert (await rig.ask("bert")).body == b"bert/2"
    assert all(len(replies) == 1 for replies in rig.replies.values())


async def test_requests_left_for_a_removed_model_are_told(rig):
    """Nothing is silently lost with a model's queue."""
    rig.register("bert")
    worker = await rig.start_worker("w1")
    worker.answering = False
    worker.prefetch = 1
    await rig.start_placer()
    requests = [await rig.send("bert") for _ in range(5)]
    await until(lambda: worker.held.get(ModelId("bert/1")))
    await rig.remove("bert")
    for request in requests:
        reply = await rig.reply(request)
        assert reply.headers[names.HEADER_CODE] == "not_found"
    await rig.gone(model_queue(ModelId("bert/1")))
    assert (await rig.ask("bert")).headers[names.HEADER_CODE] == "not_found"


async def test_a_queue_stays_while_a_worker_holds_messages_of_it(rig):
    """To the broker they do not count; deleted with the queue, they could never go back to it."""
    model = rig.register("bert")
    worker = await rig.start_worker("w1")
    worker.answering, worker.finishing = False, True
    await rig.start_placer()
    request = await rig.send("bert")
    await until(lambda: worker.held.get(model))
    await rig.remove("bert")
    await until(lambda: worker.stopped)
    told = worker.reports
    await until(lambda: worker.reports > told + 4)  # each of them wakes the placer
    assert await rig.depth(model_queue(model)) == 0
    await worker.die()
    assert (await rig.reply(request)).headers[names.HEADER_CODE] == "not_found"
    await rig.gone(model_queue(model))


async def test_a_model_that_no_worker_can_load_is_answered_with_the_reason(rig):
    """On every worker that there is; and it is tried again later."""
    rig.register("broken")
    first, second = await rig.start_worker("w1"), await rig.start_worker("w2")
    broken = True
    for worker in (first, second):
        worker.loads = lambda _: "not a TorchScript file" if broken else None
    placer = await rig.start_placer(retry_failed_s=0.6)
    await until_workers(placer, 2)
    reply = await rig.ask("broken")
    assert reply.headers[names.HEADER_CODE] == "model_failed"
    assert b"not a TorchScript file" in reply.body
    assert {w.name for w in (first, second) for a in w.assignments if a.models} == {"w1", "w2"}
    broken = False
    end = time.monotonic() + 5
    while (reply := await rig.ask("broken")).headers[names.HEADER_CODE] != "ok":
        assert reply.headers[names.HEADER_CODE] == "model_failed"
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def test_the_other_placer_takes_over_and_moves_nothing(rig):
    """One decides, one stands by; when the first dies the second finds everything as it is."""
    rig.register("bert")
    rig.register("other")
    worker = await rig.start_worker("w1")
    first = await rig.start_placer()
    await first.until_leads()
    second = await rig.start_placer()
    assert (await second.get("/readyz")).json()["role"] == "stand-by"
    assert (await second.get("/explain/bert")).status_code == 503
    await rig.ask("bert")
    before = worker.assignment
    await first.kill()
    await second.until_leads()
    assert (await rig.ask("other")).body == b"other/1"
    assert worker.bound == {"bert/1", "other/1"}
    assert worker.assignment.fence > before.fence
    assert (await rig.ask("bert")).body == b"bert/1"


async def test_a_suspended_store_stops_nothing_that_runs(rig):
    """While the store is away bound models keep serving, first requests wait, and the placer
    says that it is not ready; afterwards all is as before."""
    rig.register("bert")
    rig.register("new")
    worker = await rig.start_worker("w1")
    placer = await rig.start_placer()
    await rig.ask("bert")
    await until(lambda: "bert" in routes(rig))
    for task in worker._tasks:
        task.cancel()
    rig.state.reachable = False
    end = time.monotonic() + 5
    while (await placer.get("/readyz")).status_code == 200:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    waiting = await rig.send("new")
    assert (await rig.ask("bert")).body == b"bert/1"
    rig.state.reachable = True
    worker.start()
    assert (await rig.reply(waiting)).body == b"new/1"
    assert worker.bound == {"bert/1", "new/1"}


async def test_an_emptied_store_unloads_nothing(rig):
    """The store loses everything: no binding goes, and what was known is written again."""
    for name in ("a", "b", "c"):
        rig.register(name)
    first, second = await rig.start_worker("w1"), await rig.start_worker("w2")
    await rig.start_placer()
    for name in ("a", "b", "c"):
        await rig.ask(name)
    before = (first.bound, second.bound)
    closed = [consumer for worker in rig.workers for consumer in worker.consumers.values()]
    rig.state.flush()
    await until(lambda: rig.state.active == {"a/1", "b/1", "c/1"})
    await until(lambda: {"w1", "w2"} <= rig.state.assignments.keys())
    await asyncio.sleep(0.6)  # beyond the grace
    assert (first.bound, second.bound) == before
    assert all(consumer.active for consumer in closed)
    for name in ("a", "b", "c"):
        assert (await rig.ask(name)).body == f"{name}/1".encode()


async def test_a_recovery_that_is_interrupted_is_begun_again(rig):
    """The store comes back empty and is away again at once: nothing is forgotten over it."""

    class Shaky(MemoryStore):
        interruptions = 0

        async def add_active(self, model: ModelId) -> None:
            if self.interruptions:
                self.interruptions -= 1
                raise StoreUnavailable("away again")
            await super().add_active(model)

    for name in ("a", "b"):
        rig.register(name)
    await rig.start_worker("w1")
    store = Shaky(rig.state)
    await rig.start_placer(store=store)
    for name in ("a", "b"):
        await rig.ask(name)
    store.interruptions = 2
    rig.state.flush()
    await until(lambda: not store.interruptions)
    await until(lambda: rig.state.active == {"a/1", "b/1"})
    await until(lambda: "w1" in rig.state.assignments)


async def test_generations_go_on_after_store_and_placer_are_lost(rig):
    """The new placer's first word is higher than what the worker follows, so that it can be told
    from it."""
    for name in ("a", "b", "c", "d"):
        rig.register(name)
    worker = await rig.start_worker("w1")
    first = await rig.start_placer()
    for name in ("a", "b", "c"):
        await rig.ask(name)
    before = worker.assignment
    assert before.generation > 1
    await first.kill()
    rig.state.flush()
    second = await rig.start_placer()
    await until_workers(second, 1)
    await rig.ask("d")
    assert worker.assignment.fence > before.fence
    assert worker.assignment.generation > before.generation
    assert worker.bound == {"a/1", "b/1", "c/1", "d/1"}


async def test_a_worker_that_is_back_before_it_was_missed_is_told_again(rig):
    """Its orderly end took its assignment along; its next life gets it anew."""
    rig.register("bert")
    first = await rig.start_worker("w1")
    await rig.start_placer()
    await rig.ask("bert")
    await first.die()
    broker = rig.open_broker("w1 again")
    await broker.start()
    again = FakeWorker("w1", broker, rig.store, 10 * MB, MB)
    rig.workers.append(again)
    await rig.store.remove_report("w1")
    await again.send_report()  # the twin in memory lets nobody look in between
    again.start()
    assert (await rig.ask("bert")).body == b"bert/1"
    assert again.bound == {"bert/1"}


async def test_a_registry_that_is_away_removes_nothing(rig, tmp_path):
    """What is active stays so and is served, until the registry says otherwise."""
    rig.register("bert")
    worker = await rig.start_worker("w1")
    placer = await rig.start_placer()
    await rig.ask("bert")
    await until(lambda: "bert" in routes(rig))
    with structlog.testing.capture_logs() as logs:
        (tmp_path / "models").rename(tmp_path / "away")
        await rig.store.hint(TOPIC_REGISTRY)
        await until(lambda: any(log["event"] == "registry_not_followed" for log in logs))
    assert (await rig.ask("bert")).body == b"bert/1"
    assert (await placer.get("/fleet")).json()["active_models"] == 1
    assert worker.bound == {"bert/1"}
    (tmp_path / "away").rename(tmp_path / "models")


async def test_queues_are_found_after_store_and_placer_lost_everything(rig):
    """Requests in a queue that nobody remembers are answered nevertheless."""
    model = rig.register("bert")
    await rig.broker.declare_queue(model_queue(model))
    await rig.broker.bind(model_queue(model), "bert")
    request = await rig.send("bert")
    await rig.start_worker("w1")
    await rig.start_placer()
    assert (await rig.reply(request)).body == b"bert/1"


async def test_a_lost_broker_connection_loses_no_request(rig):
    """What the placer had in hand comes again."""
    rig.register("bert")
    broker = MemoryBroker(rig.exchange, "placer")
    placer = await rig.start_placer(broker=broker)
    await placer.until_leads()
    broker.lose()
    assert (await placer.get("/readyz")).status_code == 503
    requests = [await rig.send("bert") for _ in range(5)]
    await rig.start_worker("w1")
    await asyncio.sleep(0.2)
    broker.restore()
    for request in requests:
        assert (await rig.reply(request)).body == b"bert/1"


async def test_a_placer_without_its_lease_writes_nothing(rig):
    """Another holder's lease: it stops taking requests, which then wait for the other."""
    rig.register("bert")
    worker = await rig.start_worker("w1")
    placer = await rig.start_placer(store=MemoryStore(rig.state))
    await placer.until_leads()
    rig.state.lease = ("another", rig.state.next_fence(), rig.state.now() + 1.0)
    end = time.monotonic() + 5
    while (await placer.get("/fleet")).status_code == 200:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    request = await rig.send("bert")
    assert await rig.depth(names.UNROUTED) == 1
    assert not worker.bound
    assert (await rig.reply(request)).body == b"bert/1"  # when it is elected again


async def until_idle(placer, name: str, asked: float) -> None:
    """Waits until the placer knows that the model was asked at this (monotonic) time or later, and
    that this is long enough ago for it to make room for another."""
    end = time.monotonic() + 15
    while True:
        demand = (await placer.get(f"/explain/{name}")).json()["demand"]
        if 0.3 < demand["seconds_since_asked"] <= time.monotonic() - asked:
            return
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def until_workers(placer, count: int) -> None:
    """Waits until the placer sees so many workers."""
    end = time.monotonic() + 15
    while True:
        answer = await placer.get("/fleet")
        if answer.status_code == 200 and len(answer.json()["workers"]) == count:
            return
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def test_over_real_services(tmp_path, amqp_url, redis_url):
    """The same once over RabbitMQ and Redis: activation, a burst, an unknown name, eviction,
    deactivation, and a second placer that takes over."""
    rig = Rig(tmp_path, lambda name: open_broker(amqp_url, name), lambda: open_store(redis_url))
    await rig.begin()
    try:
        for name in ("a", "b", "c"):
            rig.register(name)
        worker = await rig.start_worker("w1", models=2)
        first = await rig.start_placer()
        await until_workers(first, 1)
        assert (await rig.ask("a")).body == b"a/1"
        asked = time.monotonic()
        requests = [await rig.send("b") for _ in range(50)]
        for request in requests:
            assert (await rig.reply(request)).body == b"b/1"
        assert (await rig.ask("nobody")).headers[names.HEADER_CODE] == "not_found"
        await until_idle(first, "b", asked)
        assert (await rig.ask("c")).body == b"c/1"
        await until(lambda: worker.bound == {"b/1", "c/1"})
        await rig.gone(model_queue(ModelId("a/1")))
        second = await rig.start_placer(deactivate_after_s=0.5)
        await first.end()
        await second.until_leads()
        assert (await rig.ask("b")).body == b"b/1"
        await rig.gone(model_queue(ModelId("b/1")))
        await until(lambda: not worker.bound)
    finally:
        await rig.end()
