"""What a model returned, as named outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from services.worker.engine.failures import Failed
from services.worker.engine.signature import INDEXED
from services.worker.engine.tensors import Output, Value, sized
from shared.models import TensorSpec
from shared.tensors import shown
from shared.v2 import Limits

MAX_NAME: Final = Limits().name_chars
MAX_OUTPUTS: Final = Limits().tensors
"""As in a request: a gateway reads no more."""
_SCALAR_DTYPE: Final = {bool: torch.bool, int: torch.int64, float: torch.float64}


def named(result: object, listed: Sequence[TensorSpec] | None) -> list[Output]:
    """The outputs in the manifest's order and under its names, or all of them under their own.

    A model may return one value, a tuple or list, a dict or a named tuple, of tensors, numbers
    and strings. A manifest's name is looked for among the keys; if they are others, or none,
    `NAME__1` is the second value, and else the order decides. Values that the manifest does not
    list are dropped. Raises `Failed` (`model_failed`) for what no reply can carry.
    """
    values = _values(result)
    if listed is None:
        chosen = {name: each for name, each in values.items() if each is not None}
    else:
        chosen = _chosen(values, [spec.name for spec in listed])
    if len(chosen) > MAX_OUTPUTS:
        raise Failed("model_failed", f"{len(chosen)} outputs, a reply has {MAX_OUTPUTS} at most")
    for name in chosen:
        if len(name) > MAX_NAME:
            raise Failed(
                "model_failed",
                f"output {shown(name)} has a name of more than {MAX_NAME} characters",
            )
    return [sized(name, _value(name, each)) for name, each in chosen.items()]


def check_rows(outputs: Sequence[Output], rows: int) -> None:
    """Raises `Failed` (`model_failed`) when an output cannot be split into its requests."""
    for output in outputs:
        if not output.shape or output.shape[0] != rows:
            raise Failed(
                "model_failed",
                f"output {shown(output.name)} does not keep the batch dimension: it has shape "
                f"{list(output.shape)} for {rows} rows",
            )


def _values(result: object) -> dict[str, object]:
    """The values that were returned, by key or by `OUTPUT__<n>`."""
    if isinstance(result, dict):
        return {str(key): each for key, each in result.items()}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return dict(zip(result._fields, result, strict=True))
    strings = isinstance(result, list) and result and all(isinstance(s, str) for s in result)
    if isinstance(result, tuple | list) and not strings:
        return {f"OUTPUT__{index}": each for index, each in enumerate(result)}
    return {"OUTPUT__0": result}


def _chosen(values: dict[str, object], names: list[str]) -> dict[str, object]:
    if all(name in values for name in names):
        return {name: values[name] for name in names}
    in_order = list(values.values())
    indexed = [INDEXED.match(name) for name in names]
    places = [int(match[1]) for match in indexed if match]
    if len(places) != len(names):
        places = list(range(len(names)))
    if any(place >= len(in_order) for place in places):
        raise Failed(
            "model_failed",
            f"the model returned {len(in_order)} outputs ({', '.join(values) or 'none'}), "
            f"the manifest lists {', '.join(names)}",
        )
    return {name: in_order[place] for name, place in zip(names, places, strict=True)}


def _value(name: str, each: object) -> Value:
    if isinstance(each, torch.Tensor):
        return each
    if isinstance(each, str):
        return [each.encode()]
    if isinstance(each, list) and all(isinstance(item, str) for item in each):
        return [item.encode() for item in each]
    dtype = _SCALAR_DTYPE.get(type(each))
    if dtype is None:
        what = type(each).__name__
        raise Failed(
            "model_failed",
            f"output {shown(name)} is a {what}; a model returns a tensor, or a tuple, list or "
            "dict of tensors that is not nested",
        )
    return torch.tensor(each, dtype=dtype)
