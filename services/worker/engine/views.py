"""Tensors over the blocks of a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from services.worker.engine.failures import Failed
from shared.layout import Layout, Slot


class Weights:
    """A model's tensors where they are now. When its blocks are moved, others are put here while
    it does not run: who runs it asks each time."""

    __slots__ = ("views",)

    def __init__(self, views: tuple[torch.Tensor, ...]) -> None:
        self.views = views
        """One per slot of its layout. Not to be kept: the bytes are another's once it was moved
        or evicted."""


class Spot(NamedTuple):
    """Where a block lies: all of its region as one flat tensor of a dtype, and its first byte."""

    typed: Callable[[torch.dtype], torch.Tensor]
    offset: int


def check(layout: Layout) -> tuple[torch.dtype, ...]:
    """The dtype of each slot, when every slot stays within its block: a view beyond it would
    show another model's weights. Raises `Failed` with `model_failed`."""
    dtypes: dict[str, torch.dtype] = {}
    sizes = [block.nbytes for block in layout.blocks]
    if any(size < 0 for size in sizes):
        raise Failed("model_failed", "the layout has a block of less than no bytes")
    for slot in layout.slots:
        dtype = dtypes.get(slot.dtype)
        if dtype is None:
            dtype = dtypes[slot.dtype] = _dtype(slot.dtype)
        if not (0 <= slot.block < len(sizes)) or _end(slot) * dtype.itemsize > sizes[slot.block]:
            raise Failed(
                "model_failed", f"the layout's {'.'.join(slot.path)} reaches beyond its block"
            )
    return tuple(dtypes[slot.dtype] for slot in layout.slots)


def views(
    layout: Layout, dtypes: Sequence[torch.dtype], spots: Sequence[Spot]
) -> tuple[torch.Tensor, ...]:
    """One tensor per slot. `dtypes` as `check` told them, one spot per block."""
    made = []
    for slot, dtype in zip(layout.slots, dtypes, strict=True):
        typed, offset = spots[slot.block]
        start = offset // dtype.itemsize + slot.start
        made.append(typed(dtype).as_strided(slot.shape, slot.stride, start))
    return tuple(made)


def _end(slot: Slot) -> int:
    """Elements from the block's begin to the end of the slot's last; nonsense is never within
    any block."""
    last = slot.start
    empty = False
    if slot.start < 0 or len(slot.shape) != len(slot.stride):
        return 1 << 62
    for size, stride in zip(slot.shape, slot.stride, strict=True):
        if size < 0 or stride < 0:
            return 1 << 62
        empty = empty or not size
        last += (size - 1) * stride
    return slot.start if empty else last + 1


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise Failed("model_failed", f"the layout has a tensor of unknown type {name!r}")
    return dtype
