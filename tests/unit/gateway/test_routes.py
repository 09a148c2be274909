"""From an address to one version."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from services.gateway.routes import Routes
from shared.aliases import Alias, Aliases, Pending
from shared.catalog import Catalog
from shared.errors import InvalidRequest, ModelNotFound
from shared.models import Manifest


class FakeRepository:
    """The model `m` in three versions, with these aliases."""

    def __init__(self, **aliases):
        self.versions = self
        self.named = {"m": Aliases(1, aliases)}

    def aliases(self):
        return self.named

    def unloaded(self):
        return frozenset()

    def quarantined(self):
        return {}

    def manifest(self, name, version=None):
        if name != "m" or version not in (None, 1, 2, 3):
            raise ModelNotFound(f"no {name!r} {version}")
        return Manifest(name=name, version=version or 3, digest="", size_bytes=0, created_at=0.0)


def routes(draw=lambda: 0.0, **aliases):
    return Routes(Catalog(FakeRepository(**aliases)), draw)


async def keys(found, *versions):
    return [(await found.target("m", version)).routing_key for version in versions]


async def test_numbers_and_latest_and_the_bare_name():
    """Without an alias `default` the bare name stays the routing key: it is right also when the
    version has just gone."""
    found = routes()
    assert await keys(found, None, "2", "latest") == ["m", "m/2", "m/3"]
    assert (await found.target("m", None)).manifest.version == 3


async def test_aliases_lead_to_their_version():
    """What is pending does not count; the bare name means `default` where there is one."""
    found = routes(prod=Alias({2: 1}, Pending({3: 1}, 0.0)), default=Alias({1: 1}))
    assert await keys(found, "prod", None, "default", "latest") == ["m/2", "m/1", "m/1", "m/3"]


async def test_a_split_is_drawn_for_each_request():
    """By its weights: a hundred points in equal steps meet them exactly."""
    points = itertools.cycle(n / 100 for n in range(100))
    found = routes(lambda: next(points), prod=Alias({1: 90, 2: 10}))
    met = Counter(await keys(found, *["prod"] * 200))
    assert met == {"m/1": 180, "m/2": 20}


async def test_a_key_stays_with_one_version():
    """Whatever is drawn; and different keys are spread over both."""
    points = itertools.cycle([0.0, 0.99])
    found = routes(lambda: next(points), prod=Alias({1: 50, 2: 50}))
    met = {}
    for key in (f"client-{n}" for n in range(200)):
        versions = {(await found.target("m", "prod", key)).manifest.version for _ in range(3)}
        assert len(versions) == 1
        met[key] = versions.pop()
    assert 60 <= Counter(met.values())[1] <= 140


async def test_one_version_is_told_where_only_one_can_be():
    """The heaviest of a split; all of them where all are told."""
    found = routes(prod=Alias({1: 10, 2: 90}))
    assert await found.version("m", "prod") == 2
    assert await found.version("m", None) is None
    assert await found.version("m", "7") == 7
    assert await found.versions("m", "prod") == [1, 2]
    assert await found.versions("m", "latest") == [3]


async def test_what_leads_nowhere_is_refused():
    """An unknown alias, version or model is not found; what can be none of them is invalid."""
    found = routes(prod=Alias({1: 1}), lost=Alias({9: 1}))
    for name, version in (("m", "x"), ("m", "9"), ("n", "prod"), ("n", None), ("m", "lost")):
        with pytest.raises(ModelNotFound):
            await found.target(name, version)
    for name, version in (("m", "X"), ("m", ""), ("m", "0"), ("../m", None), ("../m", "prod")):
        with pytest.raises(InvalidRequest):
            await found.target(name, version)
