"""What ended engines is written down where all workers, gateways and the placer look."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import structlog

from services.worker.core.events import DeathKept, Fact, KeepDeath
from services.worker.threads import in_thread
from shared.errors import RoostError
from shared.quarantine import Death
from shared.repository import Repository
from shared.store.port import TOPIC_REGISTRY, Store, StoreUnavailable
from shared.supervise import Backoff

log = structlog.get_logger(__name__)


class Deaths:
    """Those that one worker has seen."""

    def __init__(
        self, repository: Repository, store: Store, worker: str, tell: Callable[[Fact], None]
    ) -> None:
        self._repository = repository
        self._store = store
        self._worker = worker
        self._tell = tell

    async def keep(self, order: KeepDeath) -> None:
        """Returns when it is in the registry and those who look there were told; a registry that
        is away is tried again and again."""
        model, backoff = order.model, Backoff(0.5, 30.0)
        log.error("engines_ended_of_a_model", model=model, kind=order.kind, reason=order.reason)
        death = Death(kind=order.kind, worker=self._worker, at=time.time(), reason=order.reason)
        while True:
            try:
                await in_thread(
                    lambda: self._repository.add_death(model, death), f"keep death {model}"
                )
                break
            except (RoostError, OSError) as error:
                log.warning("death_not_kept", model=model, error=str(error))
                await asyncio.sleep(backoff.next())
        self._tell(DeathKept(model))
        with contextlib.suppress(StoreUnavailable):  # they look by themselves, a little later
            await self._store.hint(TOPIC_REGISTRY)
