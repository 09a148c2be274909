"""A worker's core on a simulated engine in virtual time: one lane copies, another one runs.

The engine obeys in the order of its commands, and what it holds is checked at every step."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping

from services.worker.core.events import (
    Action,
    Answer,
    Assigned,
    BatchRan,
    Bury,
    ConsumerStarted,
    ConsumerStopped,
    EngineLost,
    EngineStarted,
    EvictModel,
    Fact,
    FetchModel,
    GiveBack,
    Item,
    ItemArrived,
    ItemSettled,
    LoadModel,
    ModelEvicted,
    ModelFetched,
    ModelLoaded,
    Refuse,
    RunBatch,
    StartConsumer,
    StopConsumer,
)
from services.worker.core.worker import WorkerCore
from shared.layout import Block, Layout, Share
from shared.layout.model import ALIGNMENT
from shared.models import Manifest
from shared.names import ModelId, model_id

UNIT = ALIGNMENT
"""Sizes are counted in these, since blocks are."""


def layout(size: int, shared: int = 0, architecture: str = "a") -> Layout:
    """Of `size` units, `shared` of them in common with all that have as many."""
    blocks = [Block(bytes(32), 0, UNIT)] * size
    shares = (Share(f"{shared:016}", shared * UNIT),) if shared else ()
    return Layout(architecture=architecture, blocks=tuple(blocks), shares=shares)


def manifest(name: str, **spec) -> Manifest:
    return Manifest(
        name=name, version=1, digest="sha256:" + "0" * 64, size_bytes=9, created_at=0.0, **spec
    )


class SwapWorld:
    """Models of `sizes` units on a device of `device` and a host tier of `host` units. Those that
    are `apart` are of another architecture than the others; of `whole` ones there is no copy."""

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        device: int,
        host: int,
        batch_s: float = 0.004,
        copy_s: float = 0.001,
        shared: int = 0,
        stateful: Iterable[str] = (),
        whole: Iterable[str] = (),
        apart: Iterable[str] = (),
        max_loading: int = 4,
        tenants: Mapping[str, str] | None = None,
    ) -> None:
        self.core = WorkerCore(max_loading=max_loading)
        self.sizes = {model_id(name, 1): size for name, size in sizes.items()}
        self.stateful, self.whole, self.apart = set(stateful), set(whole), set(apart)
        self.device, self.host, self.shared = device, host, shared
        self.tenants = tenants or {}
        self.batch_s, self.copy_s = batch_s, copy_s
        self.now = 0.0
        self.events: list[tuple[float, int, Fact]] = []
        self.copier_free = self.runner_free = 0.0
        self.on_device: set[ModelId] = set()
        self.in_host: set[ModelId] = set()
        self.consumers: dict[ModelId, int] = {}
        self.runs: list[ModelId] = []
        self.log: list[str] = []
        self.reads = 0
        """Loads from the disk."""
        self.loads_ended = 0
        self.done: dict[int, str] = {}
        self.answered_at: dict[int, float] = {}
        self.parked: deque[tuple[ModelId, dict]] = deque()
        self.last_item = self._order = 0
        self.engine_starts()

    def engine_starts(self) -> None:
        self.tell(EngineStarted(self.device * UNIT, "cpu", self.host * UNIT))

    def engine_dies(self) -> None:
        """And says nothing any more."""
        engines = (ModelLoaded, ModelEvicted, BatchRan)
        self.events = [event for event in self.events if not isinstance(event[2], engines)]
        heapq.heapify(self.events)
        self.on_device.clear()
        self.in_host.clear()
        self.copier_free = self.runner_free = self.now
        self.tell(EngineLost("killed"))

    def want(self, *names: str) -> None:
        models = tuple(model_id(name, 1) for name in names)
        self.tell(Assigned(models, 1, self.core.generation + 1))
        self.run(until=self.now + 10.0)

    def arrive(self, name: str, count: int = 1, **item) -> list[int]:
        """Waits in the queue where nobody consumes it."""
        model = model_id(name, 1)
        if model not in self.consumers:
            self.parked.append((model, item))
            return []
        numbers = []
        facts: list[Fact] = []
        for _ in range(count):
            self.last_item += 1
            numbers.append(self.last_item)
            subscription = self.consumers[model]
            told = {"arrived": self.now, "nbytes": 1} | item
            facts.append(
                ItemArrived(
                    Item(item=self.last_item, model=model, subscription=subscription, **told)
                )
            )
        self.tell(*facts)
        return numbers

    def later(self, at: float, fact: Fact) -> None:
        self._order += 1
        heapq.heappush(self.events, (at, self._order, fact))

    def run(self, until: float, *, check: bool = True) -> None:
        """Lets everything happen that happens by then."""
        while True:
            due = self.core.next_wakeup(self.now)
            # A microsecond later at least: time passes as things happen.
            at = until + 1 if due is None else max(due, self.now + 1e-6)
            if self.events and self.events[0][0] <= at:
                at, _, fact = heapq.heappop(self.events)
                if at > until:
                    self.later(at, fact)
                    break
                self.now = max(self.now, at)
                self.tell(fact, check=check)
            elif at <= until:
                self.now = max(self.now, at)
                self.tell(check=check)
            else:
                break
        self.now = until

    def tell(self, *facts: Fact, check: bool = True) -> None:
        self.loads_ended += sum(isinstance(fact, ModelLoaded) for fact in facts)
        actions = self.core.handle(list(facts), self.now)
        if check:
            self.core.validate()
        for action in actions:
            self.act(action)

    def act(self, action: Action) -> None:
        match action:
            case FetchModel(model=model):
                name = model.partition("/")[0]
                spec = {"stateful": True} if name in self.stateful else {"max_batch_size": 4}
                spec |= {"tenant": self.tenants.get(name, "")}
                architecture = "b" if name in self.apart else "a"
                told = layout(self.sizes[model], self.shared, architecture)
                self.tell(ModelFetched(model, manifest(name, **spec), layout=told))
            case LoadModel():
                self.load(action)
            case EvictModel(model=model, tier=tier):
                if tier == "device":
                    self.log.append(f"-{model}")
                    self.on_device.remove(model)
                    assert self.core.state.get(model).unanswered == len(
                        self.core.dispatch.waiting(model)
                    )
                else:
                    self.in_host.discard(model)
                self.later(max(self.copier_free, self.now), ModelEvicted(model, tier))
            case StartConsumer():
                self.consumers[action.model] = action.subscription
                self.tell(ConsumerStarted(action.subscription))
                for _ in range(len(self.parked)):
                    model, item = self.parked.popleft()
                    self.arrive(model.partition("/")[0], **item)
            case StopConsumer():
                self.consumers = {
                    m: id_ for m, id_ in self.consumers.items() if id_ != action.subscription
                }
                self.later(self.now, ConsumerStopped(action.subscription))
            case RunBatch():
                assert action.model in self.on_device, action
                self.runs.append(action.model)
                self.runner_free = max(self.runner_free, self.now) + self.batch_s
                self.later(self.runner_free, BatchRan(action.batch, (), self.batch_s, 0))
            case Answer():
                for item in action.items:
                    self.finish(item, "answered")
            case Refuse(item=item) | Bury(item=item):
                self.finish(item, "refused")
            case GiveBack(item=item):
                self.finish(item, "given back")

    def finish(self, item: int, how: str) -> None:
        assert item not in self.done
        self.done[item], self.answered_at[item] = how, self.now
        self.later(self.now, ItemSettled(item))

    def load(self, action: LoadModel) -> None:
        model, size = action.model, self.sizes[action.model]
        whole = model.partition("/")[0] in self.whole
        source = "host" if model in self.in_host else "disk"
        took = size * self.copy_s * (10 if source == "disk" else 1)
        self.reads += source == "disk"
        if action.tier == "device":
            self.log.append(f"+{model}")
            self.on_device.add(model)
        if (action.tier == "host" or action.keep_host) and not whole:
            self.in_host.add(model)
        self.check_tiers()
        self.copier_free = max(self.copier_free, self.now) + took
        weights = 0 if whole and action.tier == "host" else size * UNIT
        known = "none" if whole or model.partition("/")[0] in self.stateful else "known"
        self.later(
            self.copier_free,
            ModelLoaded(model, (), weights, took, (), action.tier, source, known),
        )

    def check_tiers(self) -> None:
        """Nothing is ever in a tier without room there."""
        for models, budget in ((self.on_device, self.device), (self.in_host, self.host)):
            taken = sum(self.sizes[model] - self.shared for model in models)
            taken += self.shared if models else 0
            assert taken <= budget, (sorted(models), budget)
