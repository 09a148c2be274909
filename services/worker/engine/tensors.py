"""Shared memory ⇄ torch. Inputs are read where they lie; outputs are copied once, into place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import torch

from services.worker.arena import Arena, aligned
from services.worker.engine.failures import Failed
from services.worker.wire import TensorRef
from shared.errors import InvalidRequest
from shared.models import Datatype, TensorSpec
from shared.tensors import frame_bytes, shown, split_bytes

DTYPE: Final[dict[Datatype, torch.dtype]] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
DATATYPE: Final[dict[torch.dtype, Datatype]] = {dtype: name for name, dtype in DTYPE.items()}
_VARIABLE: Final = 16
"""What a variable dimension is in a warm-up."""

Value: TypeAlias = torch.Tensor | list[bytes]
"""An input or output on its way; a BYTES tensor is its elements in order."""


class Output(NamedTuple):
    """An output whose size is known. `source` is on any device, in any layout."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    nbytes: int
    source: torch.Tensor | bytes


def read(arena: Arena, ref: TensorRef) -> Value:
    """The input as it lies in the inbox. No copy, so it holds until the batch is answered.

    Raises `Failed` (`invalid_argument`) when place, shape and bytes contradict each other.
    """
    count = math.prod(ref.shape)
    if ref.offset < 0 or ref.nbytes < 0 or ref.offset + ref.nbytes > arena.capacity:
        raise Failed("invalid_argument", f"input {shown(ref.name)} lies outside the inbox")
    if ref.datatype == "BYTES":
        try:
            items = split_bytes(arena.view[ref.offset : ref.offset + ref.nbytes])
        except InvalidRequest as error:
            raise Failed("invalid_argument", f"input {shown(ref.name)}: {error}") from None
        if len(items) != count:
            raise _contradiction(ref, f"{len(items)} elements")
        return items
    dtype = DTYPE[ref.datatype]
    if any(size < 0 for size in ref.shape) or count * dtype.itemsize != ref.nbytes:
        raise _contradiction(ref, f"{ref.nbytes} bytes")
    if not count:
        return torch.empty(ref.shape, dtype=dtype)
    if dtype is torch.bool:  # other bytes than 0 and 1 are undefined behaviour in a bool
        raw = torch.frombuffer(arena.view, dtype=torch.uint8, count=count, offset=ref.offset)
        return raw.reshape(ref.shape) != 0
    flat = torch.frombuffer(arena.view, dtype=dtype, count=count, offset=ref.offset)
    return flat.reshape(ref.shape)


def _contradiction(ref: TensorRef, got: str) -> Failed:
    shape = list(ref.shape)
    return Failed(
        "invalid_argument", f"input {shown(ref.name)}: {ref.datatype} {shape} is not {got}"
    )


def sized(name: str, value: Value) -> Output:
    """The output with its datatype and bytes; raises `Failed` (`model_failed`) for a tensor
    that the protocol has no datatype for."""
    if isinstance(value, list):
        data = frame_bytes(value)
        return Output(name, "BYTES", (len(value),), len(data), data)
    datatype = DATATYPE.get(value.dtype)
    if datatype is None or value.layout is not torch.strided or value.is_meta:
        what = f"{value.dtype} ({value.layout})".replace("torch.", "")
        raise Failed("model_failed", f"output {shown(name)} is {what}, which no reply can carry")
    return Output(name, datatype, tuple(value.shape), value.numel() * value.itemsize, value)


def room_for(outputs: Sequence[Output]) -> int:
    """Bytes of one block that holds them all, each aligned."""
    return sum(aligned(output.nbytes) for output in outputs)


def write(arena: Arena, offset: int, outputs: Sequence[Output]) -> tuple[TensorRef, ...]:
    """Copies outputs one after the other into the block at `offset`, of `room_for` bytes. Those
    on a device are there when the current stream has come so far."""
    refs = []
    for name, datatype, shape, nbytes, source in outputs:
        if isinstance(source, bytes):
            arena.view[offset : offset + nbytes] = source
        elif nbytes:
            count = nbytes // source.itemsize
            place = torch.frombuffer(arena.view, dtype=source.dtype, count=count, offset=offset)
            place.view(shape).copy_(source, non_blocking=True)
        refs.append(TensorRef(name, datatype, shape, offset, nbytes))
        offset += aligned(nbytes)
    return tuple(refs)


def bytes_of(value: Value) -> int:
    """What the input takes in the inbox."""
    if isinstance(value, list):
        return sum(4 + len(item) for item in value)
    return value.numel() * value.itemsize


def zeros(spec: TensorSpec, rows: int, *, batched: bool) -> Value:
    """A warm-up's input: nothing but zeros (or empty strings), on the host."""
    shape = tuple(_VARIABLE if size < 0 else size for size in spec.shape)
    if batched:
        shape = (rows, *shape)
    if spec.datatype == "BYTES":
        return [b""] * math.prod(shape)
    return torch.zeros(shape, dtype=DTYPE[spec.datatype])
