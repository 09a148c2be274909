"""Where a request goes: from what its address says to one version and its routing key."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from shared.aliases import DEFAULT, choose, heaviest, point_of
from shared.catalog import Catalog
from shared.models import Manifest


class Target(msgspec.Struct, frozen=True):
    manifest: Manifest
    routing_key: str


class Routes:
    """Those of all models. `version` is text as it stands in an address: a number, `latest`, an
    alias, or None for whatever the model's name leads to."""

    def __init__(self, catalog: Catalog, draw: Callable[[], float] = random.random) -> None:
        """`draw` gives a point in [0, 1) for each request that a split has to place."""
        self._catalog = catalog
        self._draw = draw

    async def target(self, name: str, version: str | None, split_key: str = "") -> Target:
        """Of `name`, and of `version` if the address has one. Of a split each request gets one
        version, by chance; those with the same `split_key` get the same one. Raises
        `InvalidRequest`, `ModelNotFound`, `Quarantined`, `Unavailable`."""
        catalog = self._catalog
        if version is not None:
            split = await catalog.split(name, version)
        elif (default := (await catalog.aliases(name)).split_of(DEFAULT)) is not None:
            split = default
        else:
            # Under the bare name, so that it is served even if this version has just gone.
            manifest = await catalog.newest(name)
            await catalog.check_runnable(manifest.id)
            return Target(manifest, manifest.name)
        if len(split) == 1:
            (number,) = split
        else:
            number = choose(split, point_of(name, split_key) if split_key else self._draw())
        manifest = await catalog.get(name, number)
        await catalog.check_runnable(manifest.id)
        return Target(manifest, manifest.id)

    async def version(self, name: str, version: str | None) -> int | None:
        """The number for what is told of a single version: of a split the heaviest. None where
        the address names none. Raises as `target`."""
        return None if version is None else heaviest(await self._catalog.split(name, version))

    async def versions(self, name: str, version: str) -> list[int]:
        """All numbers to which the address may lead. Raises as `target`."""
        return sorted(await self._catalog.split(name, version))
