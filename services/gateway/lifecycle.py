"""Loading and unloading, as Triton's clients mean it.

Here a registered model needs no loading: a request brings it in. So `load` takes an `unload`
back, registers what the client brings along, and answers when the model can be asked, through
this gateway and as far as it can be known through the others. `unload` is kept in the registry
(docs/adr/0015): every gateway and the placer refuse the model until it is loaded again.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
import structlog

from services.gateway.callers import Callers
from services.gateway.overrides import Loading
from services.gateway.registry import Registration, Registry
from shared.catalog import NEGATIVE_TTL_S, TTL_S
from shared.errors import InvalidRequest, ModelNotFound
from shared.models import ModelSpec
from shared.names import ModelId
from shared.quarantine import Held
from shared.repository import Repository

log = structlog.get_logger(__name__)

_MARGIN_S: Final = 0.05


class Lifecycle:
    def __init__(self, repository: Repository, registry: Registry, callers: Callers) -> None:
        self._callers = callers
        self._repository = repository
        self._registry = registry

    async def load(self, name: str, loading: Loading) -> None:
        """Returns when the model can be asked. Raises `ModelNotFound`, `PermissionDenied`;
        `InvalidRequest`, `AlreadyExists` for what the client brings along."""
        if loading.config is not None:
            with self._registry.counted():
                await self._register(name, loading)
        else:
            await self._callers.check_change(name)
        was_unloaded = await asyncio.to_thread(self._repository.load, name)
        if was_unloaded:
            log.info("model_loaded", model=name)
        if was_unloaded or loading.config is not None:
            hinted = await self._registry.changed(name)
            # Others believe what they knew until the hint has come, or that is old.
            await asyncio.sleep((NEGATIVE_TTL_S if hinted else TTL_S) + _MARGIN_S)

    async def unload(self, name: str) -> None:
        """Returns when it is written down. What runs is finished. Raises `ModelNotFound`,
        `PermissionDenied`."""
        await self._callers.check_change(name)
        await asyncio.to_thread(self._repository.unload, name)
        log.info("model_unloaded", model=name)
        await self._registry.changed(name)

    async def quarantined(self) -> list[Held]:
        """The versions that are kept from all engines, the latest first; not from a cache."""
        found = await asyncio.to_thread(self._repository.quarantined)
        return sorted(found.values(), key=lambda held: (-held.since, held.model))

    async def release(self, name: str, version: int | None) -> list[ModelId]:
        """Takes a version, or all of a model, out of quarantine; returns which, when they can be
        asked: none, where none was in it. Raises `ModelNotFound`."""
        released = await asyncio.to_thread(self._repository.release, name, version)
        if released:
            log.info("quarantine_released", models=released)
            hinted = await self._registry.changed(name)
            await asyncio.sleep((NEGATIVE_TTL_S if hinted else TTL_S) + _MARGIN_S)
        return released

    async def _register(self, name: str, loading: Loading) -> None:
        tenant, present, digest = await self._newest(name, new=bool(loading.files))
        assert loading.config is not None
        if loading.files:  # they say themselves what they are
            present = msgspec.structs.replace(present, format=msgspec.UNSET)
        spec = loading.config.spec(name, present)
        if not loading.files:
            if digest is None:
                raise ModelNotFound(f"model {name!r} is not registered")
            await self._registry.register(name, None, Registration(digest, spec), tenant)
            return
        for file in loading.files:
            stored, _ = await asyncio.to_thread(self._repository.files.put, file.pieces())
            said = Registration(stored, spec)
            try:
                await self._registry.register(name, file.version, said, tenant)
            except InvalidRequest as error:
                raise InvalidRequest(f"version {file.version}: {error.message}") from None

    async def _newest(self, name: str, *, new: bool) -> tuple[str | None, ModelSpec, str | None]:
        """For whom it is registered; and what is known of the model so far, as far as a Triton
        configuration does not say it. Raises as `Callers.check_change`, but for what is not there
        (for this caller), of which nothing is known."""
        tenant = None
        try:
            tenant = await self._callers.check_change(name, new=new)
            manifest = await asyncio.to_thread(self._repository.versions.manifest, name)
        except ModelNotFound:
            return tenant, ModelSpec(), None
        fields = {field: getattr(manifest, field) for field in ModelSpec.__struct_fields__}
        return tenant, ModelSpec(**fields), manifest.digest
