"""Models and requests that kill engines, in a whole fleet: real agents (with an engine that needs
no torch), a real placer, the twins of broker and store in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shared import names
from shared.catalog import TTL_S
from shared.control import Assigned, Assignment
from shared.models import Placement
from shared.names import ModelId
from shared.quarantine import Death
from shared.repository import Repository
from shared.store.port import TOPIC_REGISTRY, topic_assignment
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from tests.gateway_rig import JSON_BODY, running
from tests.integration.test_fleet import Agents, ask, register, until_fleet
from tests.placer_rig import Rig, memory_rig, until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with memory_rig(tmp_path) as made:
        yield made


@pytest.fixture
async def agents(rig: Rig) -> AsyncIterator[Agents]:
    made = Agents(rig)
    yield made
    await made.end()


def deaths(agents: Agents) -> int:
    """Engines that ended so far."""
    return sum(len(engine.lives) - 1 for engine in agents.engines.values())


async def poison(rig: Rig, model: str) -> str:
    """The code of the answer to a request that ends the engine."""
    x = from_numpy("x", np.full((1, 2), 666, np.float32))
    body, length = encode_request(InferRequest(inputs=(x,), binary_default=True))
    assert length is not None
    reply = await rig.ask(model, body=body, headers={names.HEADER_LENGTH: length})
    return str(reply.headers[names.HEADER_CODE])


async def told(rig: Rig) -> None:
    await rig.store.hint(TOPIC_REGISTRY)


async def test_a_model_that_kills_engines_kills_those_of_one_worker(rig, agents):
    """Two of them. Then it is kept from all workers, those who wait for it are told, explain says
    why, and everybody else is served."""
    good, deadly = register(rig, "good"), register(rig, "deadly")
    for name in ("w0", "w1", "w2"):
        agents.begin(name)
    placer = await rig.start_placer()
    await until_fleet(placer, "w0", "w1", "w2")
    assert await ask(rig, "good") == "ok"
    waiting = [await rig.send("deadly") for _ in range(5)]
    for request in waiting:
        reply = await rig.reply(request)
        assert reply.headers[names.HEADER_CODE] == "quarantined"
        assert b"ended 2 engines as it was loaded" in reply.body
    await until(lambda: deaths(agents) == 2)
    assert await ask(rig, "deadly") == await ask(rig, deadly) == "quarantined"
    assert await ask(rig, "good") == "ok"
    await until(lambda: deaths(agents) == 2)
    assert sorted(len(engine.lives) for engine in agents.engines.values()) == [1, 1, 3]
    story = (await placer.get("/explain/deadly")).json()
    assert story["state"] == "quarantined: it ended 2 engines as it was loaded"
    assert story["quarantined"]["worker"] in {"w0", "w1", "w2"}
    assert (await placer.get(f"/explain/{good}")).json()["quarantined"] is None
    assert "roost_placer_quarantined_models 1.0" in (await placer.get("/metrics")).text


async def test_quarantine_outlives_workers_and_placers(rig, agents):
    """Those that are started later know of it, and none of their engines ends."""
    deadly = register(rig, "deadly")
    Repository(str(rig.root)).add_death(
        deadly, Death(kind="load", worker="gone", at=time.time(), reason="it ended 2 engines")
    )
    agents.begin("w0")
    placer = await rig.start_placer()
    await until_fleet(placer, "w0")
    assert await ask(rig, "deadly") == "quarantined"
    assert deaths(agents) == 0


async def test_requests_count_together_on_whichever_workers(rig, agents):
    """One ended another worker's engines before; after one more the model is kept from all."""
    crash, good = register(rig, "crash"), register(rig, "good")
    before = Death(kind="request", worker="gone", at=time.time(), reason="one")
    Repository(str(rig.root)).add_death(crash, before)
    agents.begin("w0")
    placer = await rig.start_placer()
    await until_fleet(placer, "w0")
    assert await ask(rig, "crash") == await ask(rig, "good") == "ok"
    assert await poison(rig, "crash") == "quarantined"
    await until(lambda: crash in Repository(str(rig.root)).quarantined())
    async with asyncio.timeout(TTL_S + 10):
        while await ask(rig, "crash") != "quarantined":
            await asyncio.sleep(0.01)
    await until(lambda: deaths(agents) == 2)
    assert await rig.depth(names.DEAD) == 1
    assert await ask(rig, good) == "ok"


async def test_a_released_model_has_another_chance(rig, agents):
    """On the very worker whose engines it ended: what was is forgotten there too, and one more
    deadly request is again the request's own fault."""
    crash = register(rig, "crash")
    repository = Repository(str(rig.root))
    agents.begin("w0")
    placer = await rig.start_placer()
    await until_fleet(placer, "w0")
    assert await poison(rig, "crash") == await poison(rig, "crash") == "quarantined"
    await until(lambda: crash in repository.quarantined())
    await until(lambda: not rig.exchange.queues.get(names.model_queue(crash)))
    assert await asyncio.to_thread(repository.release, "crash") == [crash]
    await told(rig)
    async with asyncio.timeout(10):
        while await ask(rig, "crash") != "ok":
            await asyncio.sleep(0.01)
    assert await poison(rig, "crash") == "quarantined"
    assert await ask(rig, "crash") == "ok"
    assert repository.quarantined() == {}
    await until(lambda: deaths(agents) == 6)


async def test_a_release_while_no_placer_is_there_counts(rig, agents):
    """Released while all placers are down, the model is served as soon as there is one again: by
    the very worker that quarantined it, to which it is still assigned."""
    crash = register(rig, "crash")
    repository = Repository(str(rig.root))
    agents.begin("w0")
    placer = await rig.start_placer()
    await until_fleet(placer, "w0")
    assert await ask(rig, "crash") == "ok"
    await until(lambda: rig.exchange.bindings.get("crash"))
    await placer.kill()
    queue = names.model_queue(crash)
    for _ in range(2):  # its queue is consumed still, and its name leads there
        assert await poison(rig, "crash") == "quarantined"
    await until(lambda: crash in repository.quarantined())
    assert await asyncio.to_thread(repository.release, "crash") == [crash]
    await told(rig)
    placer = await rig.start_placer()
    await placer.until_leads()
    async with asyncio.timeout(30):
        while await ask(rig, "crash") != "ok":
            await asyncio.sleep(0.01)
    assert repository.quarantined() == {}
    assert queue in rig.exchange.queues


async def test_an_assignment_from_before_loads_nothing_that_is_quarantined(rig, agents):
    """A worker looks by itself as it fetches: the placer may be away, or not yet know."""
    deadly, good = register(rig, "deadly"), register(rig, "good")
    agents.begin("w0")
    placer = await rig.start_placer()
    await until_fleet(placer, "w0")
    assert await ask(rig, "good") == "ok"
    await placer.end()
    Repository(str(rig.root)).add_death(
        deadly, Death(kind="load", worker="gone", at=time.time(), reason="it ended 2 engines")
    )
    now = await rig.store.assignment("w0")
    assert now is not None
    await assign(rig, now, deadly, good)

    def refused() -> bool:
        models = rig.state.reports["w0"][1].models
        return any(m.model == deadly and "quarantined" in (m.error or "") for m in models)

    await until(refused)
    assert deaths(agents) == 0


async def test_a_model_that_is_to_be_alone_shares_no_worker(rig):
    """It has an empty one, and what is asked later goes to the others."""
    own = rig.register("own", placement=Placement(alone=True))
    others = [rig.register(f"m{n}") for n in range(5)]
    workers = [await rig.start_worker(name) for name in ("w1", "w2")]
    await rig.start_placer()
    assert (await rig.ask("m0")).headers[names.HEADER_CODE] == "ok"
    for model in (own, *others):
        assert (await rig.ask(model)).headers[names.HEADER_CODE] == "ok"
    together = [worker.bound for worker in workers if own in worker.bound]
    assert together == [{own}]


async def assign(rig: Rig, before: Assignment, *models: ModelId) -> None:
    after = msgspec.structs.replace(
        before,
        generation=before.generation + 1,
        models=tuple(Assigned(model) for model in models),
    )
    await rig.store.put_assignment(after)
    await rig.store.hint(topic_assignment(before.worker))


async def test_the_gateway_refuses_at_once_until_it_is_released(tmp_path):
    """503 `quarantined` with the reason, without a message to the broker; the index and readiness
    say so too. Released, the model is asked as before."""
    async with running(tmp_path) as rig:
        reason = "it ended 2 engines as it was loaded"
        rig.repository.add_death(
            ModelId("adder/1"), Death(kind="load", worker="w7", at=5.0, reason=reason)
        )
        async with asyncio.timeout(TTL_S + 10):
            while (refused := await rig.infer()).status_code == 200:
                await asyncio.sleep(0.05)
        assert (refused.status_code, refused.headers["roost-code"]) == (503, "quarantined")
        assert refused.json() == {"error": f"adder/1 is quarantined: {reason}"}
        seen = len(rig.worker.seen)
        assert (await rig.infer(JSON_BODY)).status_code == 503
        assert len(rig.worker.seen) == seen
        (item,) = (await rig.http.get("/v2/repository/index")).json()
        assert (item["state"], item["reason"]) == ("UNAVAILABLE", f"quarantined: {reason}")
        assert (await rig.http.get("/v2/models/adder/ready")).status_code == 503
        assert (await rig.http.get("/v2/models/adder")).status_code == 200
        (held,) = (await rig.http.get("/v2/repository/quarantine")).json()["quarantined"]
        assert (held["model"], held["worker"], held["since"]) == ("adder/1", "w7", 5.0)
        path = "/v2/repository/models/adder/quarantine"
        assert (await rig.http.delete(path)).json() == {"released": ["adder/1"]}
        assert (await rig.infer()).status_code == 200
        assert (await rig.http.delete(path)).json() == {"released": []}
        nobody = await rig.http.delete("/v2/repository/models/adder/versions/7/quarantine")
        assert nobody.status_code == 404
