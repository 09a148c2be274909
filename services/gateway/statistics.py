"""Statistics of models, added up over all gateways: each tells the others by the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final

import structlog

from services.gateway.core.tally import Ran, Tallies, statistics
from services.gateway.status import Status
from shared.catalog import Catalog
from shared.models import Manifest
from shared.names import ModelId
from shared.store.port import Store, StoreUnavailable

log = structlog.get_logger(__name__)

TELL_S: Final = 1.0
"""How old another gateway's counters are at most."""
KEPT_S: Final = 24 * 3600.0
"""How long the counters of a gateway that has stopped are part of the sum."""
_RENEW_S: Final = 600.0
"""How often everything is told anew: a store that was flushed has forgotten it."""
_AT_ONCE: Final = 256
"""Statistics of a large fleet do not hold up whoever shares the event loop."""


class Statistics:
    def __init__(
        self, tallies: Tallies, catalog: Catalog, store: Store, status: Status, gateway: str
    ) -> None:
        """`gateway` is new at each start: counters start again with it."""
        self._tallies = tallies
        self._catalog = catalog
        self._store = store
        self._status = status
        self._gateway = gateway

    def note(self, model: ModelId, seconds: float, ran: Ran | None) -> None:
        """One request ended, well if it `ran`."""
        self._tallies.note(model, seconds, ran, time.time())

    async def of(self, name: str, versions: Sequence[int] | None) -> dict[str, Any]:
        """Some versions, or all of a model. Raises `ModelNotFound`."""
        numbers = versions if versions is not None else await self._status.versions(name)
        return await self._told([await self._catalog.get(name, number) for number in numbers])

    async def of_all(self) -> dict[str, Any]:
        """Every version that can be asked."""
        return await self._told(await self._catalog.ids())

    async def _told(self, manifests: list[Manifest]) -> dict[str, Any]:
        models = [manifest.id for manifest in manifests]
        try:
            told = await self._store.tallies(models)
        except StoreUnavailable as error:
            log.warning("tallies_unavailable", error=str(error))
            told = {}  # what this gateway knows is better than nothing
        told.pop(self._gateway, None)
        memory = await self._status.memory()
        entries = []
        for number, manifest in enumerate(manifests, start=1):
            others = [of[manifest.id] for of in told.values() if manifest.id in of]
            tally = self._tallies.sum(manifest.id, others)
            used = memory.get(manifest.id, [])
            entries.append(statistics(manifest.name, str(manifest.version), tally, used))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return {"model_stats": entries}

    async def tell_others(self) -> None:
        """Never returns."""
        renew_at = 0.0
        while True:
            await asyncio.sleep(TELL_S)
            now = time.monotonic()
            if renewing := now >= renew_at:
                self._tallies.tell_all()
            changes = self._tallies.changes()
            if not changes and not renewing:
                continue
            try:
                await self._store.put_tallies(self._gateway, changes, KEPT_S)
            except StoreUnavailable:
                self._tallies.untold(changes)
                continue
            if renewing:
                renew_at = now + _RENEW_S
