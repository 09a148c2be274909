"""The control messages: what a worker reports, what the placer assigns. One file, since they
cross one boundary (the store). Every field that is added later gets a default."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from shared.models import Footprint
from shared.names import ModelId

Tier = Literal["disk", "host", "device"]
Phase = Literal["absent", "loading", "ready", "failed"]
"""Where a model stands on its way to the device of one worker."""


_Positive = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
"""No NaN and no infinity: one worker's word must not spoil a plan for all."""


class ModelReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One model as one worker sees it. Counters only grow, within one incarnation.

    Not followed by the garbage collector, and so are its parts: they hold no cycles, and a placer
    takes in tens of thousands of them (benchmarks/placer.py)."""

    model: ModelId
    tier: Tier
    phase: Phase
    bound: bool
    """The worker consumes the model's queue."""
    footprint: Footprint
    held: int = 0
    """Messages taken from the queue and not yet acknowledged."""
    saturated: bool = False
    """The prefetch window is full: more may wait in the broker than the worker can see."""
    requests_per_message: _Positive = 1.0
    """Of late, in the messages of the model's queue: what waits there is counted in messages."""
    arrived: int = 0
    """Requests delivered so far."""
    answered: int = 0
    busy_s: _Positive = 0.0
    """Device seconds spent on this model so far."""
    seconds_per_item: _Positive = 0.0
    """Device seconds per request at the batch size that it reaches. 0: not known yet."""
    load_seconds: _Positive = 0.0
    """From where its weights are now to the device, as far as it was measured; once they are on
    the device, what it takes from the disk. 0: not known."""
    last_used: float = 0.0
    """Unix time of the last request; 0: never asked."""
    error: str | None = None
    """Why it is `failed`."""
    suspect: bool = False
    """An engine ended as this was loaded, and it seems to be why: it is tried here once more, with
    nothing beside it, or was, and the registry does not say yet what came of that. It should be
    tried nowhere else meanwhile."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself, whole, at every heartbeat: a lost one does no harm."""

    worker: str
    incarnation: str
    """New at each start of the agent; counters start again with it."""
    seq: int
    at: float
    """Unix time."""
    device_kind: str
    device_name: str
    budget_bytes: int
    used_bytes: int
    """Sum of the footprints, as the worker believes."""
    measured_bytes: int
    """What the models take by the device's own word: NVML's (on a CPU the engine's resident
    set without shared memory), less what the engine took before any model."""
    host_budget_bytes: int = 0
    """What the host tier may hold. So much may be assigned beyond the device's budget
    (`shared.fit.fit_tiers`): the worker swaps it in as requests come. 0: there is no such tier."""
    host_used_bytes: int = 0
    generation: int = 0
    """Generation of the assignment that these bindings follow."""
    fence: int = 0
    """Highest placer's fence that the worker has seen."""
    draining: bool = False
    engine_up: bool = True
    engine_restarts: int = 0
    labels: dict[str, str] = {}
    """What models' `Placement` may ask for: the worker's settings, and `worker`, `host` and
    `device_kind`."""
    models: tuple[ModelReport, ...] = ()


class Assigned(msgspec.Struct, frozen=True):
    """One model that the placer wants bound, and why."""

    model: ModelId
    reason: str = ""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """The models that the placer wants bound on one worker: desired state, not a command.

    A model that is not in it is unbound; its weights stay as a cache until their room is
    needed. `fence` is the placer's lease generation: an older placer cannot overwrite a newer
    one's word. `generation` grows with each change for this worker.
    """

    worker: str
    fence: int
    generation: int
    models: tuple[Assigned, ...] = ()
    drain: bool = False
    """Finish and give everything back: the fleet shrinks."""
    leaving: bool = False
    """The worker was asked to leave, and is told to `drain` once nothing is assigned to it. For
    the next placer, which would not know."""
    shares: dict[str, float] = {}
    """By tenant (`Manifest.tenant`), its weight where models of several wait for the device; 1 for
    those that are not named. A worker asks nobody for it."""


MAX_BYTES: Final = 32 << 20
"""Of one message: some 100,000 models. Redis would keep half a gigabyte."""

_encoder = msgspec.msgpack.Encoder()
_report = msgspec.msgpack.Decoder(Report)
_assignment = msgspec.msgpack.Decoder(Assignment)


def encode(message: Report | Assignment) -> bytes:
    return _encoder.encode(message)


def decode_report(data: bytes) -> Report:
    """Raises `ValueError` (msgspec's errors are such) or `RecursionError` on anything else."""
    _check_size(data)
    return _report.decode(data)


def decode_assignment(data: bytes) -> Assignment:
    """Raises as `decode_report`."""
    _check_size(data)
    return _assignment.decode(data)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes, at most {MAX_BYTES:,} are read")
