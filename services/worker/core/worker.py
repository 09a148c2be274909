"""The worker's decisions: facts in, actions out; no clock, no broker, no engine.

Models (state.py), subscriptions (consumers.py) and batches (dispatch.py) meet here. Laws:
- Every item that arrives is answered, refused, given back or buried, exactly once.
- A model is consumed exactly while it is wanted, ready, not draining and not paused.
- A batch or a load that takes too long costs the engine its life; then the suspects are tried.
- What is held stays under `max_held_bytes`, but for what was on its way when that was reached.
"""

from __future__ import annotations

from typing import assert_never

from services.worker.core.batch import Entry
from services.worker.core.consumers import Subscription, Subscriptions, prefetch_for
from services.worker.core.dispatch import Dispatch
from services.worker.core.events import (
    Action,
    Answer,
    Assigned,
    BatchFailed,
    BatchRan,
    Bury,
    ConsumerGone,
    ConsumerStarted,
    ConsumerStopped,
    DrainAsked,
    EngineLost,
    EngineStarted,
    Fact,
    Fault,
    FetchFailed,
    ForgetModel,
    GiveBack,
    Item,
    ItemArrived,
    ItemSettled,
    KeepProfile,
    KillEngine,
    LoadFailed,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    Refuse,
    StartConsumer,
    TellPlacer,
)
from services.worker.core.state import Model, WorkerState
from shared.control import ModelReport
from shared.models import ModelSpec
from shared.names import ModelId

_HOT = (ItemArrived, ItemSettled, BatchRan)
"""Facts of every request: most change nothing for the device or the subscriptions."""
_PROFILE_EVERY = 256
"""Batches between two looks at whether the stored profile still holds."""


class WorkerCore:
    """Feed it with `handle`; wake it by `next_wakeup`."""

    def __init__(
        self,
        *,
        max_held_bytes: int = 1 << 40,
        max_bytes_under_way: int = 1 << 40,
        max_loading: int = 1,
        batch_timeout_s: float = 60.0,
        load_timeout_s: float = 300.0,
    ) -> None:
        self.state = WorkerState(max_loading=max_loading)
        self.subscriptions = Subscriptions()
        self.dispatch = Dispatch(self.state, max_bytes_under_way=max_bytes_under_way)
        self.generation = 0
        self.fence = 0
        self.engine_restarts = 0
        self.held_bytes = 0
        self._max_held_bytes = max_held_bytes
        self._batch_timeout_s = batch_timeout_s
        self._load_timeout_s = load_timeout_s
        self._ending = False
        self._drain = False
        self._paused: set[ModelId] = set()
        self._items: dict[int, Item] = {}
        self._unanswered: set[int] = set()
        self._batches = 0
        self._unsettled = True
        """Something happened that may change what is loaded or consumed."""
        self._troubled = False
        """An engine was lost, and what may have done it is still among us."""
        self._next_retry: float | None = None

    def __repr__(self) -> str:
        return (
            f"WorkerCore({self.state}, {self.subscriptions}, {self.dispatch}, "
            f"{len(self._items)} held{', draining' * self.draining})"
        )

    @property
    def draining(self) -> bool:
        return self._ending or self._drain

    @property
    def empty(self) -> bool:
        """Nothing is consumed and nothing is held."""
        return not self.subscriptions.all and not self._items

    def handle(self, facts: list[Fact], now: float) -> list[Action]:
        """What follows from these facts, and from the time. Actions are to be done in order."""
        # 1. Take in what happened.
        actions: list[Action] = []
        for fact in facts:
            self._unsettled |= not isinstance(fact, _HOT)
            actions += self._fact(fact, now)
        # 2. Let go of what is too late, and of what cannot run here any more.
        actions += self.dispatch.expire(now)
        if self._unsettled:
            actions += self._let_go()
        self._count_answered(actions, now)
        # 3. Hand over the batches whose turn it is, unless the engine hangs.
        actions += self._watch(now)
        actions += self.dispatch.next_batches(now)
        # 4. Bring the device, then the subscriptions, towards what is wanted.
        retry = self._next_retry is not None and self._next_retry <= now
        if self._unsettled or self._troubled or retry:
            self._unsettled = False
            actions += self._close()
            actions += self.state.reconcile(
                now,
                batches_running=self.dispatch.under_way > 0,
                may_load=not self._ending and not self._isolation(),
            )
            actions += self._consume()
            actions += self._forget()
            self._next_retry = self.state.next_retry(now)
        return actions

    def next_wakeup(self, now: float) -> float | None:
        """When `handle` is due even if nothing happens."""
        times = [self.dispatch.next_wakeup(now), self._next_retry]
        times += [at for at, _ in self._dues()]
        return min((at for at in times if at is not None), default=None)

    def reports(self) -> tuple[ModelReport, ...]:
        """Every model that is wanted, on the device, consumed or held."""
        return tuple(
            self.state.report(
                model,
                bound=self.subscriptions.bound(model.id),
                saturated=self.subscriptions.saturated(model.id),
            )
            for model in self.state.models.values()
            if model.resident or model.consumers or model.held or model.id in self.state.wanted
        )

    # --- facts ----------------------------------------------------------------------------

    def _fact(self, fact: Fact, now: float) -> list[Action]:
        match fact:
            case ItemArrived():
                return self._arrived(fact, now)
            case ItemSettled():
                return self._settled(fact.item)
            case BatchRan():
                return self._ran(fact, now)
            case BatchFailed():
                return self.dispatch.failed(fact.batch, Fault(fact.code, fact.message), now)
            case Assigned():
                return self._assigned(fact, now)
            case ModelFetched():
                self.state.fetched(fact)
                return []
            case FetchFailed():
                return self.state.fetch_failed(fact.model, fact.message, now)
            case ModelLoaded():
                self.state.loaded(fact)
                return self._profile(fact.model)
            case LoadFailed():
                return self.state.load_failed(fact, now)
            case ModelEvicted():
                self.state.evicted(fact.model)
                return self._profile(fact.model)  # it may be forgotten now
            case ConsumerStarted():
                started = self.subscriptions.started(fact.subscription)
                return [TellPlacer(f"{started.model} bound")] if started else []
            case ConsumerStopped() | ConsumerGone():
                return self._stopped(fact.subscription)
            case EngineStarted():
                self.state.engine_started(fact.budget_bytes, fact.device_kind)
                return [TellPlacer("engine started")]
            case EngineLost():
                return self._engine_lost(fact)
            case DrainAsked():
                self._ending = True
                return [TellPlacer("draining")]
            case _:
                assert_never(fact)

    def _assigned(self, fact: Assigned, now: float) -> list[Action]:
        if (fact.fence, fact.generation) < (self.fence, self.generation):
            return []  # an older placer's word, or an older word
        self.fence, self.generation = fact.fence, fact.generation
        self._drain = fact.drain
        self.state.assigned(fact.models, now)
        self._paused &= self.state.wanted.keys()
        return []

    def _arrived(self, fact: ItemArrived, now: float) -> list[Action]:
        item = fact.item
        model = self.state.get(item.model)
        model.arrived += 1
        model.held += 1
        model.unanswered += 1
        model.last_used = now
        self._items[item.item] = item
        self._unanswered.add(item.item)
        self.held_bytes += item.nbytes
        actions: list[Action] = []
        subscription = self.subscriptions.all.get(item.subscription)
        if subscription is not None:
            subscription.held += 1
            if subscription.held == subscription.prefetch:
                actions.append(TellPlacer(f"{item.model} saturated"))
        if self.held_bytes > self._max_held_bytes:
            self._paused.add(item.model)
            self._unsettled = True
        if subscription is None or subscription.phase == "stopped":
            actions.append(GiveBack(item.item, "it came after the consumer stopped"))
        elif fact.unanswerable is not None:
            actions.append(Bury(item.item, fact.unanswerable))
        elif fact.fault is not None:
            actions.append(Refuse(item.item, fact.fault))
        elif model.quarantined:
            actions.append(Refuse(item.item, _kept_away(model)))
        else:
            self.dispatch.add(item, model.manifest or ModelSpec())
        return actions

    def _settled(self, id_: int) -> list[Action]:
        item = self._items.pop(id_, None)
        if item is None:
            return []
        self.held_bytes -= item.nbytes
        self.state.get(item.model).held -= 1
        subscription = self.subscriptions.all.get(item.subscription)
        if subscription is not None:
            subscription.held -= 1
            self._unsettled |= subscription.phase == "stopped"
        if self._paused and self.held_bytes <= self._max_held_bytes // 2:
            self._paused.clear()
            self._unsettled = True
        return []

    def _ran(self, fact: BatchRan, now: float) -> list[Action]:
        actions = self.dispatch.ran(fact.batch, fact.compute_s, fact.workspace_bytes, now)
        self._batches += 1
        self._unsettled |= self.state.overrun or self.state.quiesce
        if self._batches % _PROFILE_EVERY == 0:
            for action in list(actions):
                if isinstance(action, Answer):
                    actions += self._profile(action.model)
        return actions

    def _profile(self, name: ModelId) -> list[Action]:
        profile = self.state.get(name).measured.to_keep(self.state.device_kind)
        return [KeepProfile(name, profile)] if profile else []

    def _stopped(self, id_: int) -> list[Action]:
        subscription = self.subscriptions.stopped(id_)
        if subscription is None:
            return []
        actions: list[Action] = [TellPlacer(f"{subscription.model} unbound")]
        return actions + self._return(self._returnable(subscription), "unbound")

    def _returnable(self, subscription: Subscription) -> list[Entry]:
        """What a stopped subscription gives back: all that waits, but for what must be tried
        here again, alone. A paused one gives back only what is above the bound, newest first,
        so that what it keeps makes progress."""
        mine = [
            entry
            for entry in self.dispatch.waiting(subscription.model)
            if entry.item.subscription == subscription.id and not entry.suspect
        ]
        if subscription.model not in self._paused:
            return mine
        excess, chosen = self.held_bytes - self._max_held_bytes, []
        for entry in reversed(mine):
            if excess <= 0:
                break
            chosen.append(entry)
            excess -= entry.item.nbytes
        return chosen

    def _return(self, entries: list[Entry], reason: str) -> list[Action]:
        for model in {entry.item.model for entry in entries}:
            self.dispatch.take_out(model, [e for e in entries if e.item.model == model])
        return [GiveBack(entry.item.item, reason) for entry in entries]

    def _let_go(self) -> list[Action]:
        """Gives back what waits for a model that is not coming (again): another worker may
        run it, unless the model kills engines. While a model is being loaded again, its
        suspects wait for that."""
        actions: list[Action] = []
        for name in self.dispatch.models_waiting():
            model = self.state.get(name)
            coming = name in self.state.wanted and not self._ending and model.error is None
            if model.stage != "ready" and not coming:
                entries = list(self.dispatch.waiting(name))
                back = self._return(entries, model.error or "the model is no longer here")
                if model.quarantined:
                    back = [Refuse(entry.item.item, _kept_away(model)) for entry in entries]
                actions += back
        return actions

    def _engine_lost(self, fact: EngineLost) -> list[Action]:
        self.engine_restarts += 1
        self._troubled = True
        # The batch first: whether it is guilty depends on what was loading beside it.
        batch_running = self.dispatch.under_way > 0
        actions = self.dispatch.engine_lost()
        actions += self.state.engine_lost(batch_running=batch_running)
        return [*actions, TellPlacer(f"engine lost: {fact.reason}")]

    def _dues(self) -> list[tuple[float, str]]:
        """When what the engine does now has taken too long, and why it is killed then."""
        if self.state.condemned:
            return []
        dues = (
            self.dispatch.batch_due(self._batch_timeout_s),
            self.state.load_due(self._load_timeout_s),
        )
        return [due for due in dues if due is not None]

    def _watch(self, now: float) -> list[Action]:
        for at, reason in self._dues():
            if at <= now:
                self.state.condemned = True
                return [KillEngine(reason)]
        return []

    # --- towards what is wanted -----------------------------------------------------------

    def _isolation(self) -> bool:
        """A suspect is running, or would but for what else is under way."""
        if not self._troubled:
            return False
        suspects = self.dispatch.suspects()
        isolating = self.dispatch.isolating()
        self._troubled = (
            isolating or bool(suspects) or any(self.state.get(m).suspect for m in self.state.wanted)
        )
        return isolating or any(self.state.is_ready(entry.item.model) for entry in suspects)

    def _close(self) -> list[Action]:
        closed = self.subscriptions.sweep()
        for subscription, _ in closed:
            self.state.get(subscription.model).consumers -= 1
        return [close for _, close in closed]

    def _consume(self) -> list[Action]:
        desired: list[ModelId] = []
        if not self.draining:
            desired = [
                name
                for name in self.state.wanted
                if self.state.is_ready(name) and name not in self._paused
            ]
        actions = self.subscriptions.reconcile(desired, self._prefetch)
        for action in actions:
            if isinstance(action, StartConsumer):
                self.state.get(action.model).consumers += 1
        return actions

    def _forget(self) -> list[Action]:
        gone = self.state.forget()
        for name in gone:
            self.dispatch.forget(name)
        return [ForgetModel(name) for name in gone]

    def _prefetch(self, name: ModelId) -> int:
        return prefetch_for(self.state.get(name).manifest or ModelSpec())

    def _count_answered(self, actions: list[Action], now: float) -> None:
        """Keeps count: an item is done, for the core, once an action has said what becomes
        of it. What the effects make of that is told by `ItemSettled`."""
        for action in actions:
            match action:
                case Answer():
                    done = action.items
                case Refuse() | GiveBack() | Bury():
                    done = (action.item,)
                case _:
                    continue
            for id_ in done:
                self._unanswered.remove(id_)
                model = self.state.get(self._items[id_].model)
                model.unanswered -= 1
                if not isinstance(action, GiveBack):
                    model.answered += 1
                    model.last_used = now

    def validate(self) -> None:
        """Raises `AssertionError` where a law does not hold."""
        self.state.validate()
        self.subscriptions.validate()
        places = self.dispatch.places()
        assert len(places) == len(set(places)), f"an item is in two places: {self}"
        assert set(places) == self._unanswered, f"an item is lost: {self}"
        assert self._unanswered <= self._items.keys()
        assert self.held_bytes == sum(item.nbytes for item in self._items.values())
        for model in self.state.models.values():
            held = [item for item in self._items.values() if item.model == model.id]
            assert model.held == len(held), model
            consumers = [s for s in self.subscriptions.all.values() if s.model == model.id]
            assert model.consumers == len(consumers), model
            assert model.unanswered == sum(i.item in self._unanswered for i in held), model


def _kept_away(model: Model) -> Fault:
    return Fault("quarantined", f"{model.id} is {model.quarantined}")
