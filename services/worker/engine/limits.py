"""What a program compiled or exported for certain shapes takes as an input. Torch itself may go on
with others: wrong numbers at best, and in native code a write beyond an end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from services.worker.engine.failures import Failed
from services.worker.engine.signature import Argument, bind
from services.worker.engine.tensors import DATATYPE, DTYPE, Value
from shared.models import TensorSpec
from shared.tensors import shown

_MAX_PLANS: Final = 64


class Span(NamedTuple):
    """Sizes that a dimension may have."""

    least: int = 0
    most: int | None = None

    def __contains__(self, size: object) -> bool:
        return (
            isinstance(size, int)
            and self.least <= size
            and (self.most is None or size <= self.most)
        )

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"{self.least}…{'' if self.most is None else self.most}"


class Limits(NamedTuple):
    """What one tensor argument takes."""

    dtype: torch.dtype
    spans: tuple[Span, ...]

    def check(self, name: str, value: Value) -> torch.Tensor:
        """Raises `Failed` (`invalid_argument`), naming both what came and what is taken."""
        if isinstance(value, list):
            raise Failed("invalid_argument", f"input {shown(name)} takes no BYTES")
        if (
            value.dtype is self.dtype
            and len(value.shape) == len(self.spans)
            and all(size in span for size, span in zip(value.shape, self.spans, strict=True))
        ):
            return value
        raise Failed(
            "invalid_argument",
            f"input {shown(name)} takes {self}, not {_named(value.dtype)} {list(value.shape)}",
        )

    def __str__(self) -> str:
        return f"{_named(self.dtype)} [{', '.join(map(str, self.spans))}]"


def declared(spec: TensorSpec, max_batch_size: int) -> Limits | None:
    """What a manifest says that an input takes; None for one that is no tensor."""
    dtype = DTYPE.get(spec.datatype)
    if dtype is None:
        return None
    spans = tuple(Span() if size < 0 else Span(size, size) for size in spec.shape)
    return Limits(dtype, (Span(0, max_batch_size), *spans) if max_batch_size else spans)


def check_batching(name: str, spans: Sequence[Span], max_batch_size: int) -> None:
    """Raises `Failed` (`model_failed`) when a program cannot take the batches that its manifest
    promises, from one row on."""
    if not max_batch_size:
        return
    rows = spans[0] if spans else Span(1, 1)
    if not spans or 1 not in rows or max_batch_size not in rows:
        takes = f"was made for {rows} rows" if spans else "has no dimension"
        raise Failed(
            "model_failed",
            f"input {shown(name)} {takes}, the manifest's max_batch_size is {max_batch_size}: "
            "export it with a dynamic first dimension (dynamic_shapes) that reaches from 1 to that",
        )


class Binder:
    """Which input is which argument, remembered by the names that requests use."""

    def __init__(self, arguments: Sequence[Argument], listed: Sequence[TensorSpec] | None) -> None:
        self._arguments = arguments
        self._listed = listed
        self._plans: dict[tuple[str, ...], tuple[int | None, ...]] = {}

    def plan(self, inputs: Sequence[tuple[str, Value]]) -> tuple[int | None, ...]:
        """For each argument the index of its input, or None. Raises like `bind`."""
        names = tuple(name for name, _ in inputs)
        plan = self._plans.get(names)
        if plan is None:
            plan = bind(names, self._arguments, self._listed)
            if len(self._plans) < _MAX_PLANS:  # names are the clients' to choose
                self._plans[names] = plan
        return plan


def _named(dtype: torch.dtype) -> str:
    return DATATYPE.get(dtype) or str(dtype).removeprefix("torch.")
