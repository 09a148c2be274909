"""Tenants: who owns models and asks them, and how much of the fleet each may take.

`tenants/<name>.json` in the registry says so of one tenant: it survives every restart, and
gateways, placer and workers all look at the registry anyway. A tenant without a file has no
bounds and the share of everybody else. Models belong to the tenant of whoever registered them
(`Manifest.tenant`); those of nobody (`""`) are everybody's to ask.
"""

from __future__ import annotations

import contextlib
from typing import Final

import msgspec
import structlog

from shared.errors import InvalidRequest
from shared.quotas import UNBOUNDED, Quota, check_tenant
from shared.storage import Storage

__all__ = ["UNBOUNDED", "Quota", "Tenants", "check_tenant"]

TENANTS: Final = "tenants"
_SUFFIX: Final = ".json"

log = structlog.get_logger(__name__)


class Tenants:
    """Those of one storage. May be called from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, name: str, quota: Quota) -> None:
        """Replaces what was said of the tenant. Durable on return."""
        self._storage.replace(_path(check_tenant(name)), msgspec.json.encode(quota))

    def remove(self, name: str) -> bool:
        """Whether anything was said of the tenant. Its models and keys stay."""
        with contextlib.suppress(FileNotFoundError):
            self._storage.remove(_path(check_tenant(name)))
            return True
        return False

    def quotas(self) -> dict[str, Quota]:
        """By tenant. A file that cannot be read is left out, which is logged. Raises
        `Unavailable`."""
        paths = {}
        for entry in self._storage.find(TENANTS, 0):
            name = entry.path.rpartition("/")[2].removesuffix(_SUFFIX)
            with contextlib.suppress(InvalidRequest):  # a file that is not ours
                paths[entry.path] = check_tenant(name)
        found = {}
        for path, data in self._storage.read_many(paths).items():
            try:
                found[paths[path]] = msgspec.json.decode(data, type=Quota)
            except (ValueError, RecursionError, InvalidRequest) as error:
                log.warning("tenant_skipped", path=path, error=str(error))
        return found


def _path(name: str) -> str:
    return f"{TENANTS}/{name}{_SUFFIX}"
