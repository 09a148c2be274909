"""A small Python client: register models, list them, ask them, now or as jobs.

    with RoostClient("http://127.0.0.1:8000") as roost:
        roost.push("adder", "adder.pt")
        outputs = roost.infer("adder", {"x": np.ones((1, 3), np.float32)})
        job = roost.submit("adder", {"x": np.ones((1, 3), np.float32)})
        outputs = roost.result(job["id"], wait_s=None)

`AsyncRoostClient` has the same methods as coroutines. Every refusal is raised as one of
`shared.errors`; no answer at all is `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from roost.aioclient import AsyncRoostClient
from roost.calls.bodies import digest_of, pieces_of
from roost.calls.call import Array, Ids, Items, Outputs, Progress, Split
from roost.calls.calls import Calls
from roost.calls.sending import Sender, options_of
from shared.errors import Unavailable
from shared.models import Manifest, ModelSpec
from shared.tenants import Quota

__all__ = ["AsyncRoostClient", "RoostClient"]


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
        self._sender = Sender(url, options_of(url, api_key, ca_file, cert_file, key_file))
        self._do = self._sender.do

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sender.close()

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
        self._calls.register(name, version, "", None)  # checks name and version
        digest, size = digest_of(path)
        if not self._do(self._calls.has_blob(digest)):
            self._do(self._calls.put_blob(digest, size, pieces_of(path, size, progress)))
        return self._do(self._calls.register(name, version, digest, spec))

    def infer(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
    ) -> dict[str, Array]:
        """The outputs (all, or those named) by name. `timeout_s` is the request's deadline."""
        return self._do(self._calls.infer(name, inputs, version, timeout_s, outputs))

    def submit(
        self,
        name: str,
        inputs: Mapping[str, Array],
        version: int | str | None = None,
        timeout_s: float | None = None,
        outputs: Outputs = None,
        *,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Submits what `infer` would ask as a job, and returns how it stands: `id`, `state`,
        `deadline` and more. `timeout_s` is the job's deadline; None: the gateway's.

        Each submission has an idempotency key, its own unless one is given: submitting the same
        request with the same key again is the same job. So it is sent again, once, when the
        connection was lost before the answer came.
        """
        return self._do(
            self._calls.submit(name, inputs, version, timeout_s, outputs, idempotency_key)
        )

    def job(self, id_: str) -> dict[str, Any]:
        """How a job stands: `state`, times (RFC 3339), `error` and `code` if it ended by one."""
        return self._do(self._calls.job(id_))

    def result(self, id_: str, wait_s: float | None = 0) -> dict[str, Array]:
        """What `infer` would have returned, or raised. Waits up to `wait_s` (None: as long as it
        takes) for the job's end, and then raises `JobNotDone`. A gateway that is away for less than
        a minute meanwhile is waited out."""
        return self._sender.wait(self._calls.result(id_), wait_s)

    def cancel(self, id_: str) -> None:
        """Cancels a job that has not ended; removes one that has, with its result."""
        self._do(self._calls.cancel(id_))

    def list(self) -> list[dict[str, Any]]:
        """The repository index: name, version, state, reason (where it is), size_bytes."""
        return self._do(self._calls.list())

    def remove(self, name: str, version: int | str | None = None) -> None:
        """Removes one version, or the whole model."""
        self._do(self._calls.remove(name, version))

    def unload(self, name: str) -> None:
        """Makes the model, all its versions, unavailable until `load`."""
        self._do(self._calls.unload(name))

    def load(self, name: str) -> None:
        """Takes `unload` back; returns when the model can be asked."""
        self._do(self._calls.load(name))

    def aliases(self, name: str) -> Items:
        """Where the model's aliases lead: `alias`, `version`, `split`, and what is `pending`."""
        return self._do(self._calls.aliases(name))

    def set_alias(
        self, name: str, alias: str, to: int | str | Split, *, now: bool = False
    ) -> dict[str, Any]:
        """Lets the alias lead to a version, or to several by their weights: once they are bound
        as often as what it leads to at present, or `now`. Returns where it leads at first."""
        return self._do(self._calls.set_alias(name, alias, to, now=now))

    def quarantined(self) -> Items:
        """The versions that ended engines and are kept from them: `model`, `reason`, `since`,
        `worker`, `deaths`; the latest first."""
        return self._do(self._calls.quarantined())

    def release(self, name: str, version: int | str | None = None) -> Ids:
        """Takes a model, or one version of it, out of quarantine; returns which were in it."""
        return self._do(self._calls.release(name, version))

    def list_keys(self) -> Items:
        """All API keys, without what their holders present. Needs one with the scope admin."""
        return self._do(self._calls.list_keys())

    def create_key(
        self,
        tenant: str = "",
        scopes: Sequence[str] = ("infer",),
        *,
        lifetime_s: float | None = None,
        note: str = "",
    ) -> dict[str, Any]:
        """A new API key: `id`, and `key`, which is told this once. As `list_keys`."""
        return self._do(self._calls.create_key(tenant, scopes, lifetime_s, note))

    def revoke_key(self, id_: str) -> None:
        """Within two seconds the key is worth nothing at any gateway. As `list_keys`."""
        self._do(self._calls.revoke_key(id_))

    def tenants(self) -> Items:
        """What tenants may take: `tenant` and `quota`. As `list_keys`."""
        return self._do(self._calls.tenants())

    def set_tenant(self, name: str, quota: Quota) -> None:
        """From now on the tenant may take this much. As `list_keys`."""
        self._do(self._calls.set_tenant(name, quota))

    def remove_tenant(self, name: str) -> None:
        """Nothing bounds the tenant any more; its models and keys stay. As `list_keys`."""
        self._do(self._calls.remove_tenant(name))

    def remove_alias(self, name: str, alias: str) -> None:
        self._do(self._calls.remove_alias(name, alias))

    def metadata(self, name: str, version: int | str | None = None) -> dict[str, Any]:
        """The protocol's model metadata: versions, platform, inputs, outputs."""
        return self._do(self._calls.metadata(name, version))

    def ready(self) -> bool:
        """Whether the gateway can take requests now. False also when nothing answers."""
        try:
            return self._do(self._calls.ready())
        except Unavailable:
            return False
