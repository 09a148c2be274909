"""The agent: what happened goes to the core, what the core decides is done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, assert_never

import msgspec
import structlog

from services.worker import answers, wire
from services.worker.consume import Consumers
from services.worker.core.events import (
    Action,
    Answer,
    Bury,
    CloseConsumer,
    ConsumerStarted,
    DeathKept,
    DrainAsked,
    EngineLost,
    EvictModel,
    Fact,
    Fault,
    FetchFailed,
    FetchModel,
    ForgetModel,
    GiveBack,
    ItemSettled,
    KeepDeath,
    KeepProfile,
    KillEngine,
    LoadModel,
    ModelFetched,
    Refuse,
    RunBatch,
    StartConsumer,
    StopConsumer,
    TellPlacer,
)
from services.worker.core.worker import WorkerCore
from services.worker.deaths import Deaths
from services.worker.items import Items
from services.worker.journal import Journal
from services.worker.metrics import Metrics
from services.worker.reply import Replier
from services.worker.report import Reporter
from services.worker.runtime import Runtime
from services.worker.spans import Spans
from services.worker.threads import in_thread
from shared.errors import InvalidRequest, RoostError
from shared.layout import Extent, Layout
from shared.logs import bound
from shared.models import ModelSpec, Profile
from shared.names import ModelId, split_model_id
from shared.repository import Repository

log = structlog.get_logger(__name__)

_FETCHING_AT_ONCE: Final = 8


class _File(NamedTuple):
    """A model's file, as the engine is told of it."""

    extents: tuple[Extent, ...]
    layout: Layout | None


def _with_inputs(spec: ModelSpec, fact: wire.ModelLoaded) -> ModelSpec:
    """The spec with the inputs that the file itself has beside those declared. Declared ones stay
    what they are, whatever an engine says: requests are read by them, and padded."""
    declared = spec.inputs or ()
    error = "they are not those of the manifest, and more"
    if fact.inputs[: len(declared)] == declared:
        try:
            return msgspec.structs.replace(spec, inputs=fact.inputs)
        except InvalidRequest as refused:
            error = refused.message[:200]
    log.warning("inputs_ignored", model=fact.model, error=error)
    return spec


class Agent:
    """Owns the core, and everything that carries out its actions."""

    consumers: Consumers
    runtime: Runtime
    replier: Replier
    reporter: Reporter
    deaths: Deaths

    def __init__(
        self, core: WorkerCore, repository: Repository, cache_dir: str, metrics: Metrics
    ) -> None:
        """The five parts above need `tell` and are set by who puts the worker together."""
        self.core = core
        self.items = Items()
        self.journal = Journal("")
        """Writes nothing until it is opened."""
        self.emptied = asyncio.Event()
        """Set when a draining worker holds nothing any more."""
        self._repository = repository
        self._cache_dir = cache_dir
        self._metrics = metrics
        self._facts: list[Fact] = []
        self._wake = asyncio.Event()
        self._files: dict[ModelId, _File] = {}
        self._specs: dict[ModelId, ModelSpec] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetching = asyncio.Semaphore(_FETCHING_AT_ONCE)
        self.spans: Spans | None = None
        """Where traces are on."""
        self._batches: dict[int, RunBatch] = {}
        """In the engine now; for the logs alone."""

    def tell(self, fact: Fact) -> None:
        """Something happened. What happens in one turn of the event loop is decided together,
        so that requests that arrive together run together."""
        self._facts.append(fact)
        self._wake.set()

    def settled(self, item: int) -> None:
        """The item's message was answered for good."""
        self.items.settled(item)
        self.tell(ItemSettled(item))

    def spec_of(self, model: ModelId) -> ModelSpec:
        """What a request to a bound model must look like: the manifest's word and the file's."""
        return self._specs.get(model) or ModelSpec()

    async def run(self) -> None:
        """The worker's main loop, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            # 1. Wait until something happened, or until time alone asks for a decision.
            now = time.monotonic()
            due = self.core.next_wakeup(now)
            timer = None if due is None else loop.call_later(max(due - now, 0), self._wake.set)
            await self._wake.wait()
            if timer is not None:
                timer.cancel()
            self._wake.clear()
            # 2. See what it means for the world outside the core.
            facts, self._facts = self._facts, []
            for fact in facts:
                self._notice(fact)
            # 3. Decide.
            actions = self.core.handle(facts, time.monotonic())
            # 4. Act, in the core's order.
            for action in actions:
                self._act(action)
            # 5. Give the outbox back: every reply has its copy by now.
            self.runtime.release()
            # 6. Say when nothing is left to do.
            if self.core.draining and self.core.empty:
                self.emptied.set()
            else:
                self.emptied.clear()

    async def finish(self, timeout_s: float) -> None:
        """Waits for what was begun in the background, so long, and gives up the rest."""
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=timeout_s)
            for task in late:
                log.info("task_given_up", task=task.get_name())
                task.cancel()

    def drain(self) -> None:
        self.tell(DrainAsked())

    # --- facts that concern the effects too -----------------------------------------------

    def _notice(self, fact: Fact) -> None:
        match fact:
            case wire.BatchRan():
                self._metrics.compute_seconds.observe(fact.compute_s)
                order = self._batches.pop(fact.batch, None)
                if order is not None:
                    self._metrics.inferences.ran(order.model)
            case wire.BatchFailed():
                self._batch_failed(fact)
            case wire.ModelLoaded():
                self.journal.ended(fact.model)
                self._loaded(fact)
            case wire.LoadFailed():
                self.journal.ended(fact.model)
                self._metrics.loads.labels(fact.code).inc()
                log.warning("load_failed", model=fact.model, code=fact.code, error=fact.message)
            case wire.ModelEvicted():
                self._metrics.evictions.labels(fact.tier).inc()
                log.debug("model_evicted", model=fact.model, tier=fact.tier)
            case FetchFailed():
                log.warning("fetch_failed", model=fact.model, error=fact.message)
            case DeathKept():
                self.journal.forget(fact.model)
            case EngineLost():
                self.journal.engine_lost()
                self._metrics.engine_restarts.inc()
                self._batches.clear()
            case ConsumerStarted():
                log.debug("consumer_started", subscription=fact.subscription)
            case _:
                pass

    def _batch_failed(self, fact: wire.BatchFailed) -> None:
        order = self._batches.pop(fact.batch, None)
        if order is None:
            return
        asked = self.items.request_ids(order.items)
        with bound(model=order.model, request_id=asked[0] if len(asked) == 1 else asked):
            log.warning("batch_failed", code=fact.code)
            log.debug("batch_failed", code=fact.code, error=fact.message)

    def _loaded(self, fact: wire.ModelLoaded) -> None:
        known = self._specs.get(fact.model)
        if known is not None and fact.inputs:
            self._specs[fact.model] = _with_inputs(known, fact)
        self._metrics.loads.labels("ok").inc()
        self._metrics.load_seconds.labels(fact.source, fact.tier).observe(fact.load_seconds)
        self._metrics.inferences.loaded(fact.model, fact.load_seconds)
        # A swap is nothing to tell of: there may be hundreds a second.
        log.log(
            logging.INFO if fact.source == "disk" else logging.DEBUG,
            "model_loaded",
            model=fact.model,
            tier=fact.tier,
            source=fact.source,
            architecture=fact.architecture,
            weights_bytes=fact.weights_bytes,
            workspace_bytes=max((case.workspace_bytes for case in fact.cases), default=0),
            seconds=round(fact.load_seconds, 4),
        )

    # --- actions --------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        match action:
            case RunBatch():
                requests = [self.items[item].request for item in action.items]
                self._batches[action.batch] = action
                self.runtime.run_batch(action, requests, self.spec_of(action.model))
                self._metrics.batch_rows.observe(action.rows)
            case Answer():
                self._answer(action)
            case Refuse():
                self.replier.refuse(self.items[action.item], action.fault)
            case GiveBack():
                self._metrics.given_back.inc()
                self.replier.give_back(self.items[action.item])
            case Bury():
                held = self.items[action.item]
                self.replier.bury(held, action.reason, action.fault or held.fault)
            case FetchModel():
                self._begin(self._fetch(action.model), f"fetch {action.model}")
            case LoadModel():
                self._load(action)
            case EvictModel():
                self.runtime.evict(action.model, action.tier)
            case StartConsumer():
                self.consumers.start(action)
            case StopConsumer():
                self.consumers.stop(action.subscription)
            case CloseConsumer():
                self.consumers.close(action.subscription)
            case KillEngine():
                self.runtime.kill(action.reason)
            case ForgetModel():
                self._files.pop(action.model, None)
                self._specs.pop(action.model, None)
                self.consumers.forget(action.model)
                self._metrics.gone(action.model)
            case KeepDeath():
                self._begin(self.deaths.keep(action), f"keep death {action.model}")
            case KeepProfile():
                self._begin(self._keep(action.model, action.profile), f"keep {action.model}")
            case TellPlacer():
                log.debug("news", news=action.news)
                self.reporter.news()
            case _:
                assert_never(action)

    def _load(self, action: LoadModel) -> None:
        manifest, file = self.core.state.get(action.model).manifest, self._files[action.model]
        assert manifest is not None, "only what was fetched is loaded"
        if self.core.state.get(action.model).copy != "held":  # a swap runs nothing of the file
            self.journal.begun(action.model, manifest.digest)
        self.runtime.load(
            action.model,
            file.extents,
            manifest,
            file.layout,
            action.warm,
            action.tier,
            keep_host=action.keep_host,
        )

    def _answer(self, action: Answer) -> None:
        now = time.monotonic()
        rows = sum(action.item_rows)
        outputs = self.runtime.outputs(action.batch)
        requests = [self.items[item].request for item in action.items]
        try:
            parts = answers.parts(outputs, action, requests, self.spec_of(action.model))
        except (ValueError, IndexError, InvalidRequest) as error:
            # The model gave other rows than it got, or BYTES that are not: nobody can tell
            # which are whose.
            fault = Fault("model_failed", f"the outputs do not match the batch: {error}")
            for item in action.items:
                self.replier.refuse(self.items[item], fault)
            return
        if self.spans is not None:
            ran = [self.items[item] for item in action.items]
            self.spans.ran(ran, rows, compute_s=action.compute_s)
        for item, part in zip(action.items, parts, strict=True):
            held = self.items[item]
            queue_s = max(now - action.compute_s - held.item.arrived, 0.0)
            self._metrics.queue_seconds.observe(queue_s)
            self.replier.answer(
                held, part, queue_s=queue_s, compute_s=action.compute_s, batch_rows=rows
            )

    async def _fetch(self, model: ModelId) -> None:
        device_kind = self.core.state.device_kind

        def fetch() -> tuple[ModelFetched, _File]:
            manifest = self._repository.versions.manifest(*split_model_id(model))
            extents = self._repository.files.extents(manifest.digest, self._cache_dir)
            layout = self._repository.files.layout(manifest.digest, self._cache_dir)
            profile = self._repository.profiles.get(model, device_kind)
            held = self._repository.quarantined().get(model)
            reason = None if held is None else held.reason
            return ModelFetched(model, manifest, profile, layout, reason), _File(extents, layout)

        try:
            async with self._fetching:
                fetched, self._files[model] = await in_thread(fetch, f"fetch {model}")
            self._specs[model] = fetched.manifest
        except (RoostError, OSError) as error:
            self.tell(FetchFailed(model, str(error)))
        except Exception as error:
            with bound(model=model):
                log.exception("fetch_failed")
            self.tell(FetchFailed(model, repr(error)))
        else:
            self.tell(fetched)

    async def _keep(self, model: ModelId, profile: Profile) -> None:
        profile = msgspec.structs.replace(profile, measured_at=time.time())
        try:
            await in_thread(lambda: self._repository.profiles.put(model, profile), f"keep {model}")
        except (RoostError, OSError) as error:
            with bound(model=model):
                log.warning("profile_not_kept", error=str(error))

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task_failed", task=task.get_name(), error=repr(error))
