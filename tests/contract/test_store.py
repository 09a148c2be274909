"""The same laws for the store in memory and for Redis."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from shared.control import Assigned, Assignment, ModelReport, Report
from shared.models import Footprint
from shared.names import ModelId
from shared.store.memory import MemoryState, MemoryStore
from shared.store.port import ASSIGNMENT_TTL_S, Store, StoreUnavailable
from shared.store.redis import RedisStore

SHORT_S = 0.3


@pytest.fixture(params=["memory", "redis"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Store, Store]]:
    """Two services' accesses to the same store."""
    async with opened(request, ASSIGNMENT_TTL_S) as pair:
        yield pair


@pytest.fixture(params=["memory", "redis"])
async def short_lived(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Store, Store]]:
    """As `stores`, but assignments last for a moment only."""
    async with opened(request, SHORT_S) as pair:
        yield pair


@contextlib.asynccontextmanager
async def opened(
    request: pytest.FixtureRequest, assignment_ttl_s: float
) -> AsyncIterator[tuple[Store, Store]]:
    pair: tuple[Store, Store]
    if request.param == "memory":
        state = MemoryState(assignment_ttl_s=assignment_ttl_s)
        pair = MemoryStore(state), MemoryStore(state)
    else:
        url = request.getfixturevalue("redis_url")
        pair = (
            RedisStore(url, assignment_ttl_s=assignment_ttl_s),
            RedisStore(url, assignment_ttl_s=assignment_ttl_s),
        )
    for store in pair:
        await store.start()
    yield pair
    for store in pair:
        await store.close()


@pytest.fixture
async def redis_store(redis_url: str) -> AsyncIterator[RedisStore]:
    """For what only Redis can show."""
    store = RedisStore(redis_url)
    await store.start()
    yield store
    await store.close()


def report(worker: str = "w0", seq: int = 1) -> Report:
    return Report(
        worker=worker,
        incarnation="i",
        seq=seq,
        at=1.0,
        device_kind="cpu",
        device_name="cpu",
        budget_bytes=100,
        used_bytes=10,
        measured_bytes=11,
        generation=0,
        models=(
            ModelReport(
                model=ModelId("bert/1"),
                tier="device",
                phase="ready",
                bound=True,
                footprint=Footprint(10),
            ),
        ),
    )


def assignment(fence: int, generation: int, *models: str) -> Assignment:
    return Assignment(
        worker="w0",
        fence=fence,
        generation=generation,
        models=tuple(Assigned(ModelId(m), "because") for m in models),
    )


async def until(condition, deadline_s: float = 5.0) -> None:
    """Polls an async condition; fails when it does not come true in time."""
    async with asyncio.timeout(deadline_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_a_report_is_seen_by_others_as_it_was_written(stores):
    """What one service reports, another reads unchanged; the last writing stands."""
    one, other = stores
    await one.put_report(report(seq=1), 10)
    await one.put_report(report(seq=2), 10)
    await one.put_report(report("w1"), 10)
    assert sorted(await other.reports(), key=lambda r: r.worker) == [report(seq=2), report("w1")]


async def test_a_report_vanishes_after_its_time(stores):
    """A worker that stops reporting is not seen any more after its ttl."""
    one, other = stores
    await one.put_report(report(), 0.15)
    assert await other.reports()

    async def gone() -> bool:
        return not await other.reports()

    await until(gone)


async def test_a_leaving_worker_takes_its_report_along(stores):
    """remove_report has effect at once, and twice does no harm."""
    one, other = stores
    await one.put_report(report(), 10)
    await one.remove_report("w0")
    await one.remove_report("w0")
    assert await other.reports() == []


async def test_a_leaving_worker_takes_its_assignment_along(stores):
    """Ids are random by default: what is said to a worker that left would stay for ever."""
    one, other = stores
    await one.put_report(report(), 10)
    await one.put_assignment(assignment(5, 1, "a/1"))
    await one.remove_report("w0")
    assert await other.assignment("w0") is None
    assert await other.put_assignment(assignment(5, 1, "b/1")), "nothing older stands there"


@pytest.mark.parametrize("renew", ["report", "assignment", "same assignment"])
async def test_an_assignment_outlives_its_worker_by_a_while_only(short_lived, renew):
    """It vanishes when nothing was heard of the worker for long, and stays as long as the
    worker reports or the placer writes."""
    one, other = short_lived
    await one.put_assignment(assignment(5, 1, "a/1"))
    began = time.monotonic()
    generation = 1
    while time.monotonic() - began < 2 * SHORT_S:
        if renew == "report":
            await one.put_report(report(), 10)
        else:
            generation += renew == "assignment"
            assert await one.put_assignment(assignment(5, generation, "a/1"))
        assert await other.assignment("w0") is not None
        await asyncio.sleep(0.02)

    async def gone() -> bool:
        return await other.assignment("w0") is None

    await until(gone)
    assert await other.put_assignment(assignment(5, 1, "b/1")), "nothing older stands there"


async def test_an_older_word_never_overwrites_a_newer_one(stores):
    """Lower fences and lower generations are refused; repeating the same word is accepted."""
    one, other = stores
    assert await one.put_assignment(assignment(5, 1, "a/1"))
    assert await one.put_assignment(assignment(5, 1, "a/1")), "a repeated command is no conflict"
    assert not await one.put_assignment(assignment(5, 1, "b/1")), "same generation, other content"
    assert await one.put_assignment(assignment(5, 2, "b/1"))
    assert not await one.put_assignment(assignment(5, 1, "c/1"))
    assert not await other.put_assignment(assignment(4, 9, "c/1")), "a stale placer"
    assert await other.put_assignment(assignment(6, 0, "d/1"))
    assert await one.assignment("w0") == assignment(6, 0, "d/1")
    assert await one.assignment("nobody") is None


async def test_a_hint_wakes_those_who_listen_to_its_topic(stores):
    """A listener gets its own topics and no others."""
    one, other = stores
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen() -> None:
        async for topic in other.hints("a", "b"):
            heard.put_nowait(topic)

    task = asyncio.create_task(listen())

    async def woken() -> bool:
        await one.hint("elsewhere")
        await one.hint("b")
        return not heard.empty()

    await until(woken)
    await one.hint("a")
    async with asyncio.timeout(5):
        while await heard.get() != "a":
            pass
    seen = set()
    while not heard.empty():
        seen.add(heard.get_nowait())
    assert "elsewhere" not in seen
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_one_holder_at_a_time_and_fences_only_grow(stores):
    """The lease excludes others, renews with the same fence, and passes on with a higher one."""
    one, other = stores
    first = await one.acquire_lease("p1", 10)
    assert first is not None
    assert await other.acquire_lease("p2", 10) is None
    assert await one.acquire_lease("p1", 10) == first
    await other.release_lease("p2")
    assert await other.acquire_lease("p2", 10) is None, "only the holder can release"
    await one.release_lease("p1")
    second = await other.acquire_lease("p2", 10)
    assert second is not None
    assert second > first


async def test_an_expired_lease_can_be_taken(stores):
    """A holder that does not renew loses the lease."""
    one, other = stores
    first = await one.acquire_lease("p1", 0.1)
    taken: list[int] = []

    async def took() -> bool:
        fence = await other.acquire_lease("p2", 10)
        if fence is not None:
            taken.append(fence)
        return bool(taken)

    await until(took)
    assert taken[0] > first
    assert await one.acquire_lease("p1", 10) is None


async def test_active_models_are_a_set(stores):
    """Adding and removing twice is like once."""
    one, other = stores
    for model in ("a/1", "a/1", "b/2"):
        await one.add_active(ModelId(model))
    assert await other.active() == {"a/1", "b/2"}
    await other.remove_active(ModelId("a/1"))
    await other.remove_active(ModelId("a/1"))
    assert await one.active() == {"b/2"}


async def test_epoch_is_stable_and_the_same_for_all(stores):
    """Everybody sees the same epoch as long as nothing is lost."""
    one, other = stores
    assert await one.epoch() == await other.epoch() == await one.epoch()


async def test_a_flush_changes_the_epoch_and_fences_still_grow(redis_store):
    """After FLUSHALL the epoch is another and the next fence is higher than the last before."""
    store = redis_store
    epoch, fence = await store.epoch(), await store.acquire_lease("p1", 10)
    await store._redis.flushdb()
    assert await store.epoch() != epoch
    assert await store.assignment("w0") is None
    again = await store.acquire_lease("p1", 10)
    assert again > fence


async def test_a_store_that_is_away_says_so():
    """Nothing of the driver leaks: the caller sees StoreUnavailable."""
    store = RedisStore("redis://127.0.0.1:1/0")
    with pytest.raises(StoreUnavailable):
        await store.reports()
    await store.close()
    state = MemoryState()
    state.reachable = False
    with pytest.raises(StoreUnavailable):
        await MemoryStore(state).reports()


@pytest.mark.parametrize("garbage", [b"\xc1garbage", b"\x81\xa6worker\xa1\xff"])
async def test_garbage_in_the_store_is_left_out(redis_store, garbage):
    """An undecodable report or assignment, also one whose text is no UTF-8, harms nobody."""
    store = redis_store
    await store.put_report(report("good"), 10)
    await store.put_report(report("bad"), 10)
    await store._redis.set("roost:{w:bad}:report", garbage)
    await store._redis.hset("roost:{w:bad}:assignment", mapping={"body": garbage})
    assert [r.worker for r in await store.reports()] == ["good"]
    assert await store.assignment("bad") is None


async def test_a_cancelled_command_ends_its_task(stores):
    """Whatever moment a task is cancelled at, it does not go on as if nothing had been."""
    store, _ = stores
    for turns in range(40):
        task = asyncio.create_task(store.put_report(report(), 10))
        for _ in range(turns):
            await asyncio.sleep(0)
        if not task.done():
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


async def test_a_note_reaches_those_who_listen(stores):
    """With its bytes, to the topic's listeners only."""
    one, other = stores
    heard: list[bytes] = []
    came = asyncio.Event()

    async def listen():
        async for data in other.notes("a"):
            heard.append(data)
            if data == b"last":
                came.set()

    task = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(10):
            while not heard:  # nobody says when a subscription has begun
                await one.note("a", b"first")
                await asyncio.sleep(0.01)
            await one.note("b", b"not for us")
            await one.note("a", b"last")
            await came.wait()
    finally:
        task.cancel()
    assert set(heard) == {b"first", b"last"}


async def test_tallies_are_kept_by_gateway_and_model(stores):
    """A later word replaces that of the same model only; who does not come again is forgotten."""
    one, other = stores
    a, b = ModelId("a/1"), ModelId("b/1")
    await one.put_tallies("g1", {a: b"1", b: b"2"}, 60)
    await one.put_tallies("g1", {a: b"3"}, 60)
    await other.put_tallies("g2", {a: b"4"}, 60)
    assert await other.tallies([a, b]) == {"g1": {a: b"3", b: b"2"}, "g2": {a: b"4"}}
    assert (await other.tallies([b]))["g1"] == {b: b"2"}
    await other.put_tallies("g2", {}, 0.05)
    await asyncio.sleep(0.1)
    assert "g2" not in await one.tallies([a])
