"""Every operation of a gateway: what is asked, and how the answer is read."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from roost.calls import answers
from roost.calls.bodies import Body, body_of
from roost.calls.call import (
    UPLOAD_TIMEOUT,
    Array,
    Call,
    Content,
    Ids,
    Item,
    Items,
    Outputs,
    Split,
    T,
    timeout_of,
)
from shared.aliases import check_address, check_alias
from shared.errors import InvalidRequest
from shared.models import Manifest, ModelSpec
from shared.names import (
    HEADER_IDEMPOTENCY_KEY,
    IDEMPOTENCY_KEY,
    IDEMPOTENCY_KEY_CHARS,
    check_name,
    check_version,
)
from shared.tenants import Quota, check_tenant

Version = int | str | None


class Calls:
    """By one gateway's URL. Names and versions that cannot be any raise `InvalidRequest`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    # --- asking ---------------------------------------------------------------------------

    def ready(self) -> Call[bool]:
        return Call("GET", f"{self.url}/v2/health/ready", answers.good)

    def metadata(self, name: str, version: Version) -> Call[Item]:
        return Call("GET", self._model(name, version), answers.item)

    def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: Version,
        timeout_s: float | None,
        outputs: Outputs,
    ) -> Call[dict[str, Array]]:
        body = body_of(inputs, timeout_s, outputs)
        return self.infer_with(name, version, body, timeout_s, answers.arrays)

    def infer_with(
        self,
        name: str,
        version: Version,
        body: Body,
        timeout_s: float | None,
        read: Callable[[httpx.Response], T],
    ) -> Call[T]:
        """A request that is made already. `timeout_s`: its deadline."""
        url = f"{self._model(name, version)}/infer"
        return Call("POST", url, read, body.content, body.headers, timeout_of(timeout_s))

    # --- jobs -----------------------------------------------------------------------------

    def submit(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: Version,
        timeout_s: float | None,
        outputs: Outputs,
        key: str | None,
    ) -> Call[Item]:
        return self.submit_with(name, version, body_of(inputs, timeout_s, outputs), key)

    def submit_with(self, name: str, version: Version, body: Body, key: str | None) -> Call[Item]:
        """A request that is made already. `key` None: one that nobody else has."""
        if key is None:
            key = str(uuid.uuid4())
        elif not re.fullmatch(IDEMPOTENCY_KEY, key):
            raise InvalidRequest(
                f"an idempotency key is 1 to {IDEMPOTENCY_KEY_CHARS} visible ASCII characters"
            )
        headers = {**body.headers, HEADER_IDEMPOTENCY_KEY: key}
        url = f"{self._model(name, version)}/jobs"
        return Call("POST", url, answers.item, body.content, headers, again=True)

    def job(self, id_: str) -> Call[Item]:
        return Call("GET", self._job(id_), answers.item, again=True)

    def result(self, id_: str) -> Call[dict[str, Array]]:
        return self.result_with(id_, answers.arrays)

    def result_with(self, id_: str, read: Callable[[httpx.Response], T]) -> Call[T]:
        return Call("GET", f"{self._job(id_)}/result", read, again=True)

    def cancel(self, id_: str) -> Call[None]:
        return Call("DELETE", self._job(id_), answers.done)

    # --- the registry ---------------------------------------------------------------------

    def list(self) -> Call[Items]:
        return Call("GET", f"{self.url}/v2/repository/index", answers.index)

    def has_blob(self, digest: str) -> Call[bool]:
        return Call("HEAD", self._blob(digest), answers.good)

    def put_blob(self, digest: str, size: int, pieces: Content) -> Call[None]:
        headers = {"Content-Length": str(size)}
        return Call("PUT", self._blob(digest), answers.done, pieces, headers, UPLOAD_TIMEOUT)

    def register(
        self, name: str, version: Version, digest: str, spec: ModelSpec | None
    ) -> Call[Manifest]:
        method, url = "PUT", self._stored(name, version)
        if version is None:
            method, url = "POST", f"{url}/versions"
        body = _json({"digest": digest, "spec": spec or ModelSpec()})
        return Call(method, url, answers.manifest, body, timeout=UPLOAD_TIMEOUT)

    def remove(self, name: str, version: Version) -> Call[None]:
        return Call("DELETE", self._stored(name, version), answers.done)

    def unload(self, name: str) -> Call[None]:
        return Call("POST", f"{self._stored(name)}/unload", answers.done)

    def load(self, name: str) -> Call[None]:
        return Call("POST", f"{self._stored(name)}/load", answers.done)

    def aliases(self, name: str) -> Call[Items]:
        return Call("GET", self._alias(name), answers.items("aliases"))

    def set_alias(self, name: str, alias: str, to: int | str | Split, *, now: bool) -> Call[Item]:
        where: Item
        where = {"split": dict(to)} if isinstance(to, Mapping) else {"version": check_version(to)}
        return Call("PUT", self._alias(name, alias), answers.item, _json({**where, "now": now}))

    def remove_alias(self, name: str, alias: str) -> Call[None]:
        return Call("DELETE", self._alias(name, alias), answers.done)

    def quarantined(self) -> Call[Items]:
        url = f"{self.url}/v2/repository/quarantine"
        return Call("GET", url, answers.items("quarantined"))

    def release(self, name: str, version: Version) -> Call[Ids]:
        return Call("DELETE", f"{self._stored(name, version)}/quarantine", answers.released)

    # --- keys and tenants -----------------------------------------------------------------

    def list_keys(self) -> Call[Items]:
        return Call("GET", self._keys(), answers.items("keys"))

    def create_key(
        self, tenant: str, scopes: Sequence[str], lifetime_s: float | None, note: str
    ) -> Call[Item]:
        body = {"tenant": tenant, "scopes": scopes, "lifetime_s": lifetime_s, "note": note}
        return Call("POST", self._keys(), answers.item, _json(body))

    def revoke_key(self, id_: str) -> Call[None]:
        return Call("DELETE", f"{self._keys()}/{quote(id_, safe='')}", answers.done)

    def tenants(self) -> Call[Items]:
        return Call("GET", self._tenants(), answers.items("tenants"))

    def set_tenant(self, name: str, quota: Quota) -> Call[None]:
        url = f"{self._tenants()}/{check_tenant(name)}"
        return Call("PUT", url, answers.done, _json(quota))

    def remove_tenant(self, name: str) -> Call[None]:
        return Call("DELETE", f"{self._tenants()}/{check_tenant(name)}", answers.done)

    # --- where ----------------------------------------------------------------------------

    def _model(self, name: str, version: Version) -> str:
        path = f"{self.url}/v2/models/{quote(check_name(name))}"
        return path if version is None else f"{path}/versions/{check_address(version)}"

    def _job(self, id_: str) -> str:
        return f"{self.url}/v2/jobs/{quote(id_, safe='')}"

    def _stored(self, name: str, version: Version = None) -> str:
        path = f"{self.url}/v2/repository/models/{quote(check_name(name))}"
        return path if version is None else f"{path}/versions/{check_version(version)}"

    def _alias(self, name: str, alias: str | None = None) -> str:
        path = f"{self._stored(name)}/aliases"
        return path if alias is None else f"{path}/{check_alias(alias)}"

    def _blob(self, digest: str) -> str:
        return f"{self.url}/v2/repository/blobs/{digest}"

    def _keys(self) -> str:
        return f"{self.url}/v2/repository/keys"

    def _tenants(self) -> str:
        return f"{self.url}/v2/repository/tenants"


def _json(body: Any) -> bytes:
    return msgspec.json.encode(body)
