"""Where a request goes: from what its address says to one version and its routing key."""

from __future__ import annotations

import msgspec

from shared.catalog import Catalog
from shared.models import Manifest
from shared.names import check_name, check_version


class Target(msgspec.Struct, frozen=True):
    manifest: Manifest
    routing_key: str


class Routes:
    """Those of all models."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def target(self, name: str, version: str | None) -> Target:
        """Of `name`, and of `version` if the address has one. Raises `InvalidRequest`,
        `ModelNotFound`, `Unavailable`."""
        number = None if version is None else check_version(version)
        manifest = await self._catalog.get(check_name(name), number)
        return Target(manifest, manifest.name if number is None else manifest.id)
