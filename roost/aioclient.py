"""The Python client for asyncio; `roost.client` says what each method does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from roost.calls.bodies import digest_of, pieces_of, read_aside
from roost.calls.call import Array, Ids, Items, Outputs, Progress, Split
from roost.calls.calls import Calls
from roost.calls.sending import AsyncSender, options_of
from shared.errors import Unavailable
from shared.models import Manifest, ModelSpec
from shared.tenants import Quota


class AsyncRoostClient:
    """`RoostClient` for asyncio."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> None:
        """See `RoostClient`."""
        self._calls = Calls(url)
        self._sender = AsyncSender(url, options_of(url, api_key, ca_file, cert_file, key_file))
        self._do = self._sender.do

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._sender.close()

    async def push(
        self,
        name: str,
        file: str | Path,
        version: int | str | None = None,
        spec: ModelSpec | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """See `RoostClient.push`."""
        path = Path(file)
        self._calls.register(name, version, "", None)  # checks name and version
        digest, size = await asyncio.to_thread(digest_of, path)
        if not await self._do(self._calls.has_blob(digest)):
            pieces = read_aside(pieces_of(path, size, progress))
            await self._do(self._calls.put_blob(digest, size, pieces))
        return await self._do(self._calls.register(name, version, digest, spec))

    async def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
    ) -> dict[str, Array]:
        """See `RoostClient.infer`."""
        return await self._do(self._calls.infer(name, inputs, version, timeout_s, outputs))

    async def submit(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """See `RoostClient.submit`."""
        return await self._do(
            self._calls.submit(name, inputs, version, timeout_s, outputs, idempotency_key)
        )

    async def job(self, id_: str) -> dict[str, Any]:
        """See `RoostClient.job`."""
        return await self._do(self._calls.job(id_))

    async def result(self, id_: str, wait_s: float | None = 0) -> dict[str, Array]:
        """See `RoostClient.result`."""
        return await self._sender.wait(self._calls.result(id_), wait_s)

    async def cancel(self, id_: str) -> None:
        """See `RoostClient.cancel`."""
        await self._do(self._calls.cancel(id_))

    async def list(self) -> list[dict[str, Any]]:
        """See `RoostClient.list`."""
        return await self._do(self._calls.list())

    async def remove(self, name: str, version: int | str | None = None) -> None:
        """See `RoostClient.remove`."""
        await self._do(self._calls.remove(name, version))

    async def unload(self, name: str) -> None:
        """See `RoostClient.unload`."""
        await self._do(self._calls.unload(name))

    async def load(self, name: str) -> None:
        """See `RoostClient.load`."""
        await self._do(self._calls.load(name))

    async def aliases(self, name: str) -> Items:
        """See `RoostClient.aliases`."""
        return await self._do(self._calls.aliases(name))

    async def set_alias(
        self, name: str, alias: str, to: int | str | Split, *, now: bool = False
    ) -> dict[str, Any]:
        """See `RoostClient.set_alias`."""
        return await self._do(self._calls.set_alias(name, alias, to, now=now))

    async def quarantined(self) -> Items:
        """See `RoostClient.quarantined`."""
        return await self._do(self._calls.quarantined())

    async def release(self, name: str, version: int | str | None = None) -> Ids:
        """See `RoostClient.release`."""
        return await self._do(self._calls.release(name, version))

    async def list_keys(self) -> Items:
        """See `RoostClient.list_keys`."""
        return await self._do(self._calls.list_keys())

    async def create_key(
        self,
        tenant: str = "",
        scopes: Sequence[str] = ("infer",),
        *,
        lifetime_s: float | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """See `RoostClient.create_key`."""
        return await self._do(self._calls.create_key(tenant, scopes, lifetime_s, note))

    async def revoke_key(self, id_: str) -> None:
        """See `RoostClient.revoke_key`."""
        await self._do(self._calls.revoke_key(id_))

    async def tenants(self) -> Items:
        """See `RoostClient.tenants`."""
        return await self._do(self._calls.tenants())

    async def set_tenant(self, name: str, quota: Quota) -> None:
        """See `RoostClient.set_tenant`."""
        await self._do(self._calls.set_tenant(name, quota))

    async def remove_tenant(self, name: str) -> None:
        """See `RoostClient.remove_tenant`."""
        await self._do(self._calls.remove_tenant(name))

    async def remove_alias(self, name: str, alias: str) -> None:
        """See `RoostClient.remove_alias`."""
        await self._do(self._calls.remove_alias(name, alias))

    async def metadata(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """See `RoostClient.metadata`."""
        return await self._do(self._calls.metadata(name, version))

    async def ready(self) -> bool:
        """See `RoostClient.ready`."""
        try:
            return await self._do(self._calls.ready())
        except Unavailable:
            return False
