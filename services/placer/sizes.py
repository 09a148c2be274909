"""How large models are, as far as that can be known before a worker here has said so: from what the
repository read in their files, and from what workers measured of them on other days."""

from __future__ import annotations

import asyncio
from asyncio import to_thread
from collections.abc import Set as AbstractSet
from typing import Final

import structlog

from services.placer.knowledge import Active, Knowledge
from shared.errors import RoostError
from shared.models import Footprint, Manifest, Profile
from shared.repository import Repository

log = structlog.get_logger(__name__)

_WAIT_S: Final = 0.25
"""A planning waits so long for sizes on a new kind of device: a registry that hangs must not hold
up the cycle."""
_AT_ONCE: Final = 8


class Sizes:
    """Asks the repository once for each active model and kind of device, and writes it there."""

    def __init__(self, repository: Repository, knowledge: Knowledge) -> None:
        self._repository = repository
        self._knowledge = knowledge
        self._kinds: frozenset[str] = frozenset()
        """Of devices for which all that was active has been looked up."""
        self._under_way: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Sizes on {sorted(self._kinds)}, {len(self._under_way)} under way>"

    async def learn(self, active: Active, kinds: AbstractSet[str]) -> None:
        """Finds out what the model has in common with others, or a burst of fine-tunes would count
        in full until each was loaded and push out what has room; and what it measured on these
        kinds of device. What cannot be read is asked for again at the next occasion."""
        manifest, new = active.manifest, sorted(kinds - active.profiled)
        if manifest is None or (active.looked_into and not new):
            return
        read_profile = self._repository.profiles.get
        try:
            estimate, found = await asyncio.gather(
                self._estimate(active, manifest),
                asyncio.gather(*(to_thread(read_profile, manifest.id, kind) for kind in new)),
            )
        except RoostError as error:
            log.warning("not_looked_into", model=manifest.id, error=str(error))
            return
        if not active.looked_into:
            active.estimate, active.looked_into = estimate, True
        active.profiled |= kinds
        sizes = {
            kind: _size(manifest, active.estimate, profile)
            for kind, profile in zip(new, found, strict=True)
            if profile is not None
        }
        if sizes:
            active.known = {**sizes, **active.known}  # what a worker here says is newer

    async def complete(self) -> None:
        """When workers with another kind of device have come, the first ones among them: looks up
        all that is active, what has no copy first. Returns after a moment in any case."""
        kinds = frozenset(self._knowledge.device_kinds())
        if kinds <= self._kinds:
            return
        self._kinds |= kinds
        task = asyncio.create_task(self._learn_all(kinds), name="sizes on new devices")
        self._under_way.add(task)
        task.add_done_callback(self._learnt)
        await asyncio.wait({task}, timeout=_WAIT_S)

    async def close(self) -> None:
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- parts ------------------------------------------------------------------------------

    async def _estimate(self, active: Active, manifest: Manifest) -> Footprint | None:
        if active.looked_into:
            return active.estimate
        return await to_thread(self._repository.estimate, manifest)

    async def _learn_all(self, kinds: AbstractSet[str]) -> None:
        room = asyncio.Semaphore(_AT_ONCE)

        async def learn(active: Active) -> None:
            async with room:
                await self.learn(active, kinds)

        copies, models = self._knowledge.copies, self._knowledge.active
        async with asyncio.TaskGroup() as group:
            for model in sorted(models, key=lambda model: copies(model) > 0):
                group.create_task(learn(models[model]))

    def _learnt(self, done: asyncio.Task[None]) -> None:
        self._under_way.discard(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.error("sizes_not_learnt", exc_info=error)


def _size(manifest: Manifest, estimate: Footprint | None, profile: Profile) -> Footprint:
    """Shares are counted in whole blocks, so the weights are not less than those."""
    return Footprint(
        max(profile.weights_bytes, 0 if estimate is None else estimate.weights_bytes),
        profile.workspace_bytes,
        shares=() if estimate is None else estimate.shares,
        pinned=manifest.stateful,
    )
