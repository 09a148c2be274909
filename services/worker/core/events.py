"""What the worker's core is told, and what it tells the effects to do.

Facts are in the past tense, actions in the imperative; each carries what caused it. What the
engine says is told to the core as it came (services.worker.wire). `now` in this package is
monotonic seconds; only the effects know the wall clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from services.worker.wire import (
    BatchFailed,
    BatchRan,
    EvictModel,
    LoadFailed,
    ModelEvicted,
    ModelLoaded,
    WarmUp,
)
from shared.layout import Layout
from shared.models import Manifest, Profile
from shared.names import ModelId

Kind = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, datatype and trailing shape of each input, -1 for a dimension that is padded: only items
of one kind run together."""


class Fault(msgspec.Struct, frozen=True):
    """An error as it travels: a code of shared.errors, and what to tell the caller."""

    code: str
    message: str


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the core sees it; its bytes stay with the effects."""

    item: int
    model: ModelId
    subscription: int
    rows: int = 1
    kind: Kind = ()
    nbytes: int = 0
    """Bytes of the inputs: what the item takes of the engine's inbox, and of our memory."""
    arrived: float = 0.0
    deadline: float | None = None
    priority: int = 0
    """Levels by which it is more urgent than an ordinary request of its model."""
    length: int = 0
    """Its own size of the dimension that the model has padded."""


# --- facts --------------------------------------------------------------------------------


class Assigned(msgspec.Struct, frozen=True):
    """The placer's word arrived: these models are to be bound, in this order of urgency."""

    models: tuple[ModelId, ...]
    fence: int = 0
    generation: int = 0
    drain: bool = False
    shares: Mapping[str, float] = {}
    """Weights by which tenants share device time; 1 for the others."""


class ModelFetched(msgspec.Struct, frozen=True):
    """The manifest is known and the file lies on a local disk, verified."""

    model: ModelId
    manifest: Manifest
    profile: Profile | None = None
    """What was measured of it before on this kind of device."""
    layout: Layout | None = None
    """What is in the file; None where it could not be taken apart."""
    quarantined: str | None = None
    """Why no engine is to have it, as all workers together have found (shared/quarantine.py)."""


class DeathKept(msgspec.Struct, frozen=True):
    """What `KeepDeath` told is written down, for all workers."""

    model: ModelId


class DeathsFound(msgspec.Struct, frozen=True):
    """Workers in whose place this one is ended as they loaded this file, engine and all."""

    model: ModelId
    digest: str
    deaths: int


class FetchFailed(msgspec.Struct, frozen=True):
    model: ModelId
    message: str


class ConsumerStarted(msgspec.Struct, frozen=True):
    subscription: int


class ConsumerStopped(msgspec.Struct, frozen=True):
    """The broker delivers no more; what was delivered can still be answered."""

    subscription: int


class ConsumerGone(msgspec.Struct, frozen=True):
    """The queue was deleted under the consumer."""

    subscription: int


class ItemArrived(msgspec.Struct, frozen=True):
    item: Item
    fault: Fault | None = None
    """The request is wrong: it is answered with this, and never runs."""
    unanswerable: str | None = None
    """Nobody can be answered (why): it is dead-lettered."""


class ItemCancelled(msgspec.Struct, frozen=True):
    """Its client has hung up: nobody waits for the answer."""

    item: int


class ItemSettled(msgspec.Struct, frozen=True):
    """The message was acknowledged, requeued or dead-lettered."""

    item: int


class EngineStarted(msgspec.Struct, frozen=True):
    """A fresh engine, with no model in any tier."""

    budget_bytes: int
    device_kind: str
    host_budget_bytes: int = 0
    """What copies may take of the host's memory; 0: none are kept."""


class EngineLost(msgspec.Struct, frozen=True):
    reason: str


class DrainAsked(msgspec.Struct, frozen=True):
    """This worker is to end: take nothing more, finish what runs, give back the rest."""


Fact = (
    Assigned
    | ModelFetched
    | FetchFailed
    | DeathKept
    | DeathsFound
    | ModelLoaded
    | LoadFailed
    | ModelEvicted
    | ConsumerStarted
    | ConsumerStopped
    | ConsumerGone
    | ItemArrived
    | ItemCancelled
    | ItemSettled
    | BatchRan
    | BatchFailed
    | EngineStarted
    | EngineLost
    | DrainAsked
)

# --- actions ------------------------------------------------------------------------------


class FetchModel(msgspec.Struct, frozen=True):
    """Answered by `ModelFetched` or `FetchFailed`."""

    model: ModelId


class LoadModel(msgspec.Struct, frozen=True):
    """Answered by `ModelLoaded`, `LoadFailed` or `EngineLost`. What was ordered before is done
    before, as far as it makes the room for this."""

    model: ModelId
    warm: tuple[WarmUp, ...] = ()
    tier: Literal["host", "device"] = "device"
    keep_host: bool = False
    """A copy stays in the host's memory, or comes to stay there."""


class StartConsumer(msgspec.Struct, frozen=True):
    """Answered by `ConsumerStarted`, however long that takes; or stopped before."""

    subscription: int
    model: ModelId
    prefetch: int


class StopConsumer(msgspec.Struct, frozen=True):
    """Answered by `ConsumerStopped`."""

    subscription: int


class CloseConsumer(msgspec.Struct, frozen=True):
    """Nothing of this subscription is held any more."""

    subscription: int


class RunBatch(msgspec.Struct, frozen=True):
    """Answered by `BatchRan`, `BatchFailed` or `EngineLost`."""

    batch: int
    model: ModelId
    items: tuple[int, ...]
    rows: int
    size: int = 0
    """Of the padded dimension; 0 for a model without one."""


class Answer(msgspec.Struct, frozen=True):
    """Reply to each item with its rows of the batch's outputs, then acknowledge it."""

    batch: int
    model: ModelId
    items: tuple[int, ...]
    item_rows: tuple[int, ...]
    whole: bool
    """The outputs belong to the one item as they are: its model does not batch."""
    compute_s: float


class Refuse(msgspec.Struct, frozen=True):
    """Reply with this error, then acknowledge."""

    item: int
    fault: Fault


class GiveBack(msgspec.Struct, frozen=True):
    """Return the message to its queue, for whoever takes it next."""

    item: int
    reason: str


class Bury(msgspec.Struct, frozen=True):
    """Dead-letter the message; reply with `fault` too where there is one."""

    item: int
    reason: str
    fault: Fault | None = None


class KillEngine(msgspec.Struct, frozen=True):
    """End the engine at once, and nothing else. Answered by `EngineLost`."""

    reason: str


class ForgetModel(msgspec.Struct, frozen=True):
    """The core knows nothing of it any more: nor need the effects."""

    model: ModelId


class KeepProfile(msgspec.Struct, frozen=True):
    """Write down beside the manifest what was measured."""

    model: ModelId
    profile: Profile


class KeepDeath(msgspec.Struct, frozen=True):
    """Write down for all workers that engines ended of it. Answered by `DeathKept`, however long
    that takes."""

    model: ModelId
    kind: Literal["load", "request"]
    reason: str


class TellPlacer(msgspec.Struct, frozen=True):
    """News that should not wait for the next heartbeat."""

    news: str


Action = (
    FetchModel
    | LoadModel
    | EvictModel
    | StartConsumer
    | StopConsumer
    | CloseConsumer
    | RunBatch
    | Answer
    | Refuse
    | GiveBack
    | Bury
    | KillEngine
    | ForgetModel
    | KeepDeath
    | KeepProfile
    | TellPlacer
)

__all__ = [
    "Action",
    "Answer",
    "Assigned",
    "BatchFailed",
    "BatchRan",
    "Bury",
    "CloseConsumer",
    "ConsumerGone",
    "ConsumerStarted",
    "ConsumerStopped",
    "DeathKept",
    "DeathsFound",
    "DrainAsked",
    "EngineLost",
    "EngineStarted",
    "EvictModel",
    "Fact",
    "Fault",
    "FetchFailed",
    "FetchModel",
    "ForgetModel",
    "GiveBack",
    "Item",
    "ItemArrived",
    "ItemSettled",
    "KeepDeath",
    "KeepProfile",
    "KillEngine",
    "Kind",
    "LoadFailed",
    "LoadModel",
    "ModelEvicted",
    "ModelFetched",
    "ModelLoaded",
    "Refuse",
    "RunBatch",
    "StartConsumer",
    "StopConsumer",
    "TellPlacer",
    "WarmUp",
]
