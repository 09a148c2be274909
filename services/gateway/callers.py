"""Who asks, known to everything that happens for a request.

Protocols tell a caller by its headers or metadata; from then on it stands in a context variable,
so that nothing on a request's way can forget to hand it on: the catalog shows models by it, whose
`sees` is below. Where nobody asks (the gateway's own tasks), every model is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Final

import msgspec
import structlog

from services.gateway.asked import Tenants
from services.gateway.core.admission import Admission
from services.gateway.metrics import Metrics
from shared.auth import ANYBODY, LOOK_S, Caller, Gate, Need
from shared.catalog import Catalog
from shared.errors import (
    ModelNotFound,
    PermissionDenied,
    RoostError,
    Unauthenticated,
    Unavailable,
)
from shared.models import Manifest
from shared.registrar import taken
from shared.repository import Repository
from shared.tenants import check_tenant

log = structlog.get_logger(__name__)

_AUTHORIZATION: Final = b"authorization"
_asking: ContextVar[Caller] = ContextVar("asking", default=ANYBODY)


def asking() -> Caller:
    """Whoever is asking now."""
    return _asking.get()


@contextlib.contextmanager
def asked_by(caller: Caller) -> Iterator[None]:
    """What happens inside happens for this caller."""
    token = _asking.set(caller)
    try:
        yield
    finally:
        _asking.reset(token)


def sees(manifest: Manifest) -> bool:
    """Whether this model exists for whoever is asking."""
    caller = _asking.get()
    return not caller.confined or manifest.tenant in {"", caller.tenant}


class Callers:
    """One per gateway."""

    def __init__(
        self, gate: Gate, tenant_header: str, repository: Repository, metrics: Metrics
    ) -> None:
        self._gate = gate
        self._tenants = Tenants(tenant_header)
        self._repository = repository
        self._metrics = metrics

    async def admit(self, headers: Mapping[bytes, bytes], need: Need) -> Caller:
        """Who asks with these headers (lower case). Raises `Unauthenticated`,
        `PermissionDenied`, `Unavailable`; `InvalidRequest` for what is no tenant's name."""
        if need == "open":
            return ANYBODY
        try:
            caller = await self._gate.caller(headers.get(_AUTHORIZATION), need)
        except (Unauthenticated, PermissionDenied, Unavailable) as error:
            self._metrics.denied(error.code)
            raise
        if caller.tenant:
            return caller
        told = self._tenants.of(headers)
        if not told:
            return caller
        if not caller.key:  # somebody else has authenticated them
            return Caller(told)
        # Whoever may ask everybody's models may speak for anybody.
        return msgspec.structs.replace(caller, tenant=check_tenant(told), confined=True)

    def for_job(self, tenant: str) -> Caller:
        """As whom a job of this tenant runs, when nobody asks any more."""
        return Caller(tenant, confined=bool(tenant) and self._gate.required)

    async def check_change(self, name: str, *, new: bool = False) -> str | None:
        """Whether whoever is asking may change this model, or register it if `new`; returns for
        whom a new version would be (`Repository.register`).

        Raises `ModelNotFound` for what does not exist for the caller, but `AlreadyExists` if
        `new`: two cannot have one name. `PermissionDenied` for what is not its own.
        """
        caller = asking()
        if not caller.key:
            return None
        owner = await asyncio.to_thread(self._repository.versions.owner, name)
        whole = caller.admin and not caller.confined
        mine: str | None = None if whole else caller.tenant
        if owner is None or owner == caller.tenant or whole:
            return mine
        if caller.confined and owner:
            raise taken(name) if new else ModelNotFound(f"model {name!r} is not registered")
        whose = f"tenant {owner!r}'s" if owner else "nobody's in particular"
        raise PermissionDenied(f"model {name!r} is {whose}: this API key may not change it")


class Following:
    """Keeps what admission and metrics know of tenants as the registry has it."""

    def __init__(
        self, gate: Gate, catalog: Catalog, admission: Admission, metrics: Metrics
    ) -> None:
        self._gate = gate
        self._catalog = catalog
        self._admission = admission
        self._metrics = metrics

    async def run(self) -> None:
        """Never returns. While the registry is away, what was known holds."""
        while True:
            with contextlib.suppress(RoostError):
                await self.look()
            await asyncio.sleep(LOOK_S)

    async def look_again(self) -> None:
        """What was just written holds at this gateway. Raises `Unavailable`."""
        self._catalog.invalidate(None)
        await self.look()

    async def look(self) -> None:
        """Once. Raises `Unavailable`."""
        quotas = await self._catalog.quotas()
        self._admission.set_quotas(quotas, time.monotonic())
        keys = self._gate.table.keys.values()
        self._metrics.name_tenants({*quotas, *(key.tenant for key in keys if key.tenant)})
