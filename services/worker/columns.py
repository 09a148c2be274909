"""The inputs of a batch, laid one request after the other into shared memory.

Requests of different lengths are filled up to the batch's size on their way there: no padded
copy is made of any of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from services.worker import wire
from services.worker.arena import aligned
from shared.errors import InvalidRequest
from shared.models import Datatype, Padding
from shared.tensors import NUMPY, Tensor, from_numpy, shown
from shared.tensors import nbytes as tensor_nbytes
from shared.v2 import InferRequest


class Fill(NamedTuple):
    """How the pieces of a column become as long as the column's `shape` says."""

    axis: int
    """The dimension that is filled up; the first, the batch, is never it."""
    lengths: list[tuple[int, int]]
    """Rows and length of each piece."""
    value: bytes
    """One element."""


class Column(NamedTuple):
    """One input of a batch, in the pieces that the requests brought."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    pieces: list[bytes | memoryview]
    nbytes: int
    """In shared memory, what is filled up included."""
    fill: Fill | None = None
    """None: the pieces one after the other are the column."""


def length_of(request: InferRequest, padding: Padding) -> int:
    """A request's own size of the padded dimension, on which its inputs must agree; 0 when it
    has none of the inputs that are padded. Raises `InvalidRequest`."""
    first: Tensor | None = None
    found = 0
    for tensor in request.inputs:
        dimension = padding.inputs.get(tensor.name)
        if dimension is None:
            continue
        length = tensor.shape[dimension + 1]
        if first is None:
            first, found = tensor, length
        elif length != found:
            raise InvalidRequest(
                f"inputs {shown(first.name)} and {shown(tensor.name)} must be of one length: "
                f"their shapes are {list(first.shape)} and {list(tensor.shape)}"
            )
    return found


def gather(requests: Sequence[InferRequest], padding: Padding | None, size: int) -> list[Column]:
    """The inputs of a batch. Several requests have the same inputs, in whatever order, and
    each a first dimension of rows. What `padding` names is filled up to `size`, which no
    request exceeds; without padding `size` means nothing."""
    first, *others = requests
    padded = padding.inputs if padding is not None else {}
    if not others and not padded:
        return [Column(t.name, t.datatype, t.shape, [t.data], len(t.data)) for t in first.inputs]
    by_name = [{tensor.name: tensor for tensor in request.inputs} for request in others]
    columns: list[Column] = []
    for tensor in first.inputs:
        same = [tensor, *(inputs[tensor.name] for inputs in by_name)]
        pieces = [each.data for each in same]
        rows = sum(each.shape[0] for each in same)
        dimension = padded.get(tensor.name)
        if padding is None or dimension is None:
            shape, fill = (rows, *tensor.shape[1:]), None
            taken = sum(map(len, pieces))
        else:
            axis = dimension + 1
            shape = (rows, *tensor.shape[1:axis], size, *tensor.shape[axis + 1 :])
            taken = tensor_nbytes(tensor.datatype, shape)
            fill = None
            if any(each.shape[axis] != size for each in same):
                lengths = [(each.shape[0], each.shape[axis]) for each in same]
                fill = Fill(
                    axis, lengths, _element(padding.values.get(tensor.name, 0.0), tensor.datatype)
                )
        columns.append(Column(tensor.name, tensor.datatype, shape, pieces, taken, fill))
    return columns


def nbytes(columns: Sequence[Column]) -> int:
    """What `copy` takes in all."""
    return sum(aligned(column.nbytes) for column in columns)


def copy(columns: Sequence[Column], view: memoryview, offset: int) -> tuple[wire.TensorRef, ...]:
    """Lays the columns down from `offset` on, each at an aligned place."""
    refs = []
    for column in columns:
        if column.fill is not None:
            _copy_filled(column, column.fill, view, offset)
        else:
            at = offset
            for data in column.pieces:
                view[at : at + len(data)] = data
                at += len(data)
        refs.append(
            wire.TensorRef(column.name, column.datatype, column.shape, offset, column.nbytes)
        )
        offset += aligned(column.nbytes)
    return tuple(refs)


def _copy_filled(column: Column, fill: Fill, view: memoryview, offset: int) -> None:
    """Each piece seen as a table: what lies before the filled dimension are its lines, the
    rest is the line, of which the request has the beginning."""
    if not column.nbytes:
        return
    _, *before = column.shape[: fill.axis]
    lines = math.prod(before)
    whole = column.nbytes // (column.shape[0] * lines)
    per_length = whole // column.shape[fill.axis]
    filling = memoryview(fill.value * (whole // len(fill.value)))
    for (rows, length), data in zip(fill.lengths, column.pieces, strict=True):
        used, end = length * per_length, offset + rows * lines * whole
        if rows * lines == 1:
            # One request for one text, as a rule: cheaper than to bring numpy in.
            view[offset : offset + used] = data
            view[offset + used : end] = filling[used:]
        elif rows * lines:
            table = np.frombuffer(view[offset:end], np.uint8).reshape(-1, whole)
            table[:, used:] = np.frombuffer(filling[used:], np.uint8)
            if used:
                table[:, :used] = np.frombuffer(data, np.uint8).reshape(-1, used)
        offset = end


@functools.lru_cache(1024)
def _element(value: float, datatype: Datatype) -> bytes:
    """The one element that is put in, as its datatype has it."""
    array = np.array([value if datatype == "BF16" else NUMPY[datatype].type(value)])
    return bytes(from_numpy("", array, datatype).data)
