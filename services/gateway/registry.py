"""Changes to the registry: files come in, versions are registered and removed.

Two steps, as container registries have it: the file first, addressed by its digest, then the
version that names it. Each can be repeated after a lost answer without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import msgspec
import structlog

from services.gateway.body import ClientGone
from services.gateway.core.tally import Tallies
from services.gateway.metrics import Metrics
from shared.blobs import check_digest
from shared.catalog import Catalog
from shared.errors import InvalidRequest, Overloaded, RoostError
from shared.models import Manifest, ModelSpec
from shared.names import split_model_id
from shared.repository import Repository
from shared.store.port import TOPIC_REGISTRY, Store, StoreUnavailable

log = structlog.get_logger(__name__)

_PRUNE_S = 60.0


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client says when it registers a version."""

    digest: str
    """Of a file that was uploaded before."""
    spec: ModelSpec = ModelSpec()


_registrations = msgspec.json.Decoder(Registration)


def decode_registration(body: bytes) -> Registration:
    """Raises `InvalidRequest` that says what is wrong and where."""
    try:
        return _registrations.decode(body)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise InvalidRequest(f"the registration is not valid: {str(error)[:300]}") from None


class Registry:
    """Writes to the repository, in threads, and tells the other services."""

    def __init__(
        self,
        repository: Repository,
        catalog: Catalog,
        store: Store,
        metrics: Metrics,
        tallies: Tallies,
        upload_limit: int,
        prune_s: float = _PRUNE_S,
    ) -> None:
        """`prune_s`: how long series of what another gateway removed may stay."""
        self._repository = repository
        self._catalog = catalog
        self._store = store
        self._metrics = metrics
        self._tallies = tallies
        self._upload_limit = upload_limit
        self._prune_s = prune_s
        self._changed_elsewhere = asyncio.Event()
        self._uploads = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts how the upload or registration inside ends."""
        code = "internal"
        try:
            yield
            code = "ok"
        except RoostError as error:
            code = error.code
            raise
        except ClientGone:
            code = "client_closed"
            raise
        finally:
            self._metrics.registered(code)

    async def blob_size(self, digest: str) -> int | None:
        """None when there is no such file."""
        if not await asyncio.to_thread(self._repository.files.has, digest):
            return None
        return await asyncio.to_thread(self._repository.files.size, digest)

    async def upload(self, digest: str, pieces: AsyncIterator[bytes]) -> int:
        """Keeps the file if it has this digest, and returns its size.

        The next piece is asked for when the last is written: a slow disk slows the sender.
        Raises `InvalidRequest` when the digest differs (nothing is kept), `Overloaded`, and
        what `pieces` raises.
        """
        if self._uploads >= self._upload_limit:
            raise Overloaded(f"{self._uploads} uploads are under way already", retry_after_s=5)
        self._uploads += 1
        try:
            with await asyncio.to_thread(self._repository.files.writer) as writer:
                async for piece in pieces:
                    await asyncio.to_thread(writer.write, piece)
                _, size = await asyncio.to_thread(writer.commit, digest)
        finally:
            self._uploads -= 1
        self._metrics.uploaded(size)
        log.info("blob_stored", digest=digest, size_bytes=size)
        return size

    async def register(
        self,
        name: str,
        version: int | None,
        registration: Registration,
        tenant: str | None = None,
    ) -> Manifest:
        """Registers a version (None: the next) for a tenant (None: whoever has the name). The same
        again gives the same manifest.

        Raises `InvalidRequest` (no such file, or not a model), `AlreadyExists`."""
        spec, digest = registration.spec, check_digest(registration.digest)
        manifest = await asyncio.to_thread(
            self._repository.register, name, version, spec, digest, tenant
        )
        log.info("model_registered", model=manifest.id, digest=digest)
        await self.changed(name)
        return manifest

    async def remove(self, name: str, version: int | None) -> None:
        """Removes one version, or all. Raises `ModelNotFound`, `Conflict`."""
        await asyncio.to_thread(self._repository.remove, name, version)
        log.info("model_removed", model=name, version=version)
        await self.changed(name)
        self._metrics.forget(name, version)
        if version is None:
            self._tallies.forget(name)

    async def follow_changes(self) -> None:
        """Forgets what other gateways changed. Never returns."""
        async for _ in self._store.hints(TOPIC_REGISTRY):
            self._catalog.invalidate(None)
            self._changed_elsewhere.set()

    async def prune_metrics(self) -> None:
        """Once in a while, if anything changed: a model that is gone has no series, whoever
        removed it. Never returns."""
        while True:
            await self._changed_elsewhere.wait()
            await asyncio.sleep(self._prune_s)  # a listing for many changes
            self._changed_elsewhere.clear()
            try:
                for model in self._metrics.models():
                    if not await self._catalog.registered(model):
                        self._metrics.forget(*split_model_id(model))
            except RoostError as error:
                log.info("metrics_not_pruned", error=str(error))

    async def changed(self, name: str) -> bool:
        """Tells all services that something about the model is new. Whether they could be told."""
        self._catalog.invalidate(name)
        try:
            await self._store.hint(TOPIC_REGISTRY)
        except StoreUnavailable as error:
            # The registry is not in the store: the others see it when their caches expire.
            log.warning("registry_hint_lost", error=str(error))
            return False
        return True
