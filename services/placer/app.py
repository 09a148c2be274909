"""The placer, put together: parts, named tasks in one group, and the order of the end."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from typing import Never

import structlog

from services.placer.config import PlacerConfig
from services.placer.http import PlacerHttp
from services.placer.lease import Lease
from services.placer.metrics import Metrics
from services.placer.scale import Scale
from services.placer.term import Term
from shared.auth import gate_of
from shared.broker.policies import apply_policies, vhost_of
from shared.broker.port import Broker
from shared.catalog import Catalog
from shared.connect import open_broker, open_store
from shared.errors import Unavailable
from shared.http import serve
from shared.repository import Repository
from shared.store.port import Store, StoreUnavailable
from shared.supervise import Backoff, guard
from shared.tracing import Tracing, open_tracing

log = structlog.get_logger(__name__)


async def run(
    config: PlacerConfig,
    stop: asyncio.Event,
    *,
    broker: Broker | None = None,
    store: Store | None = None,
    on_ready: Callable[[int], None] | None = None,
    tracing: Tracing | None = None,
) -> None:
    """Decides, or stands by, until `stop` is set; then lets the next placer in and returns.

    `on_ready` gets the port of its HTTP once that listens; `/readyz` tells whether broker and
    store answer. Broker and store are opened from the configuration unless handed in, and are
    started and closed here either way. Raises `ConfigError` where it must not listen, for want of
    API keys.
    """
    repository = Repository(config.repository_url)
    gate = gate_of(repository.keys, config, "PLACER", config.host, further=config.own_key())
    await gate.start()
    instance = config.instance or uuid.uuid4().hex[:12]
    broker = broker or open_broker(config.amqp_url, f"placer-{instance}", config.amqp_tls)
    store = store or open_store(config.redis_url, config.redis_tls)
    catalog = Catalog(repository)
    metrics = Metrics()
    tracing = tracing or open_tracing(on=config.tracing, service="placer", instance=instance)
    scale = Scale(metrics)
    lease = Lease(
        store, f"placer-{instance}", ttl_s=config.lease_ttl_s, renew_s=config.lease_renew_s
    )
    http = PlacerHttp(broker, lease, catalog, scale, metrics, gate, config.metrics_need)

    async def lead_when_elected() -> None:
        await broker.start()
        while True:
            await lease.held.wait()
            term = Term(config, broker, store, lease, repository, catalog, scale, metrics, tracing)
            http.term = term
            metrics.leading.set(1)
            metrics.knowledge = term.knowledge
            try:
                await _until(lease.lost, term)
            finally:
                http.term = None
                metrics.leading.set(0)
                metrics.knowledge = None

    async def keep_lease() -> None:
        try:
            await store.start()
        except StoreUnavailable as error:
            log.warning("store_unavailable", error=str(error))
        await lease.keep()

    def started(port: int) -> None:
        log.info("placer_listening", host=config.host, port=port, instance=instance)
        if on_ready is not None:
            on_ready(port)

    async def leave() -> None:
        await stop.wait()
        # The term ends first: nothing more is written, and the next placer may begin, whoever
        # still reads a page of this one.
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        await lease.release()

    background: list[asyncio.Task[Never]] = []
    try:
        async with asyncio.TaskGroup() as group:
            background += [
                group.create_task(guard(task, name), name=name)
                for name, task in (
                    ("lease", keep_lease),
                    ("keys", gate.follow),
                    ("lease hints", lease.listen),
                    ("lead", lead_when_elected),
                    ("policies", lambda: _keep_policies(config)),
                )
            ]
            leaving = group.create_task(leave(), name="leave")
            await serve(
                http.app, config.host, config.port, stop, started, grace_s=1, tls=config.tls
            )
            await leaving
    finally:
        if lease.held.is_set():  # it was not asked to end: it failed, or was cancelled
            await lease.release()
        await broker.close()
        await store.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        log.info("placer_stopped", instance=instance)


async def _until(lost: asyncio.Event, term: Term) -> None:
    """Runs the term until the lease is lost."""
    running = asyncio.create_task(term.run(), name="term")
    losing = asyncio.create_task(lost.wait(), name="lease lost")
    try:
        await asyncio.wait({running, losing}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running  # it never ends by itself but by an error
    finally:
        losing.cancel()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def _keep_policies(config: PlacerConfig) -> None:
    """Lays down the limits of queues, once the management API answers."""
    backoff = Backoff(0.5, 30.0)
    while config.management_url:
        try:
            await asyncio.to_thread(
                apply_policies,
                config.management_url,
                vhost_of(config.amqp_url),
                tls=config.amqp_tls,
            )
        except Unavailable as error:
            log.warning("policies_not_applied", error=str(error))
            await asyncio.sleep(backoff.next())
        else:
            log.info("policies_applied")
            break
    await asyncio.Event().wait()
