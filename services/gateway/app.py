"""The gateway, put together: parts, named tasks in one group, and the order of the end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import structlog

from services.gateway.cancels import Cancels
from services.gateway.config import GatewayConfig
from services.gateway.control import Control
from services.gateway.core.admission import Admission
from services.gateway.core.tally import Tallies
from services.gateway.http import Gateway
from services.gateway.httpinfer import HttpInference
from services.gateway.infer import Inference
from services.gateway.lifecycle import Lifecycle
from services.gateway.metrics import Metrics
from services.gateway.registry import Registry
from services.gateway.routes import Routes
from services.gateway.rpc import Rpc
from services.gateway.statistics import Statistics
from services.gateway.status import Status
from shared.broker.port import Broker
from shared.catalog import Catalog
from shared.connect import open_broker, open_store
from shared.http import metrics_route, serve
from shared.repository import Repository
from shared.store.port import Store, StoreUnavailable
from shared.supervise import guard

log = structlog.get_logger(__name__)


async def run(
    config: GatewayConfig,
    stop: asyncio.Event,
    *,
    broker: Broker | None = None,
    store: Store | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serves until `stop` is set, then answers what is under way and returns.

    `on_ready` gets the port once it listens; `/v2/health/ready` tells when requests can be
    answered. Broker and store are opened from the configuration unless handed in, and are
    started and closed here either way.
    """
    instance = config.reply_queue_instance or uuid.uuid4().hex[:12]
    broker = broker or open_broker(config.amqp_url, f"gateway-{instance}")
    store = store or open_store(config.redis_url)
    metrics = Metrics()
    repository = Repository(config.repository_url)
    catalog = Catalog(repository)
    admission = Admission(
        config.model_inflight_limit,
        config.inflight_bytes_limit,
        config.tenant_inflight_limit if config.tenant_header else None,
    )
    metrics.held_bytes.set_function(lambda: admission.held_bytes)
    rpc = Rpc(
        broker,
        instance,
        f"{uuid.uuid4().hex[:12]}.",
        metrics,
        publish_timeout_s=config.publish_timeout_s,
        reply_expires_s=config.reply_expires_s,
        reply_prefetch=config.reply_prefetch,
    )
    tallies = Tallies()
    registry = Registry(repository, catalog, store, metrics, tallies, config.upload_limit)
    status = Status(repository, catalog, store)
    statistics = Statistics(tallies, catalog, store, status, uuid.uuid4().hex)
    cancels = Cancels(store, metrics)
    lifecycle = Lifecycle(repository, registry)
    inference = Inference(config, Routes(catalog), admission, rpc, metrics, statistics, cancels)
    app = Gateway(
        HttpInference(config, inference),
        Control(config, status, statistics, registry, lifecycle, admission, rpc),
        admission,
        rpc,
        metrics_route(metrics.registry),
    )

    # Beside the HTTP server, which says "not ready" and why while a service is away.
    async def keep_reply_queue() -> None:
        await broker.start()
        await rpc.keep_reply_queue()

    async def follow_registry() -> None:
        try:
            await store.start()
        except StoreUnavailable as error:
            log.warning("store_unavailable", error=str(error))  # it does without
        await registry.follow_changes()

    async def give_up_late() -> None:
        await stop.wait()
        await asyncio.sleep(config.stop_grace_s)
        rpc.give_up()
        await asyncio.Event().wait()

    def started(port: int) -> None:
        log.info("gateway_listening", host=config.host, port=port, instance=instance)
        if on_ready is not None:
            on_ready(port)

    try:
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(guard(task, name), name=name)
                for name, task in (
                    ("reply queue", keep_reply_queue),
                    ("acknowledge", rpc.acknowledge_replies),
                    ("registry", follow_registry),
                    ("statistics", statistics.tell_others),
                    ("cancels", cancels.tell),
                    ("give up", give_up_late),
                )
            ]
            # Returns when the listener is closed and the requests under way are answered;
            # only then may go what answers them.
            await serve(
                app, config.host, config.port, stop, started, grace_s=config.stop_grace_s + 2
            )
            for task in background:
                task.cancel()
    finally:
        await rpc.close()
        await broker.close()
        await store.close()
        log.info("gateway_stopped", instance=instance)
