"""What may be said of a model, and what is refused with a reason."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from shared.errors import InvalidRequest
from shared.models import ModelSpec, Padding, TensorSpec

IDS = TensorSpec("ids", "INT64", (-1,))
STATES = TensorSpec("states", "FP32", (-1, 8))


def padded(padding: Padding, **more: Any) -> ModelSpec:
    fields: dict[str, Any] = {"inputs": (IDS,), "max_batch_size": 8} | more
    return ModelSpec(**fields, padding=padding)


def padding(**more: Any) -> Padding:
    fields: dict[str, Any] = {"inputs": {"ids": 0}, "sizes": (16, 32)} | more
    return Padding(**fields)


def test_a_padded_model_is_declared_in_its_manifest() -> None:
    """As one writes it by hand."""
    text = b"""{
      "inputs": [{"name": "ids", "datatype": "INT64", "shape": [-1]}],
      "outputs": [{"name": "states", "datatype": "FP32", "shape": [-1, 8]}],
      "max_batch_size": 8,
      "preferred_batch_size": [4, 8],
      "padding": {"inputs": {"ids": 0}, "sizes": [16, 32], "values": {"ids": 1},
                  "outputs": {"states": 0}}
    }"""
    spec = msgspec.json.decode(text, type=ModelSpec)
    want = padding(values={"ids": 1.0}, outputs={"states": 0})
    assert spec == padded(want, outputs=(STATES,), preferred_batch_size=(4, 8))
    assert [want.holding(length) for length in (0, 16, 17, 33)] == [16, 16, 32, 33]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"inputs": {}}, "at least one input"),
        ({"sizes": ()}, "1 to 32 sizes"),
        ({"sizes": tuple(range(1, 34))}, "1 to 32 sizes"),
        ({"sizes": (32, 16)}, "ascending"),
        ({"sizes": (16, 16)}, "ascending"),
        ({"sizes": (0, 16)}, "at least 1"),
        ({"values": {"mask": 0.0}}, "'mask', which it does not pad"),
        ({"values": {"ids": math.nan}}, "finite"),
    ],
)
def test_padding_that_makes_no_sense_is_refused(fields: dict[str, Any], why: str) -> None:
    """Before any model is asked about it."""
    with pytest.raises(InvalidRequest, match=why):
        padding(**fields)


@pytest.mark.parametrize(
    ("wanted", "more", "why"),
    [
        ({}, {"max_batch_size": 0}, "max_batch_size is 0"),
        ({}, {"inputs": None}, "inputs to be declared"),
        ({"inputs": {"x": 0}}, {}, "input 'x', which the model does not have"),
        ({"inputs": {"ids": 1}}, {}, "dimension 1 of input 'ids'"),
        ({"inputs": {"ids": -1}}, {}, "dimension -1 of input 'ids'"),
        ({}, {"inputs": (TensorSpec("ids", "INT64", (4,)),)}, "is no -1"),
        ({}, {"inputs": (TensorSpec("ids", "BYTES", (-1,)),)}, "BYTES, which cannot be padded"),
        ({}, {"inputs": (TensorSpec("ids", "INT64", (-1,), optional=True),)}, "not optional"),
        ({"values": {"ids": 0.5}}, {}, "0.5 of input 'ids' is no INT64"),
        ({"values": {"ids": -1}}, {"inputs": (TensorSpec("ids", "UINT8", (-1,)),)}, "no UINT8"),
        ({"values": {"ids": 128}}, {"inputs": (TensorSpec("ids", "INT8", (-1,)),)}, "no INT8"),
        ({"values": {"ids": 2}}, {"inputs": (TensorSpec("ids", "BOOL", (-1,)),)}, "no BOOL"),
        ({"values": {"ids": 1e5}}, {"inputs": (TensorSpec("ids", "FP16", (-1,)),)}, "no FP16"),
        ({"outputs": {"y": 0}}, {"outputs": (STATES,)}, "output 'y', which the model does not"),
        ({"outputs": {"states": 1}}, {"outputs": (STATES,)}, "dimension 1 of output 'states'"),
    ],
)
def test_padding_must_suit_the_model(
    wanted: dict[str, Any], more: dict[str, Any], why: str
) -> None:
    """What is declared is checked when it is declared, not with the first request."""
    with pytest.raises(InvalidRequest, match=why):
        padded(padding(**wanted), **more)


@pytest.mark.parametrize("sizes", [(0,), (8, 4), (4, 4), (4, 9)])
def test_preferred_sizes_are_sizes_that_may_run(sizes: tuple[int, ...]) -> None:
    """Ascending, up to `max_batch_size`."""
    with pytest.raises(InvalidRequest, match="which is 8"):
        ModelSpec(max_batch_size=8, preferred_batch_size=sizes)


def test_a_stateful_model_has_neither() -> None:
    """It never batches."""
    with pytest.raises(InvalidRequest, match="max_batch_size is 0"):
        padded(padding(), stateful=True, max_batch_size=0)
    with pytest.raises(InvalidRequest, match="which is 0"):
        ModelSpec(stateful=True, preferred_batch_size=(1,))
