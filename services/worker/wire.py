"""All messages between a worker's agent and its engine: the one file of that boundary.

Four file descriptors join the two processes, made by the agent before it starts the engine: two
`SOCK_STREAM` socket pairs for these messages (4-byte little-endian length, then msgpack), one for
batches and one for everything else, so that the thread that runs models hears of a batch from
nobody else; an *inbox* of shared memory that the agent fills with input tensors and the engine
reads, and an *outbox* that the engine fills with output tensors and the agent reads. Each region is
allocated by its writer alone; the reader says when it is done (`BatchRan`/`BatchFailed` free
the inbox bytes of the batch, `Release` frees its outbox bytes). Tensors never travel in messages.

Order: the engine runs batches in the order of `RunBatch`, and answers each exactly once. Loads
and evictions run beside the batches: what concerns one model in its own order, what makes room
before what needs it. A model is not evicted while a batch of it is under way: the agent sends
no `EvictModel` before the last answer; nor is a batch sent before `ModelLoaded`.

Trust: an engine runs strangers' programs, and one of these may speak in its name. Numbers that go
on to others, and texts, and how many there are of anything, are bounded here, by the types.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from services.worker.confinement.plan import Measure
from shared.layout import Extent, Layout
from shared.models import Case, Datatype, Manifest, TensorSpec
from shared.names import ModelId

MAX_OUTPUTS: Final = 1024
MAX_TEXT: Final = 4096
"""Characters of a name, of a message. An engine in its right mind cuts them shorter."""

Code = Literal["invalid_argument", "model_failed", "resource_exhausted", "not_found", "too_large"]
"""Why an engine could not; of shared.errors."""
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
_Difference = Annotated[int, msgspec.Meta(ge=-(2**50), le=2**50)]
"""Bytes, of which something may have been taken away twice."""
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
"""No NaN and no infinity either: what is computed from them would be none too."""
_Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in shared memory: row-major, little-endian; BYTES as the protocol frames them."""

    name: _Text
    datatype: Datatype
    shape: Annotated[tuple[_Dimension, ...], msgspec.Meta(max_length=64)]
    """Of as many dimensions as torch's tensors may have."""
    offset: _Bytes
    nbytes: _Bytes


# --- agent → engine, about models ---------------------------------------------------------


class WarmUp(msgspec.Struct, frozen=True, array_like=True):
    rows: int
    size: int = 0
    """Of the padded dimension; 0 for a model without one."""


class LoadModel(msgspec.Struct, frozen=True, tag=True):
    """Bring a model onto the device, or only into the host's memory. Answered by `ModelLoaded`
    or `LoadFailed`."""

    model: ModelId
    file: tuple[Extent, ...]
    """Where the file lies, verified: these stretches one after the other."""
    manifest: Manifest
    layout: Layout | None = None
    """None for a file that could not be taken apart, or of a format that never is."""
    warm: tuple[WarmUp, ...] = ()
    """Batches to run, with zeros, before the model is called loaded (needs known inputs); what
    they take is measured. None are needed for an architecture that is warm."""
    tier: Literal["host", "device"] = "device"
    keep_host: bool = False
    """Leave a copy in the host's memory: `tier` is reached through it. Room has been made."""


class EvictModel(msgspec.Struct, frozen=True, tag=True):
    """Give the model's bytes in this tier back. Answered by `ModelEvicted`."""

    model: ModelId
    tier: Literal["host", "device"] = "device"


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End, after what is under way."""


# --- agent → engine, about batches --------------------------------------------------------


class RunBatch(msgspec.Struct, frozen=True, tag=True):
    """Run one batch. The inputs' first dimension is the batch when the model batches; the rows
    of several requests stand in it one after the other."""

    batch: int
    model: ModelId
    rows: int
    inputs: tuple[TensorRef, ...]


class Release(msgspec.Struct, frozen=True, tag=True):
    """The agent has copied the outputs of these batches."""

    batches: tuple[int, ...]


Command = LoadModel | EvictModel | Stop
BatchCommand = RunBatch | Release

# --- engine → agent -----------------------------------------------------------------------


class EngineStarted(msgspec.Struct, frozen=True, tag=True):
    device_kind: _Text
    device_name: _Text
    device_uuid: _Text
    """For NVML; empty on a CPU."""
    capacity_bytes: _Bytes
    """What the device has in all; on a CPU the machine's memory."""
    base_bytes: _Bytes
    """What the engine takes before any model: on CUDA its context, on a CPU its own pages."""
    torch_version: _Text
    confinement: Annotated[tuple[Measure, ...], msgspec.Meta(max_length=32)] = ()
    """What keeps it in, and what the host did not grant; empty where none was asked for."""


class ModelLoaded(msgspec.Struct, frozen=True, tag=True):
    model: ModelId
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_OUTPUTS)]
    """By the file's own schema, merged with the manifest's."""
    weights_bytes: _Bytes
    """Measured: the distinct tensor storages that the model keeps in this tier, those that it
    shares with others included."""
    load_seconds: _Seconds
    cases: Annotated[tuple[Case, ...], msgspec.Meta(max_length=1024)] = ()
    """Of the warm-up runs; of another model's, when the architecture was warm."""
    tier: Literal["host", "device"] = "device"
    source: Literal["disk", "host"] = "disk"
    """Where the weights came from."""
    architecture: Literal["known", "new", "none"] = "none"
    """Whether the program was there already; `none` where every file has its own."""


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    model: ModelId
    code: Code
    """`model_failed`, or `resource_exhausted` when it does not fit."""
    message: _Text


class ModelEvicted(msgspec.Struct, frozen=True, tag=True):
    model: ModelId
    tier: Literal["host", "device"] = "device"


class BatchRan(msgspec.Struct, frozen=True, tag=True):
    batch: int
    outputs: Annotated[tuple[TensorRef, ...], msgspec.Meta(max_length=MAX_OUTPUTS)]
    compute_s: _Seconds
    """Device seconds, inputs and outputs copied included."""
    workspace_bytes: _Bytes
    """Peak bytes beyond the weights in this batch; 0 when not measured this time."""


class BatchFailed(msgspec.Struct, frozen=True, tag=True):
    batch: int
    code: Code
    """`invalid_argument` (the inputs do not suit the model), `model_failed` (the model raised),
    `resource_exhausted` (out of device memory, recovered), `not_found` (not loaded),
    `too_large` (the outputs do not fit the outbox)."""
    message: _Text


class MemoryMeasured(msgspec.Struct, frozen=True, tag=True):
    """Sent just before the answer to each load and each eviction, and when reserved memory is
    given back later."""

    used_bytes: _Difference
    """What the engine takes of the device by the engine's own measure."""
    spare_bytes: _Difference = 0
    """Of these, what is reserved for models and holds none now."""
    host_bytes: _Difference = 0
    """What the host tier holds."""
    host_spare_bytes: _Difference = 0
    """What it has reserved and holds nothing."""


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The device context is corrupted; the engine ends after this message."""

    message: _Text


Event = (
    EngineStarted
    | ModelLoaded
    | LoadFailed
    | ModelEvicted
    | BatchRan
    | BatchFailed
    | MemoryMeasured
    | EngineFailed
)

BatchEvent = BatchRan | BatchFailed
"""What comes back on the batches' socket; everything else on the other."""

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_batch_commands: msgspec.msgpack.Decoder[BatchCommand] = msgspec.msgpack.Decoder(BatchCommand)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

MAX_FRAME = 16 * 1024 * 1024


def pack(message: Command | BatchCommand | Event) -> bytes:
    """One frame, its length before it."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


def unpack_command(body: bytes | memoryview) -> Command:
    """Raises `msgspec.MsgspecError`."""
    return _commands.decode(body)


def unpack_batch_command(body: bytes | memoryview) -> BatchCommand:
    """Raises `msgspec.MsgspecError`."""
    return _batch_commands.decode(body)


def unpack_event(body: bytes | memoryview) -> Event:
    """Raises `msgspec.MsgspecError`, whatever the bytes are."""
    try:
        return _events.decode(body)
    except (UnicodeDecodeError, RecursionError) as error:  # texts, and what is nested to be skipped
        raise msgspec.DecodeError(str(error)) from None
