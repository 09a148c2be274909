"""What Roost knows of a model: its signature, its manifest, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Final, Literal

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


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """One input or output as the model declares it."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    """-1 is a variable dimension. When the model batches, the batch dimension is left out
    (Triton's `dims`)."""
    optional: bool = False
    """An optional input may be left out of a request."""


MAX_TENSORS: Final = 256
"""Inputs, and outputs, of a model: as many as a request may have."""
MAX_LABELS: Final = 64
MAX_PARAMETERS: Final = 256
MAX_PARAMETER_CHARS: Final = 16_384
"""Of one value. Every service keeps every manifest in memory."""
MAX_PREFERRED: Final = 256
MAX_PADDING_SIZES: Final = 32
"""Each is run and measured before a model is called loaded."""


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

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InvalidRequest("padding must name at least one input")
        if not 1 <= len(self.sizes) <= MAX_PADDING_SIZES:
            raise InvalidRequest(f"padding must have 1 to {MAX_PADDING_SIZES} sizes")
        if not _ascending(self.sizes) or not 1 <= self.sizes[0] <= self.sizes[-1] < 2**31:
            raise InvalidRequest("the sizes of padding must be ascending, each at least 1")
        if len(self.inputs) > MAX_TENSORS or len(self.outputs) > MAX_TENSORS:
            raise InvalidRequest(f"padding names more than {MAX_TENSORS} inputs, or outputs")
        for name, value in self.values.items():
            if name not in self.inputs:
                raise InvalidRequest(f"padding has a value for {name!r}, which it does not pad")
            if not math.isfinite(value):
                raise InvalidRequest(f"the padding value of {name!r} must be a finite number")

    def holding(self, length: int) -> int:
        """The least size that holds `length`; `length` itself where none does."""
        return next((size for size in self.sizes if size >= length), length)


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """On which workers copies of a model may be. Labels are the workers' own (`Report.labels`);
    each worker also has `worker`, `host` and `device_kind`."""

    worker_selector: dict[str, str] = {}
    """Labels that a worker must have, with these values (Kubernetes' `nodeSelector`);
    `{"worker": "w3"}` pins the model to one worker."""
    spread_by: str | None = None
    """No two copies on workers that have the same value of this label (Kubernetes'
    anti-affinity with a `topologyKey`); None: at most one copy per worker, as always."""
    alone: bool = False
    """Each copy has a worker, with its engine and its device, to itself: whatever it does to an
    engine, no other model notices. It needs a worker that can be cleared for it."""

    def __post_init__(self) -> None:
        texts = [*self.worker_selector, *self.worker_selector.values(), self.spread_by or ""]
        if len(self.worker_selector) > MAX_LABELS or any(len(text) > 256 for text in texts):
            raise InvalidRequest(
                f"a placement has at most {MAX_LABELS} labels, of at most 256 characters each"
            )


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """What a person may say of a model (`model.json`). Everything has a default that works
    for a file of which nothing is known."""

    format: Format | msgspec.UnsetType = msgspec.UNSET
    """Unset: told by the file's content."""
    inputs: tuple[TensorSpec, ...] | None = None
    """None: unknown. Names are then checked against the file's own schema by the worker."""
    outputs: tuple[TensorSpec, ...] | None = None
    """None: unknown; outputs are named `OUTPUT__0`, `OUTPUT__1`, … or by a dict's keys."""
    max_batch_size: int = 0
    """0: the first dimension is not a batch; requests run one by one (Triton's meaning)."""
    max_queue_delay_us: int = 0
    """How long a batch may wait for company while the device is free."""
    preferred_batch_size: tuple[int, ...] = ()
    """Triton's: batches are made of the greatest of these for which enough waits, and such a batch
    waits no longer; ascending, none above `max_batch_size`."""
    default_priority_level: int = 0
    """Triton's: the priority of requests that name none, 1 the most urgent; 0: an ordinary one."""
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
    placement: Placement = Placement()
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
            if len(names) > MAX_TENSORS:
                raise InvalidRequest(f"a model has at most {MAX_TENSORS} {kind}s, not {len(names)}")
            if len(set(names)) != len(names):
                raise InvalidRequest(f"two {kind}s of the model bear the same name")
            for spec in specs or ():
                if not 0 < len(spec.name) <= 256:
                    raise InvalidRequest(f"an {kind} name must have 1 to 256 characters")
                if len(spec.shape) > 8 or any(not -1 <= d < 2**31 for d in spec.shape):
                    raise InvalidRequest(
                        f"{kind} {spec.name!r}: a shape has at most 8 dimensions, each -1 or more"
                    )
        if self.preferred_batch_size:
            self._check_preferred(self.preferred_batch_size)
        if not 0 <= self.default_priority_level < 2**32:
            raise InvalidRequest("default_priority_level must be from 0 to 4294967295")
        if self.padding is not None:
            self._check_padding(self.padding)
        if self.parameters:
            _check_parameters(self.parameters)

    def _check_preferred(self, sizes: tuple[int, ...]) -> None:
        if len(sizes) > MAX_PREFERRED:
            raise InvalidRequest(f"preferred_batch_size has at most {MAX_PREFERRED} sizes")
        if not _ascending(sizes) or not 1 <= sizes[0] <= sizes[-1] <= self.max_batch_size:
            raise InvalidRequest(
                "preferred_batch_size must be ascending, from 1 to max_batch_size, which is "
                f"{self.max_batch_size}"
            )

    def _check_padding(self, padding: Padding) -> None:
        if not self.max_batch_size:
            raise InvalidRequest("padding is for models that batch: max_batch_size is 0")
        if self.inputs is None:
            raise InvalidRequest("padding needs the model's inputs to be declared")
        padded = dict(_padded("input", padding.inputs, self.inputs))
        if all(spec.optional for spec in padded.values()):
            raise InvalidRequest("padding must name an input that is not optional")
        for name, spec in padded.items():
            value = padding.values.get(name, 0.0)
            if not _holds(spec.datatype, value):
                raise InvalidRequest(
                    f"the padding value {value:g} of input {name!r} is no {spec.datatype}"
                )
        if self.outputs is not None:
            for _ in _padded("output", padding.outputs, self.outputs):
                pass

    def copies_limit(self, workers: int) -> int:
        """How many workers may hold this model at once, of `workers`."""
        if self.stateful:
            return 1
        return workers if self.max_copies is None else min(workers, self.max_copies)


def _check_parameters(parameters: dict[str, Scalar]) -> None:
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidRequest(f"a model has at most {MAX_PARAMETERS} parameters")
    for name, value in parameters.items():
        size = len(value) if isinstance(value, str) else 0
        if len(name) > 256 or size > MAX_PARAMETER_CHARS:
            raise InvalidRequest(
                f"parameter {name[:40]!r}: a name has at most 256 characters, a value "
                f"{MAX_PARAMETER_CHARS:,}"
            )
        if type(value) is int and not -(2**63) <= value < 2**64:
            raise InvalidRequest(f"parameter {name[:40]!r}: a number of more than 64 bits")


def _padded(
    kind: str, dimensions: dict[str, int], specs: tuple[TensorSpec, ...]
) -> Iterator[tuple[str, TensorSpec]]:
    """What padding names, as the model declares it; raises where that cannot be padded."""
    by_name = {spec.name: spec for spec in specs}
    for name, dimension in dimensions.items():
        spec = by_name.get(name)
        if spec is None:
            raise InvalidRequest(f"padding names {kind} {name!r}, which the model does not have")
        if spec.datatype == "BYTES":
            raise InvalidRequest(f"{kind} {name!r} is BYTES, which cannot be padded")
        if not 0 <= dimension < len(spec.shape) or spec.shape[dimension] != -1:
            raise InvalidRequest(
                f"padding names dimension {dimension} of {kind} {name!r}, which is no -1 in its "
                f"shape {list(spec.shape)}"
            )
        yield name, spec


def _holds(datatype: Datatype, value: float) -> bool:
    """Whether the datatype has this value, or one near it."""
    if datatype in _GREATEST:
        return abs(value) <= _GREATEST[datatype]
    if datatype == "BOOL":
        return value in {0.0, 1.0}
    bits = int(datatype.removeprefix("U").removeprefix("INT"))
    low, high = (0, 2**bits) if datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return float(value).is_integer() and low <= value < high


_GREATEST: Final = {"FP16": 65504.0, "BF16": 3.38e38, "FP32": 3.4e38, "FP64": math.inf}


def _ascending(numbers: tuple[int, ...]) -> bool:
    return all(low < high for low, high in pairwise(numbers))


class Manifest(ModelSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One registered, immutable version: the spec, and the file it is about."""

    format: Format = "torchscript"
    name: str
    version: int
    digest: str
    """`sha256:<64 hex digits>` of the file."""
    size_bytes: int
    created_at: float
    """Unix time of registration."""
    tenant: str = ""
    """Whose it is (shared.tenants): whoever registered it. Empty: nobody's in particular."""

    def __post_init__(self) -> None:
        ModelSpec.__post_init__(self)
        check_name(self.name)
        check_version(self.version)

    @property
    def id(self) -> ModelId:
        return model_id(self.name, self.version)


class Case(msgspec.Struct, frozen=True, gc=False):
    """What batches of one size were measured to take."""

    rows: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    """Of the padded dimension; 0 for a model without one."""
    seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    """On the device, inputs and outputs copied included; 0: not measured."""
    workspace_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 0
    """Peak bytes beyond the weights."""


MAX_CASES: Final = 4096
"""In one profile. A worker keeps some hundreds."""


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker measured of a model on one kind of device. Kept beside the manifest, so
    that the next worker of that kind knows before it loads."""

    device_kind: str
    """E.g. `cpu` or `cuda:NVIDIA H100 80GB HBM3`."""
    weights_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)]
    cases: Annotated[tuple[Case, ...], msgspec.Meta(max_length=MAX_CASES)] = ()
    load_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    """From the disk to the device, warm-up included."""
    swap_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 0.0
    """From the host's memory to the device; 0: never seen."""
    measured_at: float = 0.0

    @property
    def workspace_bytes(self) -> int:
        """The greatest of all cases."""
        return max((case.workspace_bytes for case in self.cases), default=0)


class Footprint(msgspec.Struct, frozen=True, gc=False):
    """What one model takes of a device."""

    weights_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    workspace_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    measured: bool = True
    """False: an estimate from the file's size, before the first load."""
    shares: tuple[Share, ...] = ()
    """Parts of `weights_bytes` that count once per device, however many models have them. Empty
    where sharing is off."""
    pinned: bool = False
    """It never leaves the device while it is wanted: a model that keeps a state."""
    copyable: bool = True
    """A copy of its weights can wait in the host's memory, as far as is known. False: they cannot
    be told from the program, and it comes from the disk each time."""
