"""The worker, put together: parts, named tasks in one group, and the order of the end."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Final, Never

import structlog

from services.worker import confining, devices, wire
from services.worker.agent import Agent
from services.worker.config import WorkerConfig, parse_labels
from services.worker.consume import Consumers
from services.worker.core.events import DeathsFound, EngineStarted
from services.worker.core.worker import WorkerCore
from services.worker.deaths import Deaths
from services.worker.follow import Follower
from services.worker.hangups import Hangups
from services.worker.hostmemory import available_bytes
from services.worker.http import Door, Readiness, serving
from services.worker.journal import Journal
from services.worker.launch import Launch, launcher
from services.worker.metrics import Metrics
from services.worker.reply import Replier
from services.worker.report import Reporter
from services.worker.runtime import Runtime
from services.worker.spans import Spans
from services.worker.telling import Teller
from shared.auth import gate_of
from shared.broker.port import Broker
from shared.connect import open_broker, open_store
from shared.control import Report
from shared.errors import RoostError
from shared.repository import Repository
from shared.store.port import Store, StoreUnavailable
from shared.supervise import guard
from shared.tracing import Tracing, open_tracing
from shared.units import parse_bytes

log = structlog.get_logger(__name__)

_FINISH_S: Final = 2.0
"""For the last profile to be written. A fetch takes as long as it takes, for nobody."""
_GOODBYE_S: Final = 2.0
"""For a store to hear that the worker is gone; one that is away finds out by itself."""


async def run(
    config: WorkerConfig,
    stop: asyncio.Event,
    *,
    broker: Broker | None = None,
    store: Store | None = None,
    on_ready: Callable[[str], None] | None = None,
    launch: Launch | None = None,
    tracing: Tracing | None = None,
) -> None:
    """Serves models until `stop` is set or the placer lets the worker go, then finishes what
    runs, gives the rest back, sets `stop` if it was the placer, returns.

    `on_ready` gets the worker's id once a report with a running engine is out. Broker and
    store are opened from the configuration unless handed in, and are started and closed here
    either way. `launch` starts the engine (another one, in tests). Raises `ConfigError` where its
    metrics must not be told, for want of API keys.
    """
    repository = Repository(config.repository_url)
    gate = gate_of(repository.keys, config, "WORKER", config.metrics_host)
    if config.metrics_port:
        await gate.start()
    worker = config.new_worker_id()
    device = await asyncio.to_thread(devices.resolve, config.device)
    budget = parse_bytes(config.budget_bytes)
    if not budget:
        capacity = await asyncio.to_thread(devices.capacity_bytes, device)
        budget = max(capacity - parse_bytes(config.headroom_bytes), 1)
    workers = await asyncio.to_thread(devices.count)
    host_bytes = await asyncio.to_thread(host_budget, config, device, budget, workers)
    broker = broker or open_broker(config.amqp_url, f"worker-{worker}", config.amqp_tls)
    store = store or open_store(config.redis_url, config.redis_tls)
    metrics = Metrics(worker)
    core = WorkerCore(
        max_held_bytes=parse_bytes(config.max_held_bytes),
        max_bytes_under_way=parse_bytes(config.inbox_bytes) // 2,
        share=config.share_tensors,
        batch_timeout_s=config.batch_timeout_s,
        load_timeout_s=config.load_timeout_s,
    )
    agent = Agent(core, repository, config.cache, metrics)
    agent.journal = Journal(config.data_dir)
    for doomed in await asyncio.to_thread(agent.journal.open):
        agent.tell(DeathsFound(doomed.model, doomed.digest, doomed.deaths))
    metrics.hung_up = agent.items.cancelled.__contains__
    tracing = tracing or open_tracing(on=config.tracing, service="worker", instance=worker)
    spans = None if tracing is None else Spans(tracing)
    if spans is not None:
        agent.spans, agent.items.received = spans, spans.received
    readiness = Readiness(broker, config.report_ttl_s)
    teller = Teller(core, worker, uuid.uuid4().hex, budget, metrics, on_ready)
    teller.host_budget_bytes = host_bytes
    teller.labels = parse_labels(config.labels)

    def engine_started(started: wire.EngineStarted, pid: int) -> None:
        # The agent's sum is of models: the engine's own share is not theirs to fill.
        given = budget
        if not config.budget_bytes and device != "cpu":
            given = max(budget - started.base_bytes, 1)
        teller.meter = devices.Meter(device, started.device_uuid, pid, started.base_bytes)
        teller.started, teller.budget_bytes = started, given
        metrics.machine.uuid = started.device_uuid if device != "cpu" else ""
        log.info(
            "engine_started",
            engine=pid,
            device=started.device_name,
            torch=started.torch_version,
            budget_bytes=given,
            host_budget_bytes=host_bytes,
            base_bytes=started.base_bytes,
        )
        metrics.confinement(started.confinement)
        confining.tell(started.confinement, pid)
        agent.tell(EngineStarted(given, started.device_kind, host_bytes))

    def report_sent(report: Report) -> None:
        readiness.sent(report)
        teller.sent(report)

    agent.reporter = Reporter(
        store,
        teller.report,
        interval_s=config.report_interval_s,
        ttl_s=config.report_ttl_s,
        on_sent=report_sent,
    )
    launch = launch or launcher(
        device,
        budget,
        config.threads,
        host_bytes=host_bytes,
        share=config.share_tensors,
        confinement=await asyncio.to_thread(confining.confinement, config),
    )
    agent.runtime = Runtime(
        launch,
        agent.tell,
        engine_started,
        inbox_bytes=parse_bytes(config.inbox_bytes),
        outbox_bytes=parse_bytes(config.outbox_bytes),
    )
    teller.memory = lambda: agent.runtime.memory
    agent.replier = Replier(
        broker, agent.settled, metrics, timeout_s=config.publish_timeout_s, spans=spans
    )
    agent.deaths = Deaths(repository, store, worker, agent.tell)
    agent.consumers = Consumers(broker, agent.items, agent.spec_of, agent.tell, metrics)
    teller.window = agent.consumers.window
    follower = Follower(store, worker, agent.tell)
    hangups = Hangups(store, agent.items, agent.tell)
    log.info("worker_starting", worker=worker, device=device, budget_bytes=budget)

    async def start_store() -> None:
        try:
            await store.start()
        except StoreUnavailable as error:
            log.warning("store_unavailable", error=str(error))  # it is asked again and again

    async def keep_connected() -> None:
        # Beside the engine's start, which takes as long.
        await asyncio.gather(broker.start(), start_store())
        async with asyncio.TaskGroup() as group:
            controls = (follower.listen, follower.follow, agent.reporter.run, hangups.listen)
            for task in controls:
                group.create_task(guard(task, task.__qualname__), name=task.__qualname__)

    try:
        with contextlib.ExitStack() as stack:
            if config.metrics_port:
                host, port = config.metrics_host, config.metrics_port
                door = None if config.metrics_open else Door(gate)
                stack.enter_context(
                    serving(host, port, metrics.registry, readiness, config.tls, door)
                )
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(guard(agent.run, "agent"), name="agent"),
                    group.create_task(guard(agent.runtime.run, "engine"), name="engine"),
                    group.create_task(guard(keep_connected, "control"), name="control"),
                ]
                await _asked_to_end(stop, agent)
                await _leave(config, agent, store, worker, tasks)
                for task in tasks:
                    task.cancel()
    finally:
        agent.journal.close()
        await broker.close()
        await store.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        log.info("worker_stopped", worker=worker)
    # Let go is asked to end: whoever restarts what fails (status 1) must not start it again. Not
    # earlier: a signal after the first one kills.
    stop.set()


async def _asked_to_end(stop: asyncio.Event, agent: Agent) -> None:
    """Until `stop` is set, or the placer said to drain and nothing is held any more."""
    waits = [asyncio.create_task(event.wait()) for event in (stop, agent.emptied)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def host_budget(config: WorkerConfig, device: str, budget_bytes: int, workers: int) -> int:
    """What copies may take of the host's memory, by the configuration, with so many workers on
    this machine."""
    if config.host_bytes != "auto":
        return parse_bytes(config.host_bytes)
    if device == "cpu":
        return 0
    # They may all start at the same moment, and see the same memory free.
    return min(available_bytes() // 2 // workers, 8 * budget_bytes)


async def _leave(
    config: WorkerConfig,
    agent: Agent,
    store: Store,
    worker: str,
    tasks: Sequence[asyncio.Task[Never]],
) -> None:
    """An orderly end: nothing new, finish what runs, give back the rest, say goodbye."""
    deciding, _, control = tasks
    began = time.monotonic()
    # 1. Nothing new: consumers are cancelled, what waits goes back, what runs is answered.
    agent.drain()
    agent.replier.hurry()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.drain_grace_s):
            await agent.emptied.wait()
            await agent.replier.drained()
    # 2. Nothing is decided any more: what still ran is another's, and must not be answered here
    #    as well. Answers under way are sent, or given back by who sends them.
    await _ended(deciding)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.publish_timeout_s):
            await agent.replier.drained()
    # 3. What is held after the grace goes back to its queue with the consumers.
    left = len(agent.items)
    await agent.consumers.close_all()
    await agent.finish(_FINISH_S)
    # 4. Goodbye: the placer need not wait for the report to expire.
    await _ended(control)
    with contextlib.suppress(RoostError, TimeoutError):
        async with asyncio.timeout(_GOODBYE_S):
            await store.remove_report(worker)
    # 5. The engine last: until now it had something to finish. One that hangs, or is in the midst
    #    of a load, is not waited for.
    await agent.runtime.close(at_once=left > 0 or bool(agent.core.state.loading()))
    log.info("drained", seconds=round(time.monotonic() - began, 3), left=left)


async def _ended(task: asyncio.Task[Never]) -> None:
    task.cancel()
    await asyncio.wait([task])
