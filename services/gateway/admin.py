"""API keys and tenants over HTTP, for whoever administrates. The first key is made on the
repository itself (`roost key create`): while no key is asked for, anybody could make one here, and
would still have it when keys are asked for."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.body import stream_body
from services.gateway.callers import Following, asking
from services.gateway.config import GatewayConfig
from services.gateway.table import Row
from shared.errors import InvalidRequest, ModelNotFound, PermissionDenied
from shared.keys import Key, Scope, new_key
from shared.repository import Repository
from shared.tenants import Quota, check_tenant

log = structlog.get_logger(__name__)

T = TypeVar("T")

_BODY_BYTES: Final = 64 * 1024


class KeyWish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a new key is to be."""

    tenant: str = ""
    """Empty: nobody's in particular."""
    scopes: tuple[Scope, ...] = ("infer",)
    lifetime_s: float | None = None
    """None: until it is revoked."""
    note: str = ""


class Admin:
    """Handlers for the router. Each raises `RoostError`."""

    def __init__(self, config: GatewayConfig, repository: Repository, following: Following) -> None:
        self._config = config
        self._repository = repository
        self._following = following

    def table(self) -> list[Row]:
        return [
            ("GET", "/v2/repository/keys", "admin", self.keys),
            ("POST", "/v2/repository/keys", "admin", self.create_key),
            ("DELETE", "/v2/repository/keys/{key}", "admin", self.revoke_key),
            ("GET", "/v2/repository/tenants", "admin", self.tenants),
            ("PUT", "/v2/repository/tenants/{tenant}", "admin", self.put_tenant),
            ("DELETE", "/v2/repository/tenants/{tenant}", "admin", self.remove_tenant),
        ]

    async def keys(self, _: Request) -> Response:
        _check_keyed()
        table = await asyncio.to_thread(self._repository.keys.look)
        found = sorted(table.keys.values(), key=lambda key: (key.created, key.id))
        return _json({"keys": [shown(key) for key in found]})

    async def create_key(self, request: Request) -> Response:
        """The only answer that ever has the key itself."""
        _check_keyed()
        wish = await self._read(request, KeyWish)
        key, token = new_key(wish.tenant, wish.scopes, lifetime_s=wish.lifetime_s, note=wish.note)
        await asyncio.to_thread(self._repository.keys.add, key)
        log.info("key_created", id=key.id, tenant=key.tenant, scopes=key.scopes)
        return _json({**shown(key), "key": token}, 201, {"cache-control": "no-store"})

    async def revoke_key(self, request: Request) -> Response:
        _check_keyed()
        key = await asyncio.to_thread(self._repository.keys.revoke, request.path_params["key"])
        log.info("key_revoked", id=key.id, tenant=key.tenant)
        return Response(status_code=204)

    async def tenants(self, _: Request) -> Response:
        quotas = await asyncio.to_thread(self._repository.tenants.quotas)
        return _json(
            {"tenants": [{"tenant": name, "quota": quotas[name]} for name in sorted(quotas)]}
        )

    async def put_tenant(self, request: Request) -> Response:
        name = check_tenant(request.path_params["tenant"])
        quota = await self._read(request, Quota)
        await asyncio.to_thread(self._repository.tenants.put, name, quota)
        log.info("tenant_set", tenant=name, quota=msgspec.to_builtins(quota))
        await self._following.look_again()
        return _json({"tenant": name, "quota": quota})

    async def remove_tenant(self, request: Request) -> Response:
        name = check_tenant(request.path_params["tenant"])
        if not await asyncio.to_thread(self._repository.tenants.remove, name):
            raise ModelNotFound(f"nothing is said of tenant {name!r}")
        log.info("tenant_removed", tenant=name)
        await self._following.look_again()
        return Response(status_code=204)

    async def _read(self, request: Request, kind: type[T]) -> T:
        pieces = stream_body(
            request.receive, limit_bytes=_BODY_BYTES, timeout_s=self._config.body_timeout_s
        )
        body = b"".join([piece async for piece in pieces])
        try:
            return msgspec.json.decode(body, type=kind)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise InvalidRequest(f"the request is not valid: {str(error)[:300]}") from None


def shown(key: Key) -> dict[str, Any]:
    """A key for people and programs: all but its digest."""
    told: dict[str, Any] = msgspec.to_builtins(key)
    del told["sha256"]
    return told


def _check_keyed() -> None:
    if not asking().key:
        raise PermissionDenied(
            "no API keys are asked for: make the first one with `roost key create`, on the "
            "repository itself"
        )


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")
