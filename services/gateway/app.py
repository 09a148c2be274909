"""The gateway, put together: parts, named tasks in one group, and the order of the end."""

from __future__ import annotations

import asyncio
import importlib.util
import uuid
from collections.abc import Callable

import structlog

from services.gateway.admin import Admin
from services.gateway.aliases import AliasAdmin
from services.gateway.callers import Callers, Following, sees
from services.gateway.cancels import Cancels
from services.gateway.config import GatewayConfig
from services.gateway.control import Control, metrics_row
from services.gateway.core.admission import Admission
from services.gateway.core.tally import Tallies
from services.gateway.http import Gateway
from services.gateway.httpinfer import HttpInference
from services.gateway.infer import Inference
from services.gateway.jobs.files import JobFiles
from services.gateway.jobs.http import HttpJobs
from services.gateway.jobs.jobs import Jobs
from services.gateway.jobs.runs import JobRuns
from services.gateway.jobs.sweep import JobSweep
from services.gateway.lifecycle import Lifecycle
from services.gateway.metrics import Metrics
from services.gateway.registry import Registry
from services.gateway.routes import Routes
from services.gateway.rpc import Rpc
from services.gateway.statistics import Statistics
from services.gateway.status import Status
from shared.auth import gate_of
from shared.broker.port import Broker
from shared.catalog import Catalog
from shared.connect import open_broker, open_store
from shared.http import serve
from shared.repository import Repository
from shared.storage import open_storage
from shared.store.port import Store, StoreUnavailable
from shared.supervise import guard
from shared.tracing import Tracing, open_tracing

log = structlog.get_logger(__name__)


async def run(
    config: GatewayConfig,
    stop: asyncio.Event,
    *,
    broker: Broker | None = None,
    store: Store | None = None,
    on_ready: Callable[[int], None] | None = None,
    on_grpc_ready: Callable[[int], None] | None = None,
    tracing: Tracing | None = None,
) -> None:
    """Serves until `stop` is set, then answers what is under way and returns.

    `on_ready` gets the port once it listens, `on_grpc_ready` that of gRPC, before the other;
    `/v2/health/ready` tells when requests can be answered. Broker and store are opened from the
    configuration unless handed in, and are started and closed here either way. Raises
    `ConfigError` where it must not listen, for want of API keys.
    """
    repository = Repository(config.repository_url)
    gate = gate_of(repository.keys, config, "GATEWAY", config.host)
    await gate.start()
    instance = config.reply_queue_instance or uuid.uuid4().hex[:12]
    broker = broker or open_broker(config.amqp_url, f"gateway-{instance}", config.amqp_tls)
    store = store or open_store(config.redis_url, config.redis_tls)
    metrics = Metrics()
    tracing = tracing or open_tracing(on=config.tracing, service="gateway", instance=instance)
    catalog = Catalog(repository, sees=sees)
    callers = Callers(gate, config.tenant_header, repository, metrics)
    admission = Admission(
        config.model_inflight_limit,
        config.inflight_bytes_limit,
        config.tenant_inflight_limit,
    )
    following = Following(gate, catalog, admission, metrics)
    metrics.held_bytes.set_function(lambda: admission.held_bytes)
    rpc = Rpc(
        broker,
        instance,
        f"{uuid.uuid4().hex[:12]}.",
        metrics,
        publish_timeout_s=config.publish_timeout_s,
        reply_expires_s=config.reply_expires_s,
        reply_prefetch=config.reply_prefetch,
        alone=not config.reply_queue_instance,
    )
    tallies = Tallies()
    registry = Registry(repository, catalog, store, metrics, tallies, config.upload_limit)
    status = Status(repository, catalog, store)
    statistics = Statistics(tallies, catalog, store, status, uuid.uuid4().hex)
    cancels = Cancels(store, metrics)
    lifecycle = Lifecycle(repository, registry, callers)
    aliases = AliasAdmin(repository, catalog, registry, store, callers)
    routes = Routes(catalog)
    inference = Inference(config, routes, admission, rpc, metrics, statistics, cancels, tracing)
    files = JobFiles(open_storage(config.repository_url))
    jobs = Jobs(config, routes, admission, inference, broker, files, metrics, cancels)
    runs = JobRuns(config, inference, broker, rpc, store, files, metrics, callers)
    sweep = JobSweep(config, broker, files)
    http = HttpInference(config, inference, tracing)
    app = Gateway(
        http,
        callers,
        admission,
        rpc,
        [
            *Control(
                config, routes, status, statistics, registry, lifecycle, aliases, admission, rpc,
                callers,
            ).table(),
            *HttpJobs(http, jobs, admission).table(),
            *Admin(config, repository, following).table(),
            metrics_row(config, metrics),
        ],
    )  # fmt: skip

    connected = asyncio.Event()

    # Beside the HTTP server, which says "not ready" and why while a service is away.
    async def keep_reply_queue() -> None:
        await broker.start()
        connected.set()
        await rpc.keep_reply_queue()

    async def keep_job_queues() -> None:
        await connected.wait()
        await runs.keep_queues()

    async def follow_registry() -> None:
        try:
            await store.start()
        except StoreUnavailable as error:
            log.warning("store_unavailable", error=str(error))  # it does without
        await registry.follow_changes()

    closing = asyncio.Event()

    async def leave() -> None:
        await stop.wait()
        # 1. Nobody new: readiness is false, connections end with their answers, no job is begun.
        rpc.leave()
        leaving_jobs = asyncio.create_task(runs.leave(), name="leave jobs")
        await asyncio.sleep(config.stop_delay_s)
        # 2. The ports close, and what is under way is answered.
        closing.set()
        await asyncio.sleep(config.stop_grace_s)
        # 3. Whoever still waits is told.
        rpc.give_up()
        await leaving_jobs
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
                    ("keys", gate.follow),
                    ("tenants", following.run),
                    ("acknowledge", rpc.acknowledge_replies),
                    ("registry", follow_registry),
                    ("prune metrics", registry.prune_metrics),
                    ("statistics", statistics.tell_others),
                    ("cancels", cancels.tell),
                    ("jobs", keep_job_queues),
                    ("cancelled jobs", runs.listen),
                    ("job files", sweep.run),
                    ("leave", leave),
                )
            ]
            # Both return when the listener is closed and the requests under way are answered;
            # only then may go what answers them.
            grace_s = config.stop_grace_s + 2
            over_grpc = None
            if config.grpc_port >= 0 and has_grpc():
                from services.gateway.grpc.app import open_server

                server = open_server(
                    config, inference, routes, status, statistics, lifecycle, admission, rpc,
                    metrics, tracing, stop, callers,
                )  # fmt: skip
                bound = await server.start()
                log.info("gateway_listening_grpc", host=config.host, port=bound)
                over_grpc = group.create_task(server.serve(closing, grace_s), name="grpc")
                if on_grpc_ready is not None:
                    on_grpc_ready(bound)
            await serve(
                app,
                config.host,
                config.port,
                closing,
                started,
                grace_s=grace_s,
                tls=config.tls,
                leaving=stop,
            )
            if over_grpc is not None:
                await over_grpc
            for task in background:
                task.cancel()
    finally:
        await runs.close()
        await rpc.close()
        await broker.close()
        await store.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        log.info("gateway_stopped", instance=instance)


def has_grpc() -> bool:
    """An extra: a gateway without it serves HTTP alone."""
    missing = [name for name in ("grpc", "google.protobuf") if not _found(name)]
    if missing:
        log.warning("grpc_off", missing=missing)
    return not missing


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False
