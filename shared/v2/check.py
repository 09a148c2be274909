"""A request against the model's declared signature."""

from __future__ import annotations

import numpy as np

from shared.errors import InvalidRequest
from shared.models import ModelSpec, TensorSpec
from shared.tensors import Tensor, shown
from shared.v2.messages import InferRequest


def check_inputs(request: InferRequest, spec: ModelSpec) -> int:
    """Checks the request's inputs and returns its rows: 1 when the model does not batch.

    Of a model whose inputs are unknown (None) only the batch dimension and the values are
    checked. Raises `InvalidRequest` that names the input and what was expected.
    """
    if spec.inputs is not None:
        _check_signature(request.inputs, spec.inputs, batched=spec.max_batch_size > 0)
    for tensor in request.inputs:
        if tensor.datatype == "BOOL" and len(tensor.data):
            _check_bool(tensor)
    return _rows(request.inputs, spec.max_batch_size) if spec.max_batch_size else 1


def _check_signature(
    given: tuple[Tensor, ...], declared: tuple[TensorSpec, ...], *, batched: bool
) -> None:
    by_name = {tensor.name: tensor for tensor in given}
    if len(by_name) != len(given):
        names = [tensor.name for tensor in given]
        repeated = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"input {shown(repeated)} is given more than once")
    found = 0
    for want in declared:
        tensor = by_name.get(want.name)
        if tensor is None:
            if want.optional:
                continue
            raise InvalidRequest(
                f"input {shown(want.name)} is missing: expected {_wanted(want, batched=batched)}"
            )
        found += 1
        shape = tensor.shape[1:] if batched else tensor.shape
        fits = tensor.shape or not batched
        if (
            tensor.datatype != want.datatype
            or not fits
            or (shape != want.shape and not _suits(shape, want.shape))
        ):
            raise InvalidRequest(
                f"input {shown(want.name)}: expected {_wanted(want, batched=batched)}, "
                f"got {tensor.datatype} of shape {list(tensor.shape)}"
            )
    if found != len(given):
        known = {want.name for want in declared}
        unknown = next(tensor.name for tensor in given if tensor.name not in known)
        raise InvalidRequest(
            f"input {shown(unknown)} is unknown: the model takes "
            + (", ".join(shown(want.name) for want in declared) or "no inputs")
        )


def _suits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want in {-1, size} for size, want in zip(shape, wanted, strict=True)
    )


def _wanted(want: TensorSpec, *, batched: bool) -> str:
    shape = ["rows", *want.shape] if batched else list(want.shape)
    return f"{want.datatype} of shape [{', '.join(map(str, shape))}]"


def _rows(given: tuple[Tensor, ...], most: int) -> int:
    """The first dimension, on which all inputs must agree."""
    if not given:
        raise InvalidRequest(
            "no inputs: the number of rows follows from an input's first dimension"
        )
    first = given[0]
    for tensor in given:
        if not tensor.shape:
            raise InvalidRequest(
                f"input {shown(tensor.name)}: expected a first dimension of rows, got shape []"
            )
        if tensor.shape[0] != first.shape[0]:
            raise InvalidRequest(
                f"input {shown(tensor.name)} has {tensor.shape[0]} rows, "
                f"input {shown(first.name)} has {first.shape[0]}"
            )
    rows = first.shape[0]
    if not 1 <= rows <= most:
        raise InvalidRequest(
            f"input {shown(first.name)} has {rows} rows, the model takes 1 to {most} at once"
        )
    return rows


def _check_bool(tensor: Tensor) -> None:
    values = np.frombuffer(tensor.data, dtype=np.uint8)
    if int(values.max()) > 1:
        index = int(np.argmax(values > 1))
        raise InvalidRequest(
            f"input {shown(tensor.name)}: BOOL element {index} must be 0 or 1, got {values[index]}"
        )
