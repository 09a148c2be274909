"""What Roost knows of a model: its signature, its manifest, and what was measured of it."""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.errors import InvalidRequest
from shared.layout.model import Share
from shared.names import ModelId, check_name, check_version, model_id

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip
"""The Open Inference Protocol's tensor datatypes."""

Format = Literal["torchscript", "export", "aotinductor"]
"""File formats for which a worker has an executor: TorchScript, `torch.export` programs and
AOTInductor packages (both `.pt2`)."""

Scalar = str | int | float | bool


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output as the model declares it."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    """-1 is a variable dimension. When the model batches, the batch dimension is left out
    (Triton's `dims`)."""
    optional: bool = False
    """An optional input may be left out of a request."""


class Padding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One variable dimension that may be filled up, so that requests of different lengths run
    in one batch: to the least of `sizes` that holds them all. A longer request runs as it is."""

    inputs: dict[str, int]
    """For each input that has the dimension, which of its `shape`'s it is (0 is the first after
    the batch dimension)."""
    sizes: tuple[int, ...]
    """Ascending, e.g. 32, 64, 128."""
    values: dict[str, float] = {}
    """What is put in, by input; 0 where nothing is said. E.g. a tokenizer's pad token, and 0
    for the attention mask, which must tell the model what was put in."""
    outputs: dict[str, int] = {}
    """Outputs that have the dimension as well: cut back to each request's own length."""


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a person may say of a model (`model.json`). Everything has a default that works
    for a file of which nothing is known."""

    format: Format = "torchscript"
    inputs: tuple[TensorSpec, ...] | None = None
    """None: unknown. Names are then checked against the file's own schema by the worker."""
    outputs: tuple[TensorSpec, ...] | None = None
    """None: unknown; outputs are named `OUTPUT__0`, `OUTPUT__1`, … or by a dict's keys."""
    max_batch_size: int = 0
    """0: the first dimension is not a batch; requests run one by one (Triton's meaning)."""
    max_queue_delay_us: int = 0
    """How long a batch may wait for company while the device is free."""
    preferred_batch_size: tuple[int, ...] = ()
    """Triton's: a batch that reaches the greatest of these that it can waits no longer; ascending,
    none above `max_batch_size`."""
    padding: Padding | None = None
    """None: only requests of the same shape run together."""
    stateful: bool = False
    """Keeps state between calls: never batched, never more than one copy."""
    target_ms: float = 100.0
    """Latency that the placer aims at for one request."""
    min_copies: int = 0
    max_copies: int | None = None
    priority: int = 0
    """Higher is placed first when memory is short."""
    parameters: dict[str, Scalar] = {}
    """Free-form; shown in the model's configuration."""

    def __post_init__(self) -> None:
        if self.max_batch_size < 0 or self.max_batch_size > 65536:
            raise InvalidRequest("max_batch_size must be from 0 to 65536")
        if self.max_queue_delay_us < 0 or self.max_queue_delay_us > 60_000_000:
            raise InvalidRequest("max_queue_delay_us must be from 0 to 60000000")
        if not 0 < self.target_ms <= 3_600_000:
            raise InvalidRequest("target_ms must be above 0 and at most 3600000")
        if self.min_copies < 0 or (self.max_copies is not None and self.max_copies < 1):
            raise InvalidRequest("min_copies must be at least 0, max_copies at least 1")
        if self.max_copies is not None and self.min_copies > self.max_copies:
            raise InvalidRequest("min_copies is above max_copies")
        if self.stateful and (self.max_batch_size or self.copies_limit(1) != 1):
            raise InvalidRequest("a stateful model cannot batch: leave max_batch_size at 0")
        for kind, specs in (("input", self.inputs), ("output", self.outputs)):
            names = [spec.name for spec in specs or ()]
            if len(set(names)) != len(names):
                raise InvalidRequest(f"two {kind}s of the model bear the same name")
            for spec in specs or ():
                if not 0 < len(spec.name) <= 256:
                    raise InvalidRequest(f"an {kind} name must have 1 to 256 characters")
                if len(spec.shape) > 8 or any(not -1 <= d < 2**31 for d in spec.shape):
                    raise InvalidRequest(
                        f"{kind} {spec.name!r}: a shape has at most 8 dimensions, each -1 or more"
                    )

    def copies_limit(self, workers: int) -> int:
        """How many workers may hold this model at once, of `workers`."""
        if self.stateful:
            return 1
        return workers if self.max_copies is None else min(workers, self.max_copies)


class Manifest(ModelSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One registered, immutable version: the spec, and the file it is about."""

    name: str
    version: int
    digest: str
    """`sha256:<64 hex digits>` of the file."""
    size_bytes: int
    created_at: float
    """Unix time of registration."""

    def __post_init__(self) -> None:
        ModelSpec.__post_init__(self)
        check_name(self.name)
        check_version(self.version)

    @property
    def id(self) -> ModelId:
        return model_id(self.name, self.version)


class Case(msgspec.Struct, frozen=True):
    """What batches of one size were measured to take."""

    rows: int
    size: int = 0
    """Of the padded dimension; 0 for a model without one."""
    seconds: float = 0.0
    """On the device, inputs and outputs copied included; 0: not measured."""
    workspace_bytes: int = 0
    """Peak bytes beyond the weights."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker measured of a model on one kind of device. Kept beside the manifest, so
    that the next worker of that kind knows before it loads."""

    device_kind: str
    """E.g. `cpu` or `cuda:NVIDIA H100 80GB HBM3`."""
    weights_bytes: int
    cases: tuple[Case, ...] = ()
    load_seconds: float = 0.0
    """From the disk to the device, warm-up included."""
    swap_seconds: float = 0.0
    """From the host's memory to the device; 0: never seen."""
    measured_at: float = 0.0

    @property
    def workspace_bytes(self) -> int:
        """The greatest of all cases."""
        return max((case.workspace_bytes for case in self.cases), default=0)


class Footprint(msgspec.Struct, frozen=True):
    """What one model takes of a device."""

    weights_bytes: int
    workspace_bytes: int = 0
    measured: bool = True
    """False: an estimate from the file's size, before the first load."""
    shares: tuple[Share, ...] = ()
    """Parts of `weights_bytes` that count once per device, however many models have them. Empty
    where sharing is off."""
