"""Brings about what is pending of aliases: gives the versions to which one is to lead as many
bindings as the present ones have, and then, not before, lets it lead there (ADR 0020).

The change is one new document in the registry, which takes the place of the very revision that was
looked at: a placer that lost its lease meanwhile, or was overtaken by a person, changes nothing.
"""

from __future__ import annotations

import asyncio
import math
import time

import structlog

from services.placer.activate import Activator
from services.placer.knowledge import Knowledge
from services.placer.lease import Lease
from services.placer.recover import Recovery
from shared.aliases import Alias, Aliases, missing, most_copies, needed
from shared.catalog import Catalog
from shared.errors import RoostError
from shared.models import Manifest
from shared.names import ModelId, model_id, split_model_id
from shared.repository import Repository
from shared.store.port import TOPIC_REGISTRY, Store

log = structlog.get_logger(__name__)

_LOOK_S = 0.1
_AGAIN_S = 1.0
"""A version that could not be made active is tried again after so long."""
_KEEP_S = 5.0
"""Bindings are kept for so long after the flip: gateways that get no hints follow within 2 s, and
until then the new versions are asked by few, as if they were not needed."""


class AliasKeeper:
    """For one term of the lease."""

    def __init__(
        self,
        store: Store,
        repository: Repository,
        catalog: Catalog,
        knowledge: Knowledge,
        activator: Activator,
        recovery: Recovery,
        lease: Lease,
    ) -> None:
        self._store = store
        self._repository = repository
        self._catalog = catalog
        self._knowledge = knowledge
        self._activator = activator
        self._recovery = recovery
        self._lease = lease
        self._some = asyncio.Event()
        self._tried: dict[ModelId, tuple[float, str]] = {}
        """When versions were to be made active last, and why they could not be."""
        self._kept: dict[ModelId, tuple[int, float]] = {}
        """Copies of what has flipped, and until when they are kept."""

    async def follow(self) -> None:
        """Takes in what the registry says. Raises `Unavailable`."""
        names, active = self._knowledge.names, self._knowledge.active
        new = names.take_in(await self._catalog.all_aliases())
        for model in active if new else ():
            if split_model_id(model)[0] in new:
                # An earlier placer's routes may lead where the aliases do not any more.
                active[model].bound_keys = None
        if any(names.pending()):
            self._some.set()

    async def run(self) -> None:
        """For ever. Costs nothing while nothing is pending."""
        while True:
            await self._some.wait()
            try:
                await self.look()
            except RoostError as error:
                log.warning("aliases_not_kept", error=str(error))
            if not self._kept and not any(self._knowledge.names.pending()):
                self._some.clear()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """One round: holds what is to be held, and flips what is due. Raises `Unavailable`."""
        # 1. See what is pending: gateways and people change it.
        await self.follow()
        now = self._knowledge.clock()
        self._kept = {model: kept for model, kept in self._kept.items() if now < kept[1]}
        held = {model: copies for model, (copies, _) in self._kept.items()}
        stories: dict[ModelId, str] = {}
        # 2. Each by itself: one that cannot be brought about holds up no other.
        for name, alias, document in list(self._knowledge.names.pending()):
            try:
                await self._advance(name, alias, document, held, stories)
            except RoostError as error:
                log.warning("alias_not_kept", model=name, alias=alias, error=str(error))
        # 3. What nobody waits for any more is not held any more.
        self._knowledge.hold(held, stories)

    # --- parts ------------------------------------------------------------------------------

    async def _advance(
        self,
        name: str,
        alias: str,
        document: Aliases,
        held: dict[ModelId, int],
        stories: dict[ModelId, str],
    ) -> None:
        found = document.aliases[alias]
        manifests = {
            version: await self._catalog.get(name, version, even_unloaded=True)
            for version in sorted(found.versions())
        }
        bound = {v: len(self._knowledge.consumers.get(m.id, ())) for v, m in manifests.items()}
        quarantined = await self._catalog.quarantined()
        for version in sorted(found.pending.split if found.pending is not None else ()):
            kept_away = quarantined.get(manifests[version].id)
            if kept_away is not None:
                # It will never be bound: whoever waits is told, and what serves goes on to.
                await self._give_up(name, alias, document, kept_away.error().message)
                return
        needs = needed(found, bound, self._most(manifests))
        for version, copies in needs.items():
            model = manifests[version].id
            held[model] = max(held.get(model, 0), copies)
        # Workers may be alive that have not reported yet: bound to what is there now.
        waits = ["workers that have not reported yet"] if self._recovery.in_grace else []
        waits += missing(needs, bound)
        if not waits:
            flip = asyncio.create_task(self._flip(name, alias, document, found, needs))
            try:
                await asyncio.shield(flip)
            except asyncio.CancelledError:
                # The document is being written: others are told, or nobody knows for seconds.
                await asyncio.wait([flip])
                raise
            return
        for version, copies in needs.items():
            if bound[version] < copies:
                waits += await self._wake(manifests[version], alias)
        for version in needs:
            stories[manifests[version].id] = f"{alias!r} is to lead here: {'; '.join(waits)}"

    def _most(self, manifests: dict[int, Manifest]) -> dict[int, int]:
        knowledge = self._knowledge
        serving = sum(
            report.engine_up and not report.draining and worker not in knowledge.leaving
            for worker, report in knowledge.reports.items()
        )
        return {version: most_copies(each, serving) for version, each in manifests.items()}

    async def _wake(self, manifest: Manifest, alias: str) -> list[str]:
        """Makes the version active, so that the plan gives it what is held for it. Returns why it
        cannot be."""
        model, now = manifest.id, self._knowledge.clock()
        if self._knowledge.copies(model):
            self._tried.pop(model, None)
            return []
        at, trouble = self._tried.get(model, (-math.inf, ""))
        if now - at >= _AGAIN_S:
            trouble = ""
            try:
                await self._activator.activate(manifest, why=f"{alias!r} is to lead to it")
            except RoostError as error:
                trouble = error.message
            self._tried[model] = (now, trouble)
        return [trouble] if trouble else []

    async def _give_up(self, name: str, alias: str, document: Aliases, why: str) -> None:
        """Raises `RoostError`, `Conflict` among them: then it is looked at anew."""
        if not self._lease.valid:
            return
        try:
            fresh = await asyncio.to_thread(
                self._repository.edit_aliases,
                name,
                lambda present: present.give_up(alias, why, time.time()),
                document.revision,
            )
        finally:
            self._catalog.invalidate(name)
        self._knowledge.names.take_one(name, fresh)
        log.warning("alias_given_up", model=name, alias=alias, why=why)
        await self._store.hint(TOPIC_REGISTRY)

    async def _flip(
        self, name: str, alias: str, document: Aliases, found: Alias, needs: dict[int, int]
    ) -> None:
        """Raises `RoostError`, `Conflict` among them: then it is looked at anew."""
        if not self._lease.valid or found.pending is None:
            return
        revision = document.revision
        try:
            fresh = await asyncio.to_thread(
                self._repository.edit_aliases, name, lambda present: present.flip(alias), revision
            )
        finally:
            self._catalog.invalidate(name)
        knowledge, now = self._knowledge, self._knowledge.clock()
        knowledge.names.take_one(name, fresh)
        for version, copies in needs.items():
            self._kept[model_id(name, version)] = (copies, now + _KEEP_S)
        waited = time.time() - found.pending.since
        split = found.pending.split
        log.info("alias_flipped", model=name, alias=alias, split=split, after_s=round(waited, 3))
        for version in split:
            why = f"{alias!r} leads to it now, {waited:.1f} s after it was to"
            knowledge.note("alias flipped", model_id(name, version), why=why)
        await self._store.hint(TOPIC_REGISTRY)
