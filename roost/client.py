"""A small Python client: register models, list them, ask them.

    with RoostClient("http://127.0.0.1:8000") as roost:
        roost.push("adder", "adder.pt")
        outputs = roost.infer("adder", {"x": np.ones((1, 3), np.float32)})

`AsyncRoostClient` has the same methods as coroutines. Every refusal is raised as one of
`shared.errors`; no answer at all is `Unavailable`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from roost.calls import (
    UPLOAD_TIMEOUT,
    Array,
    Calls,
    Ids,
    Items,
    Outputs,
    Progress,
    Split,
    alias_wish,
    arrays,
    authorization,
    checked,
    digest_of,
    no_answer,
    pieces_of,
    timeout_of,
)
from roost.trust import verify
from shared.errors import Unavailable
from shared.models import Manifest, ModelSpec
from shared.tenants import Quota


class RoostClient:
    """A connection pool to one gateway. Use it as a context manager, or `close` it."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> None:
        """`api_key`: for a gateway that asks for one. `ca_file`: who may sign the certificate of an
        `https://` URL; `cert_file`, `key_file`: what is shown to a gateway that asks for one. What
        is not given comes from `ROOST_API_KEY`, `ROOST_CA_FILE`, `ROOST_CERT_FILE` and
        `ROOST_KEY_FILE`."""
        self._calls = Calls(url)
        trusted = verify(url, ca_file, cert_file, key_file)
        self._http = httpx.Client(
            timeout=60.0, trust_env=False, verify=trusted, headers=authorization(api_key)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def push(
        self,
        name: str,
        file: str | Path,
        version: int | str | None = None,
        spec: ModelSpec | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Registers a model file and returns its manifest; `version` None is the next one.

        The file is sent only when the repository does not have it yet. Raises
        `AlreadyExists` when the version is there with other content.
        """
        path = Path(file)
        method, url, _ = self._calls.register(name, version, "", None)  # checks name and version
        digest, size = digest_of(path)
        if self._send("HEAD", self._calls.blob(digest)).status_code != httpx.codes.OK:
            checked(
                self._send(
                    "PUT",
                    self._calls.blob(digest),
                    content=pieces_of(path, size, progress),
                    headers={"Content-Length": str(size)},
                    timeout=UPLOAD_TIMEOUT,
                )
            )
        _, _, body = self._calls.register(name, version, digest, spec)
        answer = checked(self._send(method, url, content=body, timeout=UPLOAD_TIMEOUT))
        return msgspec.json.decode(answer.content, type=Manifest)

    def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
    ) -> dict[str, Array]:
        """The outputs (all, or those named) by name. `timeout_s` is the request's deadline."""
        body, headers = self._calls.infer(inputs, timeout_s, outputs)
        answer = self._send(
            "POST",
            f"{self._calls.model(name, version)}/infer",
            content=body,
            headers=headers,
            timeout=timeout_of(timeout_s),
        )
        return arrays(checked(answer))

    def list(self) -> list[dict[str, Any]]:
        """The repository index: name, version, state, reason (where it is), size_bytes."""
        index: list[dict[str, Any]] = checked(self._send("GET", self._calls.index())).json()
        return index

    def remove(self, name: str, version: int | str | None = None) -> None:
        """Removes one version, or the whole model."""
        checked(self._send("DELETE", self._calls.stored(name, version)))

    def unload(self, name: str) -> None:
        """Makes the model, all its versions, unavailable until `load`."""
        checked(self._send("POST", f"{self._calls.stored(name)}/unload"))

    def load(self, name: str) -> None:
        """Takes `unload` back; returns when the model can be asked."""
        checked(self._send("POST", f"{self._calls.stored(name)}/load"))

    def aliases(self, name: str) -> Items:
        """Where the model's aliases lead: `alias`, `version`, `split`, and what is `pending`."""
        found: Items = checked(self._send("GET", self._calls.alias(name))).json()["aliases"]
        return found

    def set_alias(
        self, name: str, alias: str, to: int | str | Split, *, now: bool = False
    ) -> dict[str, Any]:
        """Lets the alias lead to a version, or to several by their weights: once they are bound
        as often as what it leads to at present, or `now`. Returns where it leads at first."""
        url, wish = self._calls.alias(name, alias), alias_wish(to, now=now)
        told: dict[str, Any] = checked(self._send("PUT", url, content=wish)).json()
        return told

    def quarantined(self) -> Items:
        """The versions that ended engines and are kept from them: `model`, `reason`, `since`,
        `worker`, `deaths`; the latest first."""
        answer = checked(self._send("GET", self._calls.quarantine()))
        found: Items = answer.json()["quarantined"]
        return found

    def release(self, name: str, version: int | str | None = None) -> Ids:
        """Takes a model, or one version of it, out of quarantine; returns which were in it."""
        answer = checked(self._send("DELETE", self._calls.quarantine(name, version)))
        released: Ids = answer.json()["released"]
        return released

    def list_keys(self) -> Items:
        """All API keys, without what their holders present. Needs one with the scope admin."""
        found: Items = checked(self._send("GET", self._calls.keys())).json()["keys"]
        return found

    def create_key(
        self,
        tenant: str = "",
        scopes: Sequence[str] = ("infer",),
        *,
        lifetime_s: float | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """A new API key: `id`, and `key`, which is told this once. As `list_keys`."""
        body = self._calls.new_key(tenant, scopes, lifetime_s, note)
        told: dict[str, Any] = checked(self._send("POST", self._calls.keys(), content=body)).json()
        return told

    def revoke_key(self, id_: str) -> None:
        """Within two seconds the key is worth nothing at any gateway. As `list_keys`."""
        checked(self._send("DELETE", self._calls.keys(id_)))

    def tenants(self) -> Items:
        """What tenants may take: `tenant` and `quota`. As `list_keys`."""
        found: Items = checked(self._send("GET", self._calls.tenants())).json()["tenants"]
        return found

    def set_tenant(self, name: str, quota: Quota) -> None:
        """From now on the tenant may take this much. As `list_keys`."""
        body = msgspec.json.encode(quota)
        checked(self._send("PUT", self._calls.tenants(name), content=body))

    def remove_tenant(self, name: str) -> None:
        """Nothing bounds the tenant any more; its models and keys stay. As `list_keys`."""
        checked(self._send("DELETE", self._calls.tenants(name)))

    def remove_alias(self, name: str, alias: str) -> None:
        checked(self._send("DELETE", self._calls.alias(name, alias)))

    def metadata(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """The protocol's model metadata: versions, platform, inputs, outputs."""
        answer = checked(self._send("GET", self._calls.model(name, version)))
        metadata: dict[str, Any] = answer.json()
        return metadata

    def ready(self) -> bool:
        """Whether the gateway can take requests now. False also when nothing answers."""
        try:
            answer = self._send("GET", f"{self._calls.url}/v2/health/ready")
        except Unavailable:
            return False
        return answer.status_code == httpx.codes.OK

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, url, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise no_answer(self._calls.url, error) from error


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
        trusted = verify(url, ca_file, cert_file, key_file)
        self._http = httpx.AsyncClient(
            timeout=60.0, trust_env=False, verify=trusted, headers=authorization(api_key)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

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
        method, url, _ = self._calls.register(name, version, "", None)  # checks name and version
        digest, size = await asyncio.to_thread(digest_of, path)
        if (await self._send("HEAD", self._calls.blob(digest))).status_code != httpx.codes.OK:

            async def pieces() -> AsyncIterator[bytes]:
                source = pieces_of(path, size, progress)
                while piece := await asyncio.to_thread(next, source, b""):
                    yield piece

            sent = await self._send(
                "PUT",
                self._calls.blob(digest),
                content=pieces(),
                headers={"Content-Length": str(size)},
                timeout=UPLOAD_TIMEOUT,
            )
            checked(sent)
        _, _, body = self._calls.register(name, version, digest, spec)
        answer = checked(await self._send(method, url, content=body, timeout=UPLOAD_TIMEOUT))
        return msgspec.json.decode(answer.content, type=Manifest)

    async def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
    ) -> dict[str, Array]:
        """See `RoostClient.infer`."""
        body, headers = self._calls.infer(inputs, timeout_s, outputs)
        answer = await self._send(
            "POST",
            f"{self._calls.model(name, version)}/infer",
            content=body,
            headers=headers,
            timeout=timeout_of(timeout_s),
        )
        return arrays(checked(answer))

    async def list(self) -> list[dict[str, Any]]:
        """See `RoostClient.list`."""
        answer = checked(await self._send("GET", self._calls.index()))
        index: list[dict[str, Any]] = answer.json()
        return index

    async def remove(self, name: str, version: int | str | None = None) -> None:
        """See `RoostClient.remove`."""
        checked(await self._send("DELETE", self._calls.stored(name, version)))

    async def unload(self, name: str) -> None:
        """See `RoostClient.unload`."""
        checked(await self._send("POST", f"{self._calls.stored(name)}/unload"))

    async def load(self, name: str) -> None:
        """See `RoostClient.load`."""
        checked(await self._send("POST", f"{self._calls.stored(name)}/load"))

    async def aliases(self, name: str) -> Items:
        """See `RoostClient.aliases`."""
        answer = checked(await self._send("GET", self._calls.alias(name)))
        found: Items = answer.json()["aliases"]
        return found

    async def set_alias(
        self, name: str, alias: str, to: int | str | Split, *, now: bool = False
    ) -> dict[str, Any]:
        """See `RoostClient.set_alias`."""
        url, wish = self._calls.alias(name, alias), alias_wish(to, now=now)
        told: dict[str, Any] = checked(await self._send("PUT", url, content=wish)).json()
        return told

    async def quarantined(self) -> Items:
        """See `RoostClient.quarantined`."""
        answer = checked(await self._send("GET", self._calls.quarantine()))
        found: Items = answer.json()["quarantined"]
        return found

    async def release(self, name: str, version: int | str | None = None) -> Ids:
        """See `RoostClient.release`."""
        answer = checked(await self._send("DELETE", self._calls.quarantine(name, version)))
        released: Ids = answer.json()["released"]
        return released

    async def list_keys(self) -> Items:
        """See `RoostClient.list_keys`."""
        found: Items = checked(await self._send("GET", self._calls.keys())).json()["keys"]
        return found

    async def create_key(
        self,
        tenant: str = "",
        scopes: Sequence[str] = ("infer",),
        *,
        lifetime_s: float | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """See `RoostClient.create_key`."""
        body = self._calls.new_key(tenant, scopes, lifetime_s, note)
        answer = checked(await self._send("POST", self._calls.keys(), content=body))
        told: dict[str, Any] = answer.json()
        return told

    async def revoke_key(self, id_: str) -> None:
        """See `RoostClient.revoke_key`."""
        checked(await self._send("DELETE", self._calls.keys(id_)))

    async def tenants(self) -> Items:
        """See `RoostClient.tenants`."""
        found: Items = checked(await self._send("GET", self._calls.tenants())).json()["tenants"]
        return found

    async def set_tenant(self, name: str, quota: Quota) -> None:
        """See `RoostClient.set_tenant`."""
        body = msgspec.json.encode(quota)
        checked(await self._send("PUT", self._calls.tenants(name), content=body))

    async def remove_tenant(self, name: str) -> None:
        """See `RoostClient.remove_tenant`."""
        checked(await self._send("DELETE", self._calls.tenants(name)))

    async def remove_alias(self, name: str, alias: str) -> None:
        """See `RoostClient.remove_alias`."""
        checked(await self._send("DELETE", self._calls.alias(name, alias)))

    async def metadata(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """See `RoostClient.metadata`."""
        answer = checked(await self._send("GET", self._calls.model(name, version)))
        metadata: dict[str, Any] = answer.json()
        return metadata

    async def ready(self) -> bool:
        """See `RoostClient.ready`."""
        try:
            answer = await self._send("GET", f"{self._calls.url}/v2/health/ready")
        except Unavailable:
            return False
        return answer.status_code == httpx.codes.OK

    async def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        try:
            return await self._http.request(method, url, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise no_answer(self._calls.url, error) from error
