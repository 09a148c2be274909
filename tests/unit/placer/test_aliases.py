"""Who holds bindings for an alias that is to flip, and who may flip it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from services.placer.aliases import AliasKeeper
from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from services.placer.names import Names
from shared.aliases import Alias, Aliases, Pending
from shared.catalog import Catalog
from shared.control import ModelReport, Report
from shared.errors import ModelFailed
from shared.manifests import encode_manifest, manifest_path
from shared.models import Footprint, Manifest
from shared.names import ModelId
from shared.quarantine import Death
from shared.repository import Repository
from shared.store.memory import MemoryState, MemoryStore
from shared.store.port import TOPIC_REGISTRY

M1, M2 = ModelId("m/1"), ModelId("m/2")


class Lease:
    valid = True


class Recovery:
    in_grace = False


class Activator:
    """Makes active what it is asked to, or raises."""

    def __init__(self, knowledge):
        self.knowledge = knowledge
        self.asked = []
        self.trouble = None

    async def activate(self, manifest, why):
        self.asked.append(manifest.id)
        if self.trouble is not None:
            raise self.trouble
        self.knowledge.activate(manifest.id, manifest, why=why)


class World:
    """The model `m` in versions 1 and 2, the alias `prod` to lead from 1 to 2, and one worker for
    each name in `bound` that consumes its models."""

    def __init__(self, root):
        for version in (1, 2):
            path = root / manifest_path("m", version)
            path.parent.mkdir(parents=True)
            path.write_bytes(encode_manifest(manifest(version)))
        self.now = 100.0
        self.repository = Repository(str(root))
        self.catalog = Catalog(self.repository, ttl_s=0.0)
        self.knowledge = Knowledge(Policy(), lambda: self.now)
        self.store = MemoryStore(MemoryState())
        self.activator, self.recovery, self.lease = Activator(self.knowledge), Recovery(), Lease()
        self.keeper = AliasKeeper(
            self.store,
            self.repository,
            self.catalog,
            self.knowledge,
            self.activator,
            self.recovery,
            self.lease,
        )
        self.seq = 0

    def lead(self, version):
        self.repository.edit_aliases("m", lambda d: d.lead("prod", {version: 1}, 2, 0.0))

    def see(self, **bound):
        self.seq += 1
        reports = []
        for worker, models in bound.items():
            if worker not in self.knowledge.reports:
                self.knowledge.adopt(worker, {}, 0)
            reports.append(report(worker, self.seq, models))
        self.knowledge.see(reports, {}, self.now)

    @property
    def prod(self):
        return self.repository.aliases()["m"].aliases["prod"]

    def held(self):
        return {m: a.least_copies for m, a in self.knowledge.active.items() if a.least_copies}


def manifest(version):
    digest = "sha256:" + "0" * 64
    return Manifest(name="m", version=version, digest=digest, size_bytes=10, created_at=0.0)


def report(worker, seq, models):
    return Report(
        worker=worker,
        incarnation="x",
        seq=seq,
        at=0.0,
        device_kind="cpu",
        device_name="",
        budget_bytes=1000,
        used_bytes=0,
        measured_bytes=0,
        generation=0,
        models=tuple(
            ModelReport(model=m, tier="device", phase="ready", bound=True, footprint=Footprint(10))
            for m in models
        ),
    )


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.store.start()
    made.lead(1)
    made.lead(2)
    yield made
    await made.store.close()


async def test_as_many_copies_are_held_as_the_present_version_has(world):
    """And the alias flips when they are bound; a moment later they are kept no longer."""
    hints = world.store.hints(TOPIC_REGISTRY)
    hinted = asyncio.ensure_future(anext(hints))
    world.see(w1=[M1], w2=[M1])
    await world.keeper.look()
    assert world.held() == {M2: 2}
    assert world.knowledge.view().models[M2].min_copies == 2
    world.see(w1=[M1, M2], w2=[M1])
    await world.keeper.look()
    assert world.prod.pending is not None
    assert "1 of 2 bindings" in world.knowledge.flips[M2]
    assert not hinted.done()
    world.see(w1=[M1, M2], w2=[M1, M2])
    await world.keeper.look()
    assert world.prod == Alias({2: 1})
    assert await asyncio.wait_for(hinted, 10)
    await world.keeper.look()
    assert world.held() == {M2: 2}
    world.now += 10
    await world.keeper.look()
    assert world.held() == {}
    assert world.knowledge.flips == {}


async def test_what_is_lost_meanwhile_is_not_waited_for(world):
    """Of the present version's two bindings one has gone: one is enough."""
    world.see(w1=[M1, M2], w2=[M1])
    await world.keeper.look()
    assert world.prod.pending is not None
    world.see(w1=[M1, M2], w2=[])
    await world.keeper.look()
    assert world.prod == Alias({2: 1})


async def test_a_placer_that_has_just_begun_waits_for_reports(world):
    """Nothing is bound as far as it knows, which is not to say that nothing is."""
    world.recovery.in_grace = True
    await world.keeper.look()
    assert world.prod.pending is not None
    world.recovery.in_grace = False
    await world.keeper.look()
    assert world.prod == Alias({2: 1})


async def test_without_the_lease_nothing_is_written(world):
    """Another placer decides by now."""
    world.see(w1=[M1, M2])
    world.lease.valid = False
    await world.keeper.look()
    assert world.prod.pending is not None


async def test_who_is_faster_wins(world):
    """A person has taken it back after the placer looked: it stays taken back."""
    world.see(w1=[M1, M2])
    world.catalog = Catalog(world.repository, ttl_s=60.0)
    world.keeper._catalog = world.catalog
    await world.keeper.follow()
    world.lead(1)
    await world.keeper.look()
    assert world.prod == Alias({1: 1})
    await world.keeper.look()
    assert world.held() == {}


async def test_what_cannot_be_made_active_is_told_and_tried_again(world):
    """Not at every look."""
    world.see(w1=[M1])
    world.activator.trouble = ModelFailed("larger than any device")
    await world.keeper.look()
    assert "larger than any device" in world.knowledge.flips[M2]
    await world.keeper.look()
    assert "larger than any device" in world.knowledge.flips[M2]
    assert world.activator.asked == [M2]
    world.now += 2
    world.activator.trouble = None
    await world.keeper.look()
    assert world.activator.asked == [M2, M2]
    await world.keeper.look()
    assert world.held() == {M2: 1}


async def test_one_model_holds_up_no_other(world, tmp_path):
    """Its manifest is broken; the other's alias flips."""
    path = tmp_path / manifest_path("a", 1)
    for version in (1, 2):
        path = tmp_path / manifest_path("a", version)
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_manifest(manifest(version)).replace(b'"m"', b'"a"'))
        world.repository.edit_aliases("a", lambda d, v=version: d.lead("x", {v: 1}, 2, 0.0))
    path.write_bytes(b"{")
    world.see(w1=[M1, M2])
    await world.keeper.look()
    assert world.prod == Alias({2: 1})
    assert world.repository.aliases()["a"].aliases["x"].pending is not None


async def test_a_flip_to_what_is_quarantined_is_given_up(world):
    """It will never be bound: the alias stays where it leads, says why, and holds nothing; the
    next wish is a new one."""
    world.see(w1=[M1])
    death = Death(kind="load", worker="w1", at=1.0, reason="it ended 2 engines")
    world.repository.add_death(M2, death)
    await world.keeper.look()
    assert world.prod.split == {1: 1}
    assert world.prod.pending is None
    assert world.prod.given_up.split == {2: 1}
    assert world.prod.given_up.why == "m/2 is quarantined: it ended 2 engines"
    assert world.activator.asked == []
    world.repository.release("m", 2)
    world.lead(2)
    assert world.prod.pending is not None
    assert world.prod.given_up is None
    world.see(w1=[M1], w2=[M2])
    await world.keeper.look()
    assert world.prod == Alias({2: 1})


async def test_a_flip_that_is_being_written_is_told_of(world):
    """The placer is asked to end in that very moment: what it has begun it ends."""
    edit, begun, may = world.repository.edit_aliases, threading.Event(), threading.Event()

    def slowly(*args):
        begun.set()
        may.wait(30)
        return edit(*args)

    world.see(w1=[M1, M2])
    world.repository.edit_aliases = slowly
    hints = world.store.hints(TOPIC_REGISTRY)
    heard = asyncio.ensure_future(anext(hints))
    looking = asyncio.create_task(world.keeper.look())
    await asyncio.to_thread(begun.wait, 30)
    looking.cancel()
    await asyncio.sleep(0)
    may.set()
    await asyncio.wait([looking])
    assert looking.cancelled()
    assert world.prod == Alias({2: 1})
    async with asyncio.timeout(10):
        assert await heard == TOPIC_REGISTRY
    await hints.aclose()


def test_routing_keys_of_a_version():
    """One alias each, those of a split with its heaviest version; what has changed is forgotten."""
    names = Names()
    first = Aliases(1, {"prod": Alias({1: 9, 2: 1}), "next": Alias({2: 1}, Pending({1: 1}, 0.0))})
    assert names.take_in({"m": first}) == {"m"}
    assert (names.keys(M1), names.keys(M2)) == ({"m/prod"}, {"m/next"})
    assert names.mean(M1)
    assert names.mean(M2)
    assert list(names.pending()) == [("m", "next", first)]
    assert names.take_in({"m": Aliases(2, {"prod": Alias({2: 1})}, ("next",))}) == set()
    assert (names.keys(M1), names.keys(M2)) == (frozenset(), {"m/prod"})
    assert names.ever("m") == {"m/prod", "m/next"}
    assert not names.mean(M1)
    assert list(names.pending()) == []
    assert names.take_in({}) == set()
    assert names.keys(M2) == names.ever("m") == set()
