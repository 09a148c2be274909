"""What the gateway tells of models: metadata, configuration, readiness, the repository index.

All of it from the registry, which is durable; where models are is added from the workers'
reports, and left out while the store is away.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

import structlog

from services.gateway.callers import asking
from services.gateway.core.placement import UNPLACED, Placement, placements
from shared.catalog import Catalog
from shared.models import Format, Manifest, TensorSpec
from shared.names import ModelId
from shared.quarantine import Held
from shared.repository import Repository
from shared.sharing import SharedBytes
from shared.store.port import Store, StoreUnavailable

log = structlog.get_logger(__name__)

NAME: Final = "roost"
VERSION: Final = "0.1.0"
EXTENSIONS: Final = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""The protocol's extensions that are there, by the names that clients look for."""
PLATFORM: Final[dict[Format, str]] = {
    "torchscript": "pytorch_libtorch",
    "export": "torch_export",
    "aotinductor": "torch_aoti",
}
_REPORTS_TTL_S: Final = 0.5
"""Pollers of readiness must not become load on the store."""


class Status:
    """Answers about models, as plain data for JSON."""

    def __init__(self, repository: Repository, catalog: Catalog, store: Store) -> None:
        self._repository = repository
        self._catalog = catalog
        self._store = store
        self._placements: dict[ModelId, Placement] | None = None
        self._read_at = 0.0

    def server(self) -> dict[str, Any]:
        return {"name": NAME, "version": VERSION, "extensions": list(EXTENSIONS)}

    async def metadata(self, name: str, version: int | None) -> dict[str, Any]:
        """The protocol's model metadata. Raises `ModelNotFound`."""
        manifest = await self._catalog.get(name, version)
        versions = [version] if version is not None else await self.versions(name)
        batched = manifest.max_batch_size > 0
        return {
            "name": manifest.name,
            "versions": [str(each) for each in versions],
            "platform": PLATFORM[manifest.format],
            "inputs": [_tensor(spec, batched=batched) for spec in manifest.inputs or ()],
            "outputs": [_tensor(spec, batched=batched) for spec in manifest.outputs or ()],
        }

    async def versions(self, name: str) -> list[int]:
        """Those that can be asked, ascending. Raises `ModelNotFound` when none can."""
        await self._catalog.get(name)
        return await asyncio.to_thread(self._repository.versions.numbers, name)

    async def configuration(self, name: str, version: int | None) -> dict[str, Any]:
        """Triton's ModelConfig, as far as it says something here. Raises `ModelNotFound`."""
        manifest = await self._catalog.get(name, version)
        config: dict[str, Any] = {
            "name": manifest.name,
            "platform": PLATFORM[manifest.format],
            "backend": "pytorch",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": manifest.max_batch_size,
            "input": [
                _config_tensor(spec) | {"optional": spec.optional} for spec in manifest.inputs or ()
            ],
            "output": [_config_tensor(spec) for spec in manifest.outputs or ()],
            "parameters": {
                key: {"string_value": str(value)} for key, value in manifest.parameters.items()
            },
        }
        if manifest.max_batch_size:
            config["dynamic_batching"] = {
                "preferred_batch_size": list(manifest.preferred_batch_size),
                "max_queue_delay_microseconds": manifest.max_queue_delay_us,
                "default_priority_level": manifest.default_priority_level,
            }
        return config

    async def readiness(self, name: str, version: int | None) -> tuple[bool, str]:
        """Whether a request can be answered, and where the model is or why not. A model on
        disk is ready: the request itself brings it in. Raises `ModelNotFound`."""
        manifest = await self._catalog.get(name, version)
        held = (await self._catalog.quarantined()).get(manifest.id)
        if held is not None:
            return False, held.error().message
        where = await self._where()
        if where is None:
            return True, ""
        place = where.get(manifest.id, UNPLACED)
        return place.servable, str(place)

    async def index(self, *, ready_only: bool) -> list[dict[str, Any]]:
        """The repository index: every version of every model."""
        where = await self._where()
        manifests, sharing, unloaded, held = await asyncio.gather(
            self._catalog.ids(even_unloaded=True),
            self._catalog.sharing(),
            self._catalog.unloaded(),
            self._catalog.quarantined(),
        )
        items = [
            _index_item(
                manifest,
                where,
                sharing,
                unloaded=manifest.name in unloaded,
                held=held.get(manifest.id),
            )
            for manifest in manifests
        ]
        return [item for item in items if not ready_only or item["state"] == "READY"]

    async def detail(self, name: str) -> dict[str, Any]:
        """All that is known of one model, by version. Raises `ModelNotFound`."""
        await self._catalog.get(name, even_unloaded=True)  # raises when there is none
        unloaded = name in await self._catalog.unloaded()
        versions = await asyncio.to_thread(self._repository.versions.numbers, name)
        where = await self._where()
        sharing = await self._catalog.sharing()
        quarantined = await self._catalog.quarantined()
        found = []
        for version in versions:
            manifest = await self._catalog.get(name, version, even_unloaded=True)
            place = (where or {}).get(manifest.id, UNPLACED)
            held = quarantined.get(manifest.id)
            found.append(
                {
                    **_index_item(manifest, where, sharing, unloaded=unloaded, held=held),
                    "manifest": manifest,
                    "device": place.device,
                    "host": place.host,
                    "bound": place.bound,
                    "device_bytes": place.device_bytes,
                    "failed": place.failed,
                }
            )
        return {"name": name, "versions": found}

    async def memory(self) -> dict[ModelId, list[dict[str, Any]]]:
        """What each model takes of all workers' devices, as Triton's statistics tell it."""
        return {
            model: [
                {"type": kind, "id": 0, "byte_size": nbytes}
                for kind, nbytes in sorted(place.bytes_of.items())
            ]
            for model, place in (await self._where() or {}).items()
        }

    async def _where(self) -> dict[ModelId, Placement] | None:
        """None while the store is away."""
        now = time.monotonic()
        if self._placements is None or now - self._read_at > _REPORTS_TTL_S:
            try:
                self._placements = placements(await self._store.reports())
            except StoreUnavailable as error:
                log.warning("reports_unavailable", error=str(error))
                self._placements = None
            self._read_at = now
        return self._placements


def _index_item(
    manifest: Manifest,
    where: dict[ModelId, Placement] | None,
    sharing: Mapping[ModelId, SharedBytes],
    *,
    unloaded: bool,
    held: Held | None,
) -> dict[str, Any]:
    place = (where or {}).get(manifest.id, UNPLACED)
    # A version that was registered since the bytes were counted has them to itself so far; and what
    # it shares with models that the caller may not see is none of the caller's business.
    known = None if asking().confined else sharing.get(manifest.id)
    divided = known or SharedBytes(manifest.size_bytes, 0)
    reason = str(place) if where is not None else ""
    if unloaded:
        reason = "unloaded"  # Triton's own word for it
    elif held is not None:
        reason = f"quarantined: {held.reason}"
    asked = place.servable and not unloaded and held is None
    return {
        "name": manifest.name,
        "version": str(manifest.version),
        "state": "READY" if asked else "UNAVAILABLE",
        "reason": reason,
        "tiers": place.tiers,
        "size_bytes": manifest.size_bytes,
        "own_bytes": divided.own_bytes,
        "shared_bytes": divided.shared_bytes,
    }


def _tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    shape = [-1, *spec.shape] if batched else list(spec.shape)
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}


def _config_tensor(spec: TensorSpec) -> dict[str, Any]:
    kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape)}
