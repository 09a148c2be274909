from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from shared.aliases import Alias, Aliases
from shared.catalog import MAX_ABSENT, Catalog
from shared.errors import InvalidRequest, ModelNotFound, Unavailable
from shared.models import Manifest


class FakeRepository:
    """Manifests in a dict; counts look-ups; `gate` holds them back."""

    def __init__(self):
        self.versions = self
        self.models: dict[str, list[int]] = {}
        self.lookups = 0
        self.gate = threading.Event()
        self.gate.set()
        self.trouble: Exception | None = None
        self.not_now: set[str] = set()
        self.named: dict[str, Aliases] = {}

    def unloaded(self):
        return frozenset(self.not_now)

    def aliases(self):
        return dict(self.named)

    def add(self, name, *versions):
        self.models.setdefault(name, []).extend(versions)

    def manifest(self, name, version=None):
        self.lookups += 1
        known = sorted(self.models.get(name, []))
        trouble = self.trouble
        assert self.gate.wait(10)
        if trouble:
            raise trouble
        if not known or (version is not None and version not in known):
            raise ModelNotFound(f"no {name!r} {version}")
        return build(name, version or known[-1])

    def manifests(self):
        self.lookups += 1
        return [build(name, v) for name in sorted(self.models) for v in self.models[name]]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def build(name, version):
    return Manifest(name=name, version=version, digest="", size_bytes=0, created_at=0.0)


@pytest.fixture
def repository():
    return FakeRepository()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def catalog(repository, clock):
    return Catalog(repository, ttl_s=2.0, clock=clock)


async def test_answers_are_kept_for_their_time(repository, catalog, clock):
    """Within the time to live nobody asks the repository again."""
    repository.add("m", 1, 2)
    assert (await catalog.get("m")).version == 2
    assert (await catalog.get("m", 1)).version == 1
    repository.add("m", 3)
    clock.now += 1.9
    assert (await catalog.get("m")).version == 2
    assert repository.lookups == 2
    clock.now += 0.2
    assert (await catalog.get("m")).version == 3


async def test_absence_is_kept_shortly(repository, catalog, clock):
    """A model that was just registered is found a moment later."""
    for _ in range(3):
        with pytest.raises(ModelNotFound, match="no 'm' 7"):
            await catalog.get("m", 7)
    assert repository.lookups == 1
    repository.add("m", 7)
    clock.now += 0.21
    assert (await catalog.get("m", 7)).version == 7


async def test_absent_names_do_not_pile_up(repository, catalog):
    """Whoever asks for ever new names does not fill the memory."""
    for number in range(MAX_ABSENT + 20):
        with pytest.raises(ModelNotFound):
            await catalog.get(f"m{number}")
    assert f"absent={MAX_ABSENT} " in repr(catalog)


async def test_one_look_up_for_all_who_wait(repository, catalog):
    """Many requests for a model that is not cached are one look-up."""
    repository.add("m", 1)
    results = await asyncio.gather(*(catalog.get("m") for _ in range(50)))
    assert {manifest.id for manifest in results} == {"m/1"}
    assert repository.lookups == 1


async def test_a_cancelled_caller_cancels_nobody_else(repository, catalog):
    """Who gives up waiting takes no answer from the others."""
    repository.add("m", 1)
    repository.gate.clear()
    first = asyncio.create_task(catalog.get("m"))
    second = asyncio.create_task(catalog.get("m"))
    while not repository.lookups:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    repository.gate.set()
    assert (await second).version == 1
    assert repository.lookups == 1


async def test_trouble_is_told_and_forgotten(repository, catalog):
    """A repository that was away is asked again by the next request."""
    repository.add("m", 1)
    repository.trouble = Unavailable("away")
    for result in await asyncio.gather(catalog.get("m"), catalog.get("m"), return_exceptions=True):
        assert isinstance(result, Unavailable)
    repository.trouble = None
    assert (await catalog.get("m")).version == 1


async def test_invalidate(repository, catalog):
    """A hint makes the next request look; other models stay cached."""
    repository.add("m", 1)
    repository.add("n", 1)
    for name in ("m", "n"):
        await catalog.get(name)
    assert len(await catalog.ids()) == 2
    repository.add("m", 2)
    catalog.invalidate("m")
    assert (await catalog.get("m")).version == 2
    assert len(await catalog.ids()) == 3
    before = repository.lookups
    await catalog.get("n")
    assert repository.lookups == before
    catalog.invalidate()
    await catalog.get("n")
    assert repository.lookups == before + 1


async def test_invalidate_while_looking(repository, catalog):
    """An answer from before the hint is not kept, and not given to who asks after it."""
    repository.add("m", 1)
    repository.gate.clear()
    before = asyncio.create_task(catalog.get("m"))
    while not repository.lookups:
        await asyncio.sleep(0)
    repository.add("m", 2)
    catalog.invalidate("m")
    after = asyncio.create_task(catalog.get("m"))
    while repository.lookups < 2:
        await asyncio.sleep(0)
    repository.gate.set()
    assert (await before).version == 1
    assert (await after).version == 2
    assert (await catalog.get("m")).version == 2
    assert repository.lookups == 2


async def test_ids_are_cached_and_ones_own(repository, catalog, clock):
    """The list is looked up once per time to live, and a caller may change its copy."""
    repository.add("m", 1)
    (await catalog.ids()).clear()
    assert [manifest.id for manifest in await catalog.ids()] == ["m/1"]
    assert repository.lookups == 1
    clock.now += 2.1
    await catalog.ids()
    assert repository.lookups == 2


async def test_names_are_checked_before_anything(repository, catalog):
    """What is not a name or a version costs no look-up."""
    for arguments in (("../m",), ("",), ("m", 0), ("m", -1)):
        with pytest.raises(InvalidRequest):
            await catalog.get(*arguments)
    assert repository.lookups == 0


async def test_what_is_known_of_all_models_goes_at_a_hint(repository):
    """Not only when it would have expired: hints come often while many models are registered,
    and each list of all is large."""
    repository.not_now = {"a"}
    catalog = Catalog(repository, ttl_s=60)
    known = weakref.ref(await catalog.unloaded())
    assert known() is not None
    catalog.invalidate()
    await asyncio.sleep(0)  # the look-up's own task ends
    gc.collect()
    assert known() is None


async def test_an_unloaded_model_is_not_found_until_it_is_loaded(repository, clock):
    """Nobody finds it who would ask it; who asks for it all the same sees it."""
    repository.add("a", 1)
    repository.add("b", 1)
    repository.not_now = {"a"}
    catalog = Catalog(repository, clock=clock)
    with pytest.raises(ModelNotFound, match="unloaded"):
        await catalog.get("a")
    assert [manifest.name for manifest in await catalog.ids()] == ["b"]
    assert (await catalog.get("a", even_unloaded=True)).version == 1
    assert len(await catalog.ids(even_unloaded=True)) == 2
    repository.not_now = set()
    catalog.invalidate("a")
    assert (await catalog.get("a")).version == 1


async def test_the_alias_default_is_what_the_bare_name_means(repository, catalog):
    """Without it the highest version is; `latest` is in any case."""
    repository.add("m", 1, 2, 3)
    assert (await catalog.get("m")).version == 3
    repository.named["m"] = Aliases(1, {"default": Alias({1: 1, 2: 9})})
    catalog.invalidate("m")
    assert (await catalog.get("m")).version == 2
    assert (await catalog.named("m", "latest")).version == 3
    assert (await catalog.named("m", "default")).version == 2
    assert (await catalog.named("m", "1")).version == 1


async def test_an_alias_that_is_not_there_is_told_with_those_that_are(repository, catalog):
    """A model that is not there, or a text that can be no alias, is told as such."""
    repository.add("m", 1)
    repository.named["m"] = Aliases(1, {"prod": Alias({1: 1})})
    with pytest.raises(ModelNotFound, match="no alias 'canary'; it has prod"):
        await catalog.named("m", "canary")
    with pytest.raises(ModelNotFound, match="no 'other'"):
        await catalog.named("other", "canary")
    for text in ("Prod", "0", "-1", "", "é", "x" * 64):
        with pytest.raises(InvalidRequest):
            await catalog.named("m", text)
