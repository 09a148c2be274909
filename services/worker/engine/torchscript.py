"""TorchScript modules as torch's C++ has them: evaluated, described, called.

They are not wrapped into Python's `ScriptModule`, which takes longer than making them and holds
the interpreter meanwhile. Modules are not frozen either: frozen weights become constants that can
neither be moved nor counted.

TorchScript is deprecated upstream; that is why it stands behind an interface here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from services.worker.engine.failures import Failed
from services.worker.engine.signature import Argument, Kind, bind
from services.worker.engine.tensors import Value
from shared.models import TensorSpec
from shared.tensors import shown

for _category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=_category)

_MAX_PLANS: Final = 64
_C: Final[Any] = torch._C  # noqa: SLF001 — private, and typed in part

_KINDS: Final[dict[str, Kind]] = {
    "TensorType": "tensor",
    "IntType": "int",
    "FloatType": "float",
    "BoolType": "bool",
    "NumberType": "number",
    "StringType": "str",
}


def children(module: Any) -> Iterator[Any]:
    """The modules that are its attributes."""
    return (child for _, child in _C.ModuleDict(module).items())


def evaluate(module: Any) -> None:
    """What `.eval()` does: `training` is False everywhere."""
    if module.hasattr("training"):
        module.setattr("training", False)
    for child in children(module):
        evaluate(child)


def forward_of(module: Any) -> Any:
    """The method itself: a module's `__call__` costs more than a small model. Raises `Failed`
    (`model_failed`) when there is none."""
    if not module._has_method("forward"):  # noqa: SLF001
        raise Failed("model_failed", "the module has no forward method")
    return module._get_method("forward")  # noqa: SLF001


class Inputs:
    """Makes requests' inputs into the arguments of one `forward`."""

    def __init__(
        self,
        schema: tuple[Argument, ...],
        listed: Sequence[TensorSpec] | None,
        device: torch.device,
    ) -> None:
        self._schema = schema
        self._listed = listed
        self._device = device
        self._plans: dict[tuple[str, ...], tuple[int | None, ...]] = {}

    def arguments(self, inputs: Sequence[tuple[str, Value]]) -> list[object]:
        """On the device. Raises `Failed` (`invalid_argument`) for what does not suit."""
        names = tuple(name for name, _ in inputs)
        plan = self._plans.get(names)
        if plan is None:
            plan = bind(names, self._schema, self._listed)
            if len(self._plans) < _MAX_PLANS:  # names are the clients' to choose
                self._plans[names] = plan
        return [
            argument.default if at is None else self._argument(argument, inputs[at][1])
            for argument, at in zip(self._schema, plan, strict=True)
        ]

    def _argument(self, argument: Argument, value: Value) -> object:
        if argument.kind != "tensor":
            return _plain(argument, value)
        if isinstance(value, list):
            raise _unsuited(argument, "takes no BYTES")
        return value.to(self._device, non_blocking=True)


def arguments_of(schema: Any) -> tuple[Argument, ...]:
    """`forward`'s arguments after self. Raises `Failed` for one that no request can carry."""
    arguments = tuple(_described(each) for each in schema.arguments[1:])
    for argument, each in zip(arguments, schema.arguments[1:], strict=True):
        if argument.kind == "other" and not argument.optional:
            raise Failed(
                "model_failed",
                f"forward's argument {shown(argument.name)} is of type {each.type}, which no "
                "request can carry",
            )
    return arguments


def _described(each: Any) -> Argument:
    of = each.type
    optional = of.kind() == "OptionalType"
    if optional:
        of = of.getElementType()
    kind: Kind = _KINDS.get(of.kind(), "other")
    if of.kind() == "ListType" and of.getElementType().kind() == "StringType":
        kind = "strings"
    # An Optional without a default may be left out too: there is only one thing it can mean.
    default = each.default_value if each.has_default_value() else None
    return Argument(each.name, kind, optional or each.has_default_value(), default)


def _plain(argument: Argument, value: Value) -> object:
    """A number or text out of an input. Rows of several requests may stand in it; they run as
    one call, so they must agree."""
    if argument.kind in {"str", "strings"}:
        if not isinstance(value, list):
            raise _unsuited(argument, "takes BYTES")
        try:
            texts = [item.decode() for item in value]
        except UnicodeDecodeError:
            raise _unsuited(argument, "takes UTF-8 text") from None
        return texts if argument.kind == "strings" else _same(argument, texts)
    if isinstance(value, list):
        raise _unsuited(argument, "takes a number")
    number = _same(argument, value.reshape(-1).tolist())
    if argument.kind == "float":
        return float(number)
    if argument.kind == "int" and isinstance(number, float):
        raise _unsuited(argument, "takes a whole number")
    if argument.kind == "bool" and number not in {0, 1}:
        raise _unsuited(argument, "takes true or false")
    return bool(number) if argument.kind == "bool" else number


def _same(argument: Argument, values: list[Any]) -> Any:
    if not values or any(each != values[0] for each in values):
        raise _unsuited(argument, f"takes one value, not {len(values)}")
    return values[0]


def _unsuited(argument: Argument, what: str) -> Failed:
    return Failed("invalid_argument", f"input {shown(argument.name)} {what}")
