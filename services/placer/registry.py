"""Follows the registry: new versions take over a model's name, removed ones are let go, and
what is to have copies at all times gets them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from services.placer.activate import Activator
from services.placer.aliases import AliasKeeper
from services.placer.core.plan import Retire
from services.placer.knowledge import Knowledge
from services.placer.sizes import Sizes
from shared.aliases import DEFAULT
from shared.catalog import Catalog
from shared.errors import Internal, ModelNotFound, Quarantined, RoostError
from shared.models import Manifest
from shared.names import ModelId, split_model_id
from shared.nvmetrics import Failures
from shared.store.port import TOPIC_REGISTRY, Store

log = structlog.get_logger(__name__)

_FULL_LOOK_S = 60.0
"""How often all registered models are looked through without a hint: that costs O(registered)
time, and memory only for those that are to have copies."""
_ONE_BY_ONE = 200
"""Up to so many active models are asked for one by one."""


class RegistryFollower:
    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        knowledge: Knowledge,
        activator: Activator,
        sizes: Sizes,
        aliases: AliasKeeper,
        check_s: float,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._knowledge = knowledge
        self._activator = activator
        self._sizes = sizes
        self._aliases = aliases
        self._check_s = check_s
        self._hinted = asyncio.Event()
        self.series: Failures | None = None
        """Whose series of versions that are gone go too."""
        self.quarantined: Callable[[int], None] = lambda _: None
        """Told how many versions are quarantined, whenever that was looked at."""

    async def run(self) -> None:
        """For ever."""
        looked = float("-inf")
        while True:
            hinted = self._hinted.is_set()
            self._hinted.clear()
            try:
                if hinted:
                    self._catalog.invalidate()
                await self.check_active()
                if hinted or time.monotonic() - looked >= _FULL_LOOK_S:
                    looked = time.monotonic()
                    await self.keep_minimum()
                    await self.forget_series()
            except RoostError as error:
                log.warning("registry_not_followed", error=str(error))
            try:
                async with asyncio.timeout(self._check_s):
                    await self._hinted.wait()
            except TimeoutError:
                continue

    async def listen(self) -> None:
        """For ever: a registration or removal is looked at at once."""
        async for _ in self._store.hints(TOPIC_REGISTRY):
            self._hinted.set()

    async def check_active(self) -> None:
        """What is active, and what of it is the default version of its name. Raises `Unavailable`
        when the registry is away."""
        await self._aliases.follow()
        self._knowledge.bound_tenants(await self._catalog.quotas())
        self.quarantined(len(await self._catalog.quarantined()))
        registered, default_of = await self._all_at_once()
        kinds = self._knowledge.device_kinds()
        for model in list(self._knowledge.active):
            name, version = split_model_id(model)
            try:
                manifest = registered.get(model) or await self._catalog.get(name, version)
                default = default_of.get(name) or await self._catalog.get(name)
                await self._catalog.check_runnable(model)
            except (ModelNotFound, Quarantined) as error:
                self._let_go(model, error)
                continue
            except Internal as error:
                # One broken manifest holds up nobody else.
                log.warning("manifest_broken", model=model, error=str(error))
                continue
            active = self._knowledge.active.get(model)
            if active is not None and active.manifest is None:
                active.manifest = manifest
            if active is not None:  # of an earlier placer's, what was not activated here
                await self._sizes.learn(active, kinds)
            # The cycle moves the key `<name>`: away from the old version's queue first.
            if self._knowledge.defaults.get(name) != default.version:
                self._knowledge.defaults[name] = default.version
                self._knowledge.note("default version", default.id)
        names = {split_model_id(model)[0] for model in self._knowledge.active}
        for name in self._knowledge.defaults.keys() - names:
            del self._knowledge.defaults[name]

    async def keep_minimum(self) -> None:
        """Activates versions that are to have copies at all times, as long as their model's name
        or an alias leads to them."""
        quarantined = await self._catalog.quarantined()
        for manifest in await self._catalog.standing():
            model = manifest.id
            idle = model not in self._knowledge.active and model not in quarantined
            if idle and await self._is_meant(model):
                try:
                    await self._activator.activate(manifest, why="min_copies")
                except RoostError as error:
                    log.warning("minimum_not_kept", model=model, error=str(error))

    async def forget_series(self) -> None:
        """Of versions that were removed."""
        if self.series is None:
            return
        for model in self.series.models():
            if not await self._catalog.registered(model):
                self.series.forget([model])

    async def _is_meant(self, model: ModelId) -> bool:
        """Whether its model's name or an alias leads to it."""
        if self._knowledge.names.mean(model):
            return True
        try:
            return (await self._catalog.get(split_model_id(model)[0])).id == model
        except ModelNotFound:  # removed meanwhile
            return False

    async def _all_at_once(self) -> tuple[dict[ModelId, Manifest], dict[str, Manifest]]:
        """Every version, and the default one of every name, where one pass over the registry is
        cheaper than a question for each active model."""
        if len(self._knowledge.active) <= _ONE_BY_ONE:
            return {}, {}
        manifests = await self._catalog.ids()
        return {manifest.id: manifest for manifest in manifests}, await self._defaults(manifests)

    async def _defaults(self, manifests: list[Manifest]) -> dict[str, Manifest]:
        """Of all versions, sorted, those that their model's bare name means."""
        found = {manifest.name: manifest for manifest in manifests}
        for name, known in (await self._catalog.all_aliases()).items():
            if name in found and known.split_of(DEFAULT) is not None:
                with contextlib.suppress(ModelNotFound):  # on a bucket it may have gone unseen
                    found[name] = await self._catalog.get(name)
        return found

    def _let_go(self, model: ModelId, error: ModelNotFound | Quarantined) -> None:
        log.info("model_let_go", model=model, why=error.message)
        self._knowledge.retire(Retire(model, error.message, code=error.code))
