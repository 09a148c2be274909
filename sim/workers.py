"""A worker in virtual time: the real core, and what stands for its effects.

What agent, consumers, follower and reporter do with sockets (services/worker), is done here with
the broker and the engine of the simulation; the core is told of it in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from services.worker.core.events import (
    Action,
    Answer,
    Assigned,
    BatchRan,
    Bury,
    CloseConsumer,
    ConsumerStarted,
    ConsumerStopped,
    DeathKept,
    DrainAsked,
    EngineLost,
    EngineStarted,
    EvictModel,
    Fact,
    FetchModel,
    ForgetModel,
    GiveBack,
    Item,
    ItemArrived,
    ItemSettled,
    KeepDeath,
    KeepProfile,
    KillEngine,
    LoadModel,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    Refuse,
    RunBatch,
    StartConsumer,
    StopConsumer,
    TellPlacer,
)
from services.worker.core.worker import WorkerCore
from shared.control import Assignment, Report
from shared.names import ModelId
from sim.agenda import Agenda
from sim.engine import Engine, Event
from sim.model import SimModel, SimWorker
from sim.queues import Broker, Consumer
from sim.reports import Reporter
from sim.repository import Profiles, layout_of
from sim.settings import (
    BROKER_HOP_S,
    CANCEL_S,
    CONSUME_S,
    FETCH_S,
    TURN_S,
    Settings,
)

What = Literal["bound", "unbound", "loaded", "evicted", "worker_added", "worker_removed"]
"""Of `sim.model.Change`."""
_HOT = (ItemArrived, ItemSettled, BatchRan)
_SOON_S = 1e-6
"""A wake-up for now is for a moment later: the loop takes its time as well."""


class Surroundings(Protocol):
    """What a worker needs of the rest of the world."""

    def deadline(self, request: int) -> float: ...

    def answered(self, request: int, at: float) -> None: ...

    def refused(self, request: int, code: str) -> None: ...

    def reported(self, report: Report, *, news: bool) -> None: ...

    def changed(self, what: What, model: str, worker: str) -> None: ...

    def emptied(self, worker: Worker) -> None:
        """A draining worker holds nothing any more."""


class Worker:
    """Agent and engine of one device."""

    def __init__(
        self,
        spec: SimWorker,
        incarnation: int,
        agenda: Agenda,
        broker: Broker,
        models: Mapping[ModelId, SimModel],
        profiles: Profiles,
        world: Surroundings,
        settings: Settings,
        random: np.random.Generator,
    ) -> None:
        self.spec = spec
        self.core = WorkerCore()
        self.alive = True
        self.busy_before_s = 0.0
        """Of engines that are gone."""
        self.load_before_s = 0.0
        self._agenda = agenda
        self._broker = broker
        self._models = models
        self._profiles = profiles
        self._world = world
        self._settings = settings
        self._random = random
        self._facts: list[Fact] = []
        self._due = False
        """A decision is due in this moment."""
        self._wakes_at = float("inf")
        self._inbox: list[tuple[Consumer, int]] = []
        self._inbox_until = -1.0
        """What is delivered until then is taken with the first of it."""
        self._items: dict[int, tuple[Consumer, int]] = {}
        self._last_item = 0
        self._consumers: dict[int, Consumer] = {}
        self.engine = self._new_engine()
        self._reporter = Reporter(
            agenda,
            self.core,
            spec,
            f"{spec.name}-{incarnation}",
            settings.report_interval_s,
            random,
            self._measured_bytes,
            self._send_report,
        )
        agenda.at(agenda.now, self._engine_started, self.engine)

    def __repr__(self) -> str:
        return f"<Worker {self.spec.name} {self.core}>"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def busy_s(self) -> float:
        return self.busy_before_s + self.engine.busy_s

    @property
    def load_seconds(self) -> float:
        return self.load_before_s + self.engine.load_seconds

    def holds(self) -> list[int]:
        """Requests that the broker has handed to it."""
        return [request for each in self._consumers.values() for request in each.unacked]

    # --- what comes from outside ------------------------------------------------------------

    def tell(self, fact: Fact) -> None:
        """What happens in one moment is decided together."""
        self._facts.append(fact)
        self._decide_now()

    def _decide_now(self) -> None:
        if not self._due:
            self._due = True
            self._agenda.at_last(self._decide)

    def assigned(self, assignment: Assignment) -> None:
        if self.alive:
            models = tuple(entry.model for entry in assignment.models)
            drain, shares = assignment.drain, assignment.shares
            self.tell(Assigned(models, assignment.fence, assignment.generation, drain, shares))

    def drain(self) -> None:
        """SIGTERM."""
        self.tell(DrainAsked())

    def kill(self) -> None:
        """SIGKILL: its connections are gone, its report stays until its time is over."""
        self.alive = False
        self._reporter.end()
        self._end_engine()
        for consumer in self._consumers.values():
            self._broker.close(consumer)
        self._consumers.clear()

    def kill_engine(self, reason: str = "killed") -> None:
        """Another one is started."""
        self._end_engine()
        self.engine = self._new_engine()
        self.tell(EngineLost(reason))
        self._agenda.after(self._settings.engine_start_s, self._engine_started, self.engine)

    # --- the agent's loop -------------------------------------------------------------------

    def _decide(self) -> None:
        if not self.alive or not (self._due or self._facts):
            return
        self._due = False
        now = self._agenda.now
        facts, self._facts = self._facts, []
        core = self.core
        for action in core.handle(facts, now):
            self._act(action, now)
        # While nothing waits, only what is no request's can make a wake-up due: no batch hangs.
        if core.dispatch.models_waiting() or not all(isinstance(fact, _HOT) for fact in facts):
            self._wake_up(core.next_wakeup(now), now)
        if core.draining and core.empty:
            self._world.emptied(self)

    def _wake_up(self, due: float | None, now: float) -> None:
        """Of several that were asked for, the one that counts is the soonest."""
        if due is not None and due < self._wakes_at:
            self._wakes_at = max(due, now + _SOON_S)
            self._agenda.at(self._wakes_at, self._wake)

    def _wake(self) -> None:
        now = self._agenda.now
        if now < self._wakes_at or self._due or not self.alive:
            return
        self._wakes_at = float("inf")
        due = self.core.next_wakeup(now)
        if due is not None and due <= now:
            self._due = True
            self._decide()
        else:
            self._wake_up(due, now)

    def _act(self, action: Action, now: float) -> None:
        if isinstance(action, RunBatch):
            self.engine.run(action)
        elif isinstance(action, Answer):
            self._answer(action, now)
        elif isinstance(action, LoadModel | EvictModel):
            self.engine.submit(action)
        elif isinstance(action, TellPlacer):
            self._reporter.news()
        elif isinstance(action, StartConsumer):
            self._start(action)
        elif isinstance(action, StopConsumer):
            self._agenda.after(CANCEL_S / 2, self._cancel, action.subscription)
        elif isinstance(action, CloseConsumer):
            consumer = self._consumers.pop(action.subscription)
            assert not consumer.unacked, consumer
        elif isinstance(action, FetchModel):
            self._agenda.after(FETCH_S, self._fetched, action.model)
        elif isinstance(action, GiveBack):
            consumer, request = self._items.pop(action.item)
            self._broker.requeue(consumer, [request])
            self._agenda.after(BROKER_HOP_S, self._returned, action.item)
        elif isinstance(action, Refuse | Bury):
            _, request = self._items[action.item]
            fault = action.fault
            self._world.refused(request, "buried" if fault is None else fault.code)
            self._settle_soon([action.item])
        elif isinstance(action, KeepDeath):
            self._facts.append(DeathKept(action.model))  # here each worker judges for itself
        elif isinstance(action, KeepProfile):
            self._profiles.keep(action.model, action.profile)
        elif isinstance(action, KillEngine):
            self._agenda.at(now, self.kill_engine, action.reason)
        else:
            assert isinstance(action, ForgetModel), action

    # --- requests ---------------------------------------------------------------------------

    def deliver(self, consumer: Consumer, request: int) -> None:
        """By the broker."""
        self._inbox.append((consumer, request))
        now = self._agenda.now
        if now > self._inbox_until:
            self._inbox_until = now + TURN_S
            self._agenda.at(now + BROKER_HOP_S + TURN_S, self._take_inbox)

    def _take_inbox(self) -> None:
        if not self.alive:
            return
        inbox, self._inbox = self._inbox, []
        now, deadline = self._agenda.now, self._world.deadline
        for consumer, request in inbox:
            self._last_item += 1
            self._items[self._last_item] = (consumer, request)
            item = Item(
                item=self._last_item,
                model=consumer.model,
                subscription=consumer.number,
                arrived=now,
                deadline=deadline(request),
            )
            self._facts.append(ItemArrived(item))
        if inbox:
            self._decide_now()

    def _answer(self, action: Answer, now: float) -> None:
        at = now + BROKER_HOP_S
        for item in action.items:
            self._world.answered(self._items[item][1], at)
        self._settle_soon(action.items)

    def _settle_soon(self, items: Sequence[int]) -> None:
        """Once the broker has confirmed the reply."""
        self._agenda.after(BROKER_HOP_S, self._settled, items)

    def _settled(self, items: Sequence[int]) -> None:
        if not self.alive:
            return
        done: dict[Consumer, list[int]] = {}
        for item in items:
            consumer, request = self._items.pop(item)
            done.setdefault(consumer, []).append(request)
            # Of itself that makes nothing possible: it is decided on with what comes next.
            self._facts.append(ItemSettled(item))
        for consumer, requests in done.items():
            self._broker.acknowledge(consumer, requests)
            if not consumer.on:
                self._decide_now()  # it may be closed

    def _returned(self, item: int) -> None:
        if self.alive:
            self.tell(ItemSettled(item))

    # --- consumers --------------------------------------------------------------------------

    def _start(self, order: StartConsumer) -> None:
        consumer = self._broker.consumer(
            order.subscription, order.model, order.prefetch, self.deliver
        )
        self._consumers[order.subscription] = consumer
        self._agenda.after(CONSUME_S, self._started, consumer)

    def _started(self, consumer: Consumer) -> None:
        if self.alive and not consumer.ended:
            self._world.changed("bound", consumer.model, self.name)
            self.tell(ConsumerStarted(consumer.number))
            self._broker.begin(consumer)

    def _cancel(self, number: int) -> None:
        if not self.alive:
            return
        consumer = self._consumers[number]
        if consumer.on:
            self._world.changed("unbound", consumer.model, self.name)
        self._broker.cancel(consumer)
        self._agenda.after(CANCEL_S / 2, self._stopped, number)

    def _stopped(self, number: int) -> None:
        if self.alive:
            self._take_inbox()  # it came before, by the same connection
            self.tell(ConsumerStopped(number))

    # --- models -----------------------------------------------------------------------------

    def _new_engine(self) -> Engine:
        return Engine(
            self._agenda,
            self.spec,
            self._models,
            self._engine_says,
            self._random,
            self._settings.service_cv,
        )

    def _end_engine(self) -> None:
        self.engine.end()
        self.busy_before_s += self.engine.busy_s
        self.load_before_s += self.engine.load_seconds

    def _engine_started(self, engine: Engine) -> None:
        if self.alive and engine is self.engine:
            spec = self.spec
            self.tell(EngineStarted(spec.budget_bytes, spec.device_kind, spec.host_bytes))

    def _engine_says(self, event: Event) -> None:
        if isinstance(event, ModelLoaded | ModelEvicted) and event.tier == "device":
            loaded = isinstance(event, ModelLoaded)
            self._world.changed("loaded" if loaded else "evicted", event.model, self.name)
        self.tell(event)

    def _fetched(self, name: ModelId) -> None:
        if self.alive:
            model = self._models[name]
            profile = self._profiles.get(name, self.spec.device_kind)
            self.tell(ModelFetched(name, model.manifest, profile, layout_of(model)))

    def _send_report(self, report: Report, news: bool) -> None:
        self._world.reported(report, news=news)

    def _measured_bytes(self) -> int | None:
        """Of the device, once the core knows all that has happened; after which it may be gone."""
        self._decide()
        return self.engine.used_bytes() if self.alive else None
