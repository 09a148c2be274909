"""A model's arguments, and which of a request's inputs is which argument. Pure; no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from services.worker.engine.failures import Failed
from shared.models import Datatype, TensorSpec
from shared.tensors import shown

Kind = Literal["tensor", "int", "float", "bool", "number", "str", "strings", "other"]

SCALAR_DATATYPE: Final[dict[Kind, Datatype]] = {
    "int": "INT64",
    "float": "FP64",
    "bool": "BOOL",
    "str": "BYTES",
}
INDEXED: Final = re.compile(r".*__(\d{1,4})\Z", re.DOTALL)
"""Triton's names of what is counted: `INPUT__0`, `OUTPUT__1`."""


class Argument(NamedTuple):
    """One argument of `forward`. `other` is a type that no request can carry; such an argument
    always takes its default."""

    name: str
    kind: Kind
    optional: bool = False
    default: object = None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}{', optional' if self.optional else ''})"


def bind(
    names: Sequence[str],
    arguments: Sequence[Argument],
    listed: Sequence[TensorSpec] | None = None,
) -> tuple[int | None, ...]:
    """For each argument the position of its input in `names`, or None for its default.

    Inputs are told by the arguments' names; if that fails for any of them, by Triton's
    conventions: `INPUT__0`, `INPUT__1` count the arguments, and names that follow neither rule
    but stand in the manifest's list take its order. Raises `Failed` (`invalid_argument`) for
    what is unknown, repeated or missing, naming what the model expects.
    """
    takes = [index for index, each in enumerate(arguments) if each.kind != "other"]
    place = {arguments[index].name: index for index in takes}
    if not all(name in place for name in names):
        if all(INDEXED.match(name) for name in names):
            place = {name: at for name in names if (at := _counted(name, takes)) is not None}
        elif listed is not None:
            place = {spec.name: at for spec, at in zip(listed, takes, strict=False)}
    bound: list[int | None] = [None] * len(arguments)
    for position, name in enumerate(names):
        index = place.get(name)
        if index is None:
            raise Failed(
                "invalid_argument", f"no input {shown(name)}; the model takes {_told(arguments)}"
            )
        if bound[index] is not None:
            raise Failed("invalid_argument", f"input {shown(name)} is given twice")
        bound[index] = position
    for argument, found in zip(arguments, bound, strict=True):
        if found is None and not argument.optional:
            raise Failed(
                "invalid_argument",
                f"input {shown(argument.name)} is missing; the model takes {_told(arguments)}",
            )
    return tuple(bound)


def merge(
    arguments: Sequence[Argument], listed: Sequence[TensorSpec] | None
) -> tuple[TensorSpec, ...]:
    """What is known of the inputs: the manifest's list, and scalars that it leaves out.

    Empty when the manifest lists nothing and an argument is a tensor, whose datatype the file
    does not tell. Raises `Failed` (`model_failed`) when the manifest lists what `forward` does
    not take.
    """
    if listed is None:
        specs = [_scalar_spec(each) for each in arguments if each.kind != "other"]
        known = tuple(spec for spec in specs if spec is not None)
        return known if len(known) == len(specs) else ()
    # Everything optional: what a request may leave out is no fault of the manifest.
    lenient = [each._replace(optional=True) for each in arguments]
    try:
        bound = bind([spec.name for spec in listed], lenient, listed)
    except Failed as error:
        raise Failed("model_failed", f"the manifest does not suit the file: {error}") from None
    missing = (each for each, at in zip(arguments, bound, strict=True) if at is None)
    return (*listed, *(spec for each in missing if (spec := _scalar_spec(each)) is not None))


def _scalar_spec(argument: Argument) -> TensorSpec | None:
    datatype = SCALAR_DATATYPE.get(argument.kind)
    if datatype is None:
        return None
    return TensorSpec(argument.name, datatype, (1,), optional=argument.optional)


def _counted(name: str, takes: Sequence[int]) -> int | None:
    match = INDEXED.match(name)
    at = int(match[1]) if match else -1
    return takes[at] if 0 <= at < len(takes) else None


def _told(arguments: Sequence[Argument]) -> str:
    return ", ".join(str(each) for each in arguments if each.kind != "other") or "no inputs"
