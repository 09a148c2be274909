"""A batch's outputs, parted among the requests that were in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from services.worker.columns import length_of
from services.worker.core.events import Answer
from shared.models import ModelSpec, Padding
from shared.tensors import ITEMSIZE, Tensor, shown, split_rows
from shared.v2 import InferRequest


def parts(
    outputs: Sequence[Tensor], action: Answer, requests: Sequence[InferRequest], spec: ModelSpec
) -> list[list[Tensor]]:
    """Each item's rows of every output; what was filled up is cut back to its own length.

    Raises `ValueError` when the outputs do not fit the batch, and `InvalidRequest` or
    `IndexError` when BYTES are malformed or fewer than their shape says.
    """
    if action.whole:
        return [list(outputs)]
    pieces = [split_rows(tensor, action.item_rows) for tensor in outputs]
    if spec.padding is not None and spec.padding.outputs:
        _cut_back(outputs, pieces, requests, spec.padding)
    return [[of_output[index] for of_output in pieces] for index in range(len(requests))]


def _cut_back(
    outputs: Sequence[Tensor],
    pieces: list[list[Tensor]],
    requests: Sequence[InferRequest],
    padding: Padding,
) -> None:
    """Checked even where nothing is to be cut: a model that gives other lengths than declared
    should fail with its first request, not with the first that is filled up."""
    lengths = [length_of(request, padding) for request in requests]
    size = padding.holding(max(lengths))
    given = {tensor.name: index for index, tensor in enumerate(outputs)}
    for name, dimension in padding.outputs.items():
        index = given.get(name)
        if index is None:
            raise ValueError(f"there is no output {shown(name)}, which the padding names")
        shape, axis = outputs[index].shape, dimension + 1
        if ITEMSIZE[outputs[index].datatype] is None:
            raise ValueError(f"output {shown(name)} is BYTES, which cannot be cut back")
        if len(shape) <= axis or shape[axis] != size:
            raise ValueError(
                f"output {shown(name)} has the shape {list(shape)}, its dimension {axis} should "
                f"be the {size} that the inputs were filled up to"
            )
        pieces[index] = [
            _cut(piece, axis, own) for piece, own in zip(pieces[index], lengths, strict=True)
        ]


def _cut(tensor: Tensor, axis: int, length: int) -> Tensor:
    if tensor.shape[axis] == length:
        return tensor
    itemsize = ITEMSIZE[tensor.datatype]
    assert itemsize is not None, "checked before"
    shape = (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])
    lines = math.prod(shape[:axis])
    line = math.prod(shape[axis:]) * itemsize
    if not lines or not line:
        return Tensor(tensor.name, tensor.datatype, shape, b"")
    table = np.frombuffer(tensor.data, np.uint8).reshape(lines, -1)
    return Tensor(tensor.name, tensor.datatype, shape, table[:, :line].tobytes())
