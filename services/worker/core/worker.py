"""The worker's decisions: facts in, actions out; no clock, no broker, no engine.

Models (state.py), subscriptions (consumers.py) and batches (dispatch.py) meet here. Laws:
- Every item that arrives is answered, refused, given back or buried, exactly once.
- A model is consumed exactly while it is wanted, not draining, not paused, and served: on the
  device, or brought there as soon as something is asked of it.
- A batch or a load that takes too long costs the engine its life; then the suspects are tried.
"""

from __future__ import annotations

from math import inf
from typing import assert_never

from services.worker.core.consumers import Subscriptions
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
    DeathKept,
    DeathsFound,
    DrainAsked,
    EngineLost,
    EngineStarted,
    Fact,
    Fault,
    FetchFailed,
    ForgetModel,
    GiveBack,
    ItemArrived,
    ItemCancelled,
    ItemSettled,
    KeepProfile,
    LoadFailed,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    Refuse,
    TellPlacer,
)
from services.worker.core.held import Held
from services.worker.core.laws import check
from services.worker.core.moves import Moves
from services.worker.core.returns import Returns, refusal
from services.worker.core.state import WorkerState
from services.worker.core.suspects import Suspects
from services.worker.core.watchdog import Watchdog
from shared.control import ModelReport
from shared.models import ModelSpec
from shared.names import ModelId

_HOT = (ItemArrived, ItemCancelled, ItemSettled, BatchRan, ModelLoaded, ModelEvicted)
"""Facts of every request, or of every swap: most change nothing for what is wanted or consumed."""
_ARRIVALS = (ItemArrived, ItemSettled)
"""Facts that make nothing possible that was not: they leave the device as it is."""
_PROFILE_EVERY = 256
"""Batches between two looks at whether the stored profile still holds."""


class WorkerCore:
    """Feed it with `handle`; wake it by `next_wakeup`."""

    def __init__(
        self,
        *,
        max_held_bytes: int = 1 << 40,
        max_bytes_under_way: int = 1 << 40,
        max_loading: int = 4,
        share: bool = True,
        batch_timeout_s: float = 60.0,
        load_timeout_s: float = 300.0,
    ) -> None:
        """`max_loading`: loads that the engine is told of ahead, so that it copies one while it
        prepares the next. `share`: it keeps tensors that several models have once."""
        self.state = WorkerState(max_loading=max_loading, share=share)
        self.subscriptions = Subscriptions(self.state)
        self.dispatch = Dispatch(self.state, max_bytes_under_way=max_bytes_under_way)
        self.generation = 0
        self.fence = 0
        self.engine_restarts = 0
        self._held = Held(self.state, max_held_bytes)
        self._returns = Returns(self.state, self.dispatch, self._held)
        self._moves = Moves(self.state, self.dispatch)
        self._suspects = Suspects(self.state, self.dispatch)
        self._watchdog = Watchdog(
            self.state,
            self.dispatch,
            batch_timeout_s=batch_timeout_s,
            load_timeout_s=load_timeout_s,
        )
        self._ending = False
        self._drain = False
        self._batches = 0
        self._unsettled = True
        """Something happened that may change what is loaded or consumed."""
        self._next_retry: float | None = None

    def __repr__(self) -> str:
        return (
            f"WorkerCore({self.state}, {self.subscriptions}, {self.dispatch}, "
            f"{self._held}{', draining' * self.draining})"
        )

    @property
    def draining(self) -> bool:
        return self._ending or self._drain

    @property
    def empty(self) -> bool:
        """Nothing is consumed and nothing is held."""
        return not self.subscriptions.all and not self._held

    @property
    def held_bytes(self) -> int:
        return self._held.bytes

    def handle(self, facts: list[Fact], now: float) -> list[Action]:
        """What follows from these facts, and from the time. Actions are to be done in order."""
        # 1. Take in what happened.
        actions: list[Action] = []
        for fact in facts:
            self._unsettled |= not isinstance(fact, _HOT)
            actions += self._fact(fact, now)
        # 2. Let go of what is too late, and of what cannot run here any more.
        actions += self.dispatch.expire(now)
        if actions or not all(isinstance(fact, _ARRIVALS) for fact in facts):
            self._moves.happened()
        if self._unsettled:
            actions += self._returns.let_go(ending=self._ending)
        self._held.answered(actions, now)
        # 3. Hand over the batches whose turn it is, unless the engine hangs.
        actions += self._watchdog.watch(now)
        actions += self._moves.next_batches(now)
        # 4. Bring what is asked and what is wanted to where it should be; the subscriptions follow.
        retry = self._next_retry is not None and self._next_retry <= now
        whole = self._unsettled or self._suspects.among_us or retry or self._moves.pending
        self._unsettled = False
        if whole:
            actions += self.subscriptions.sweep()
        may_load = not self._ending and not self._suspects.on_trial()
        actions += self._moves.move(now, whole=whole, may_load=may_load)
        if whole or self._moves.refused:
            actions += self._consume()
        if whole:
            self._next_retry = self.state.next_retry(now)
            actions += self._forget()
        # 5. What was refused its place meanwhile lets go of its items, once it is not consumed.
        if self._moves.refused:
            back = self._returns.let_go(ending=self._ending)
            self._held.answered(back, now)
            actions += back
        return actions

    def next_wakeup(self, now: float) -> float | None:
        """When `handle` is due even if nothing happens."""
        at = min(self.dispatch.next_wakeup(now), self._watchdog.due())
        if self._next_retry is not None:
            at = min(at, self._next_retry)
        return at if at < inf else None

    def reports(self) -> tuple[ModelReport, ...]:
        """Every model that is wanted, in a tier, consumed or held."""
        return tuple(
            model.report(
                wanted=model.id in self.state.wanted,
                bound=self.subscriptions.bound(model.id),
                saturated=self.subscriptions.saturated(model.id),
            )
            for model in self.state.models.values()
            if model.stage in {"loading", "ready", "evicting"}
            or model.copy != "none"
            or model.consumers
            or model.held
            or model.unkept
            or model.id in self.state.wanted
        )

    # --- facts ----------------------------------------------------------------------------

    def _fact(self, fact: Fact, now: float) -> list[Action]:
        match fact:
            case ItemArrived():
                return self._arrived(fact, now)
            case ItemCancelled():
                item = self._held.get(fact.item)
                return [] if item is None else self.dispatch.cancelled(item)
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
            case DeathsFound():
                self._suspects.among_us = True
                return self.state.get(fact.model).found_dead(fact)
            case DeathKept():
                self.state.get(fact.model).death_kept()
                return []
            case FetchFailed():
                return self.state.fetch_failed(fact.model, fact.message, now)
            case ModelLoaded():
                return self._loaded(fact, now)
            case LoadFailed():
                return self.state.load_failed(fact, now)
            case ModelEvicted():
                return self._evicted(fact)
            case ConsumerStarted():
                started = self.subscriptions.started(fact.subscription)
                return [TellPlacer(f"{started.model} bound")] if started else []
            case ConsumerStopped() | ConsumerGone():
                return self._stopped(fact.subscription)
            case EngineStarted():
                self.state.engine_started(fact)
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
        self.dispatch.share_device(fact.shares)
        self.state.assigned(fact.models, now)
        self._held.paused &= self.state.wanted.keys()
        return []

    def _arrived(self, fact: ItemArrived, now: float) -> list[Action]:
        item = fact.item
        model = self.state.get(item.model)
        self._unsettled |= self._held.arrived(item, now)
        actions: list[Action] = []
        subscription = self.subscriptions.all.get(item.subscription)
        if subscription is not None and subscription.took():
            actions.append(TellPlacer(f"{item.model} saturated"))
        if subscription is None or subscription.phase == "stopped":
            actions.append(GiveBack(item.item, "it came after the consumer stopped"))
        elif fact.unanswerable is not None:
            actions.append(Bury(item.item, fact.unanswerable))
        elif fact.fault is not None:
            actions.append(Refuse(item.item, fact.fault))
        elif model.quarantined:
            actions.append(refusal(model, item))
        else:
            self.dispatch.add(item, model.manifest or ModelSpec())
        return actions

    def _settled(self, id_: int) -> list[Action]:
        item = self._held.settled(id_)
        if item is None:
            return []
        subscription = self.subscriptions.all.get(item.subscription)
        if subscription is not None:
            subscription.held -= 1
            self._unsettled |= subscription.phase == "stopped"
        self._unsettled |= self._held.resume()
        return []

    def _ran(self, fact: BatchRan, now: float) -> list[Action]:
        actions = self.dispatch.ran(fact.batch, fact.compute_s, fact.workspace_bytes, now)
        self._batches += 1
        self._unsettled |= self.state.overrun
        if self._batches % _PROFILE_EVERY == 0:
            for action in list(actions):
                if isinstance(action, Answer):
                    actions += self._profile(action.model)
        return actions

    def _loaded(self, fact: ModelLoaded, now: float) -> list[Action]:
        served = self.state.get(fact.model).served
        self.state.loaded(fact, now)
        self._unsettled |= not served or self.state.incomplete or self.state.overrun
        swapped = fact.source == "host" and self._batches % _PROFILE_EVERY
        return [] if served and swapped else self._profile(fact.model)

    def _evicted(self, fact: ModelEvicted) -> list[Action]:
        self.state.evicted(fact)
        model = self.state.get(fact.model)
        self._unsettled |= not model.served or model.is_due or self.state.incomplete
        return [] if model.served else self._profile(fact.model)  # it may be forgotten now

    def _profile(self, name: ModelId) -> list[Action]:
        profile = self.state.get(name).measured.to_keep(self.state.device_kind)
        return [KeepProfile(name, profile)] if profile else []

    def _stopped(self, id_: int) -> list[Action]:
        subscription = self.subscriptions.stopped(id_)
        if subscription is None:
            return []
        return [TellPlacer(f"{subscription.model} unbound"), *self._returns.unbound(subscription)]

    def _engine_lost(self, fact: EngineLost) -> list[Action]:
        self.engine_restarts += 1
        self._suspects.among_us = True
        # The batch first: whether it is guilty depends on what was loading beside it.
        batch_running = self.dispatch.under_way > 0
        actions = self.dispatch.engine_lost()
        actions += self.state.engine_lost(batch_running=batch_running)
        return [*actions, TellPlacer(f"engine lost: {fact.reason}")]

    # --- towards what is wanted -----------------------------------------------------------

    def _consume(self) -> list[Action]:
        desired: list[ModelId] = []
        if not self.draining:
            desired = [
                name
                for name in self.state.wanted
                if self.state.is_served(name) and name not in self._held.paused
            ]
        return self.subscriptions.reconcile(desired)

    def _forget(self) -> list[Action]:
        gone = self.state.forget()
        for name in gone:
            self.dispatch.forget(name)
        return [ForgetModel(name) for name in gone]

    def validate(self) -> None:
        """Raises `AssertionError` where a law does not hold."""
        check(self.state)
        self.subscriptions.validate()
        self._held.validate(self.dispatch.places())
        for model in self.state.models.values():
            running = self._moves.activity(model).running
            assert model.stage == "ready" or not running, model
