"""All messages between a worker's agent and its engine: the one file of that boundary.

Three file descriptors join the two processes, made by the agent before it starts the engine:
a `SOCK_STREAM` socket pair for these messages (4-byte little-endian length, then msgpack), an
*inbox* of shared memory that the agent fills with input tensors and the engine reads, and an
*outbox* that the engine fills with output tensors and the agent reads. Each region is
allocated by its writer alone; the reader says when it is done (`BatchRan`/`BatchFailed` free
the inbox bytes of the batch, `Release` frees its outbox bytes). Tensors never travel in messages.

Order: the engine runs batches in the order of `RunBatch`, and answers each exactly once. Loads
and evictions run in their own order beside the batches. A model is not evicted while a batch
of it is under way: the agent sends no `EvictModel` before the last answer.
"""

from __future__ import annotations

import msgspec

from shared.models import Datatype, Manifest, TensorSpec
from shared.names import ModelId


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in shared memory: row-major, little-endian; BYTES as the protocol frames them."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


# --- agent → engine -----------------------------------------------------------------------


class LoadModel(msgspec.Struct, frozen=True, tag=True):
    """Bring a model onto the device. Answered by `ModelLoaded` or `LoadFailed`."""

    model: ModelId
    path: str
    """A local file whose digest has been verified."""
    manifest: Manifest
    warm_rows: tuple[int, ...] = ()
    """Batch sizes to run once, with zeros, before the model is called loaded (needs known
    inputs); what they take is measured."""


class EvictModel(msgspec.Struct, frozen=True, tag=True):
    """Give the model's bytes back. Answered by `ModelEvicted`."""

    model: ModelId


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


class MeasureMemory(msgspec.Struct, frozen=True, tag=True):
    """Answered by `MemoryMeasured`."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End, after what is under way."""


Command = LoadModel | EvictModel | RunBatch | Release | MeasureMemory | Stop

# --- engine → agent -----------------------------------------------------------------------


class EngineStarted(msgspec.Struct, frozen=True, tag=True):
    device_kind: str
    device_name: str
    device_uuid: str
    """For NVML; empty on a CPU."""
    capacity_bytes: int
    """What the device has in all; on a CPU the machine's memory."""
    base_bytes: int
    """What the engine takes before any model: on CUDA its context, on a CPU its resident set."""
    torch_version: str


class ModelLoaded(msgspec.Struct, frozen=True, tag=True):
    model: ModelId
    inputs: tuple[TensorSpec, ...]
    """By the file's own schema, merged with the manifest's."""
    weights_bytes: int
    """Measured: the distinct tensor storages that the model keeps on the device."""
    workspace_bytes: dict[int, int]
    """Peak bytes beyond the weights, by rows, of the warm-up runs."""
    batch_seconds: dict[int, float]
    load_seconds: float


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    model: ModelId
    code: str
    """`model_failed`, or `resource_exhausted` when it does not fit."""
    message: str


class ModelEvicted(msgspec.Struct, frozen=True, tag=True):
    model: ModelId


class BatchRan(msgspec.Struct, frozen=True, tag=True):
    batch: int
    outputs: tuple[TensorRef, ...]
    compute_s: float
    """Device seconds, inputs and outputs copied included."""
    workspace_bytes: int
    """Peak bytes beyond the weights in this batch; 0 when not measured this time."""


class BatchFailed(msgspec.Struct, frozen=True, tag=True):
    batch: int
    code: str
    """`invalid_argument` (the inputs do not suit the model), `model_failed` (the model raised),
    `resource_exhausted` (out of device memory, recovered), `not_found` (not loaded),
    `too_large` (the outputs do not fit the outbox)."""
    message: str


class MemoryMeasured(msgspec.Struct, frozen=True, tag=True):
    used_bytes: int
    """What the engine takes of the device by the engine's own measure."""


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The device context is corrupted; the engine ends after this message."""

    message: str


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

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

MAX_FRAME = 16 * 1024 * 1024


def pack(message: Command | Event) -> bytes:
    """One frame, its length before it."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "little") + body


def unpack_command(body: bytes | memoryview) -> Command:
    """Raises `msgspec.MsgspecError`."""
    return _commands.decode(body)


def unpack_event(body: bytes | memoryview) -> Event:
    """Raises `msgspec.MsgspecError`."""
    return _events.decode(body)
