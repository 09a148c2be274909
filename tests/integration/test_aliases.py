"""Aliases under a gateway and a placer among fake workers: what flips, when, and what does not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import httpx
import pytest

from services.gateway.app import run as run_gateway
from services.gateway.config import GatewayConfig
from shared import names
from shared.connect import open_broker, open_store
from shared.repository import Repository
from shared.store.port import TOPIC_REGISTRY
from tests.gateway_rig import JSON_BODY
from tests.placer_rig import MB, Placer, Rig, memory_rig, until

ALIASES = "/v2/repository/models/m/aliases"


class World:
    """A gateway (by its HTTP client) and a placer over one rig."""

    def __init__(self, rig: Rig, http: httpx.AsyncClient, placer: Placer) -> None:
        self.rig = rig
        self.http = http
        self.placer = placer
        self.repository = Repository(str(rig.root))

    async def register(self, version: int, **spec: object) -> str:
        model = self.rig.register("m", version, **spec)
        await self.rig.store.hint(TOPIC_REGISTRY)
        return model

    async def put(self, alias: str, status: int, **wish: object) -> dict:
        answer = await self.http.put(f"{ALIASES}/{alias}", json=wish)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def alias(self, alias: str) -> dict:
        answer = await self.http.get(f"{ALIASES}/{alias}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def waits_for(self, alias: str, words: str) -> None:
        """Returns when the alias is pending, and says so."""
        async with asyncio.timeout(20):
            while words not in str((await self.alias(alias))["pending"]):
                await asyncio.sleep(0.02)

    async def leads_to(self, alias: str, version: int) -> None:
        """Returns when nothing is pending any more, and the alias leads there."""
        async with asyncio.timeout(20):
            while True:
                told = await self.alias(alias)
                if told["pending"] is None and told["version"] == str(version):
                    return
                await asyncio.sleep(0.02)

    async def ask(self, address: str = "") -> str:
        """The version that answers, as `m/1`; fails when none does."""
        answer = await self.http.post(f"/v2/models/m{address}/infer", json=JSON_BODY)
        assert answer.status_code == 200, answer.text
        return answer.text

    async def asks(self, address: str, model: str) -> None:
        """Returns when this one answers."""
        async with asyncio.timeout(20):
            while await self.ask(address) != model:
                await asyncio.sleep(0.01)

    async def reported(self, times: int) -> None:
        """Returns when each worker has reported so often, which is ten times a second."""
        least = [worker.reports + times for worker in self.rig.workers]
        workers = self.rig.workers
        await until(lambda: all(w.reports > n for w, n in zip(workers, least, strict=True)), 20)

    def bound(self, model: str) -> int:
        return sum(model in worker.bound for worker in self.rig.workers)

    async def bound_times(self, model: str, times: int) -> None:
        await until(lambda: self.bound(model) == times, 20, f"{model} bound {times} times")


@contextlib.asynccontextmanager
async def world(rig: Rig, workers: int = 2) -> AsyncIterator[World]:
    """With version 1 of the model `m`, which is bound on every worker."""
    rig.register("m", 1, min_copies=workers)
    for number in range(workers):
        await rig.start_worker(f"w{number}")
    placer = await rig.start_placer(retry_failed_s=0.3)
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    gateway = asyncio.create_task(
        run_gateway(
            GatewayConfig(repository_url=str(rig.root), port=0, grpc_port=-1),
            stop,
            broker=rig.open_broker("gateway"),
            store=rig.open_store(),
            on_ready=port.set_result,
        )
    )
    try:
        await asyncio.wait({port, gateway}, return_when=asyncio.FIRST_COMPLETED)
        if gateway.done():
            gateway.result()
        url = f"http://127.0.0.1:{port.result()}"
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
            async with asyncio.timeout(20):
                while (await http.get("/v2/health/ready")).status_code != 200:
                    await asyncio.sleep(0.02)
            made = World(rig, http, placer)
            await made.bound_times("m/1", workers)
            yield made
    finally:
        stop.set()
        await gateway


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with memory_rig(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def services_rig(root: Path, amqp_url: str, redis_url: str) -> AsyncIterator[Rig]:
    """Over RabbitMQ and Redis."""
    rig = Rig(root, lambda name: open_broker(amqp_url, name), lambda: open_store(redis_url))
    await rig.begin()
    try:
        yield rig
    finally:
        await rig.end()


class Load:
    """Steady requests by HTTP and AMQP, under the bare name and an alias."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers: list[tuple[float, str]] = []
        """When each was sent, and the version that answered."""
        self._sent = 0
        self._on = True

    async def __aenter__(self) -> Self:
        rig, world = self.world.rig, self.world

        async def by_amqp(key: str) -> str:
            reply = await rig.ask(key)
            assert reply.headers[names.HEADER_CODE] == "ok", reply.body
            return reply.body.decode()

        async def go_on(ask) -> None:
            while self._on:
                sent = time.monotonic()
                self.answers.append((sent, await ask()))
                await asyncio.sleep(0.005)

        self._tasks = [
            asyncio.create_task(go_on(ask))
            for ask in (
                world.ask,
                lambda: world.ask("/versions/default"),
                lambda: by_amqp("m"),
                lambda: by_amqp("m/default"),
            )
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._on = False
        await asyncio.gather(*self._tasks)  # raises for any request that failed

    def since(self, moment: float) -> set[str]:
        return {version for sent, version in self.answers if sent >= moment}

    async def more(self, count: int = 40) -> None:
        """Returns when so many more were answered; fails with the first that was not."""
        least = len(self.answers) + count
        await until(
            lambda: len(self.answers) >= least or any(task.done() for task in self._tasks), 30
        )
        for task in self._tasks:
            if task.done():
                task.result()


async def flips_under_load(world: World) -> None:
    """1 -> 2 -> 1, while the bare name and the alias `default` are asked all the time."""
    await world.put("default", 200, version=1)
    await world.register(2, min_copies=2)
    slow = world.rig.workers[1]
    slow.loads = lambda model: "no room yet" if model == "m/2" else None
    async with Load(world) as load:
        await load.more()
        # One worker has it, which is not enough: nothing changes, however long it takes.
        await world.put("default", 202, version=2)
        await world.waits_for("default", "version 2 has 1 of 2 bindings")
        await world.reported(3)
        await load.more()
        assert (await world.alias("default"))["version"] == "1"
        assert load.since(0) == {"m/1"}
        # Both have it: it flips.
        slow.loads = lambda _: None
        while world.repository.aliases()["m"].aliases["default"].pending is not None:
            await asyncio.sleep(0.005)
        assert world.bound("m/2") == 2
        await world.asks("", "m/2")
        await world.asks("/versions/default", "m/2")
        await until(lambda: "m/2" in load.since(0))
        await settled_in_amqp(world, "m/2")
        after = time.monotonic()
        await load.more()
        assert load.since(after) == {"m/2"}
        # And back.
        await world.put("default", 202, version=1)
        await world.leads_to("default", 1)
        await world.asks("", "m/1")
        await settled_in_amqp(world, "m/1")
        after = time.monotonic()
        await load.more()
        assert load.since(after) == {"m/1"}
    assert load.since(0) == {"m/1", "m/2"}


async def settled_in_amqp(world: World, model: str) -> None:
    """Returns when the placer has routed both names to this version's queue."""
    async with asyncio.timeout(20):
        while True:
            story = (await world.placer.get(f"/explain/{model}")).json()
            if {"m", "m/default", model} <= set(story["routing_keys"]):
                return
            await asyncio.sleep(0.02)


async def test_nothing_fails_while_an_alias_flips(rig):
    """Under load by HTTP and AMQP, and only once as many workers have the new version."""
    async with world(rig) as made:
        await flips_under_load(made)


@pytest.mark.services
async def test_nothing_fails_while_an_alias_flips_over_services(tmp_path, amqp_url, redis_url):
    """The same over RabbitMQ and Redis."""
    async with services_rig(tmp_path, amqp_url, redis_url) as rig, world(rig) as made:
        await flips_under_load(made)


async def test_the_bare_name_follows_default_and_not_what_is_registered(rig):
    """Without `default` a new version takes the name over at once; so it does when the alias is
    removed. `latest` and numbers mean the same all along."""
    async with world(rig, workers=1) as made:
        await made.put("default", 200, version=1)
        await made.register(2)
        await made.asks("/versions/latest", "m/2")
        assert await made.ask() == "m/1"
        assert await made.ask("/versions/1") == "m/1"
        assert (await made.http.delete(f"{ALIASES}/default")).status_code == 204
        await made.asks("", "m/2")


async def test_what_does_not_fit_never_flips_unless_told_to(rig):
    """The alias stays, gateway and placer say why; `now` means now."""
    async with world(rig, workers=1) as made:
        await made.put("prod", 200, version=1)
        await made.register(2, size=1000 * MB)
        told = await made.put("prod", 202, version=2)
        assert told["version"] == "1"
        assert told["pending"]["split"] == {"2": 1}
        await made.waits_for("prod", "version 2 has 0 of 1 bindings")
        async with asyncio.timeout(20):
            while "cannot be placed" not in str(
                (await made.placer.get("/explain/m/2")).json()["alias"]
            ):
                await asyncio.sleep(0.02)
        assert await made.ask("/versions/prod") == "m/1"
        told = await made.put("prod", 200, version=2, now=True)
        assert (told["version"], told["pending"]) == ("2", None)


async def test_what_cannot_be_loaded_is_told(rig):
    """With the worker's own words; asking for the present version ends the wait."""
    async with world(rig, workers=1) as made:
        await made.put("prod", 200, version=1)
        rig.workers[0].loads = lambda model: "bad file" if model == "m/2" else None
        await made.register(2)
        await made.put("prod", 202, version=2)
        await made.waits_for("prod", "version 2 on w0: bad file")
        await made.put("prod", 200, version=1)
        assert (await made.alias("prod"))["pending"] is None
        story = (await made.placer.get("/explain/m/2")).json()
        async with asyncio.timeout(20):
            while story["alias"] is not None:
                story = (await made.placer.get("/explain/m/2")).json()
                await asyncio.sleep(0.02)


async def test_the_next_placer_brings_it_about(rig):
    """What is pending stands in the registry. It does not take the workers that have not reported
    to it yet for none."""
    async with world(rig) as made:
        await made.put("prod", 200, version=1)
        slow = rig.workers[1]
        slow.loads = lambda model: "no room yet" if model == "m/2" else None
        await made.register(2)
        await made.put("prod", 202, version=2)
        await made.waits_for("prod", "version 2 has 1 of 2 bindings")
        await made.placer.kill()
        made.placer = await rig.start_placer(retry_failed_s=0.3)
        await made.placer.until_leads()
        await made.reported(5)
        assert (await made.alias("prod"))["version"] == "1"
        slow.loads = lambda _: None
        await made.leads_to("prod", 2)
        assert made.bound("m/2") == 2


async def test_a_cold_alias_flips_at_once(rig):
    """Where the present version is bound nowhere, there is nothing to lose."""
    async with world(rig, workers=1) as made:
        for version in (2, 3):
            await made.register(version)
        await made.put("spare", 200, version=2)
        answer = await made.http.put(f"{ALIASES}/spare?wait=20", json={"version": 3})
        assert (answer.status_code, answer.json()["version"]) == (200, "3")
        assert made.bound("m/2") == made.bound("m/3") == 0


async def test_a_canary_gets_its_share_and_counts_by_itself(rig):
    """A split by weights, sticky by key, with metrics and statistics of each version."""
    async with world(rig, workers=1) as made:
        await made.register(2)
        await made.put("prod", 200, split={"1": 1})
        answer = await made.http.put(f"{ALIASES}/prod?wait=20", json={"split": {"1": 3, "2": 1}})
        assert answer.status_code == 200, answer.text
        met = [await made.ask("/versions/prod") for _ in range(120)]
        assert 10 <= met.count("m/2") <= 55
        keyed = set()
        for _ in range(10):
            answer = await made.http.post(
                "/v2/models/m/versions/prod/infer",
                json=JSON_BODY,
                headers={"roost-split-key": "client-7"},
            )
            keyed.add(answer.text)
        assert len(keyed) == 1
        metrics = (await made.http.get("/metrics")).text
        for version in ("1", "2"):
            count = met.count(f"m/{version}") + (10 if keyed == {f"m/{version}"} else 0)
            labels = f'code="ok",model="m",version="{version}"'
            assert f"roost_gateway_requests_total{{{labels}}} {float(count)}" in metrics
        stats = (await made.http.get("/v2/models/m/versions/prod/stats")).json()["model_stats"]
        assert [each["version"] for each in stats] == ["1", "2"]
        # Producers have one queue for the alias: the heaviest version's.
        replies = [await rig.ask("m/prod") for _ in range(10)]
        assert {reply.body for reply in replies} == {b"m/1"}


async def test_producers_are_told_of_an_alias_that_is_not_there(rig):
    """As of a model that is not there; and a removed one leads nowhere, also when nobody watched
    it go: the next placer takes its route away."""
    async with world(rig, workers=1) as made:
        reply = await rig.ask("m/prod")
        assert reply.headers[names.HEADER_CODE] == "not_found"
        assert b"no alias 'prod'" in reply.body
        await made.put("prod", 200, version=1)
        await made.register(2)
        async with asyncio.timeout(20):
            while (await rig.ask("m/prod")).headers[names.HEADER_CODE] != "ok":
                await asyncio.sleep(0.02)

        async def routed() -> bool:
            story = (await made.placer.get("/explain/m/1")).json()
            return "m/prod" in story["routing_keys"]

        async with asyncio.timeout(20):
            while not await routed():
                await asyncio.sleep(0.02)
        await made.placer.end()
        assert (await made.http.delete(f"{ALIASES}/prod")).status_code == 204
        await rig.start_placer()
        async with asyncio.timeout(20):
            while (await rig.ask("m/prod")).headers[names.HEADER_CODE] != "not_found":
                await asyncio.sleep(0.02)


async def test_a_version_that_an_alias_means_is_kept_warm(rig):
    """As its manifest says, also when a newer one has the bare name."""
    async with world(rig, workers=1) as made:
        await made.put("prod", 200, version=1)
        model = await made.register(2, min_copies=1)
        await made.bound_times(model, 1)
        await made.reported(20)  # the hold-down is over
        assert made.bound("m/1") == 1
