"""TorchScript files: loaded, described, run.

A TorchScript file is a program; loading it may already run parts of it. That is why this
process has no network and no credentials.

Modules are not frozen: frozen weights become constants that can neither be moved nor counted.
Tensors that were traced as constants follow `map_location` like the weights do; a device that
is written into the traced code (`torch.device("cpu")`) does not, and such a file has to be
traced for the device that it is to run on.
"""

from __future__ import annotations

import os
import threading
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any, Final

import torch

from services.worker.engine.failures import Failed
from services.worker.engine.signature import Argument, Kind, bind
from services.worker.engine.tensors import Value
from shared.models import Manifest
from shared.tensors import shown

# TorchScript is deprecated upstream; that is why it stands behind an interface here.
for _category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=_category)

_LOADING: Final = threading.Lock()
"""Concurrent loads have corrupted torch's registry of types."""
_MAX_PLANS: Final = 64
_READ_BYTES: Final = 4 << 20

_KINDS: Final[dict[str, Kind]] = {
    "TensorType": "tensor",
    "IntType": "int",
    "FloatType": "float",
    "BoolType": "bool",
    "NumberType": "number",
    "StringType": "str",
}


class TorchScriptExecutor:
    """One module on one device. Runs on one thread at a time."""

    def __init__(self, path: str, manifest: Manifest, device: torch.device) -> None:
        """Raises `Failed` (`model_failed`) for a module without a callable `forward`, and
        whatever torch raises."""
        _read_ahead(path)
        with _LOADING:
            load: Any = torch.jit.load  # torch leaves it untyped
            self._module = load(path, map_location=device)
        self._module.eval()
        self._device = device
        self._listed = manifest.inputs
        self._archived = _archived(path)
        # The method itself: a module's __call__ costs more than a small model.
        self._forward: Any = getattr(self._module, "forward", None)
        if not isinstance(self._forward, torch.ScriptMethod):
            raise Failed("model_failed", "the module has no forward method")
        self.schema = _arguments(self._forward.schema)
        self._plans: dict[tuple[str, ...], tuple[int | None, ...]] = {}

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        names = tuple(name for name, _ in inputs)
        plan = self._plans.get(names)
        if plan is None:
            plan = bind(names, self.schema, self._listed)
            if len(self._plans) < _MAX_PLANS:  # names are the clients' to choose
                self._plans[names] = plan
        return self._forward(
            *(
                argument.default if at is None else self._argument(argument, inputs[at][1])
                for argument, at in zip(self.schema, plan, strict=True)
            )
        )

    def _argument(self, argument: Argument, value: Value) -> object:
        if argument.kind != "tensor":
            return _plain(argument, value)
        if isinstance(value, list):
            raise _unsuited(argument, "takes no BYTES")
        return value.to(self._device, non_blocking=True)

    def weights_bytes(self, granule: int) -> int:
        """Parameters and buffers as they are on the device, or the archive's count of tensors
        when that is more (plain tensor attributes), and the archive's constants."""
        live = {}
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            storage = tensor.untyped_storage()
            live[storage.data_ptr()] = storage.nbytes()
        data, constants = self._archived
        total = max(_rounded(live.values(), granule), _rounded(data, granule))
        return total + _rounded(constants, granule)

    def close(self) -> None:
        del self._forward, self._module


def archived_bytes(path: str) -> int:
    """Bytes of the tensors in the file, told from the zip's directory alone.

    Raises `Failed` (`model_failed`) when the file is no zip archive.
    """
    data, constants = _archived(path)
    return sum(data) + sum(constants)


def _archived(path: str) -> tuple[list[int], list[int]]:
    """Sizes of the storages of weights and of constants. torch writes each storage once."""
    sizes: dict[str, list[int]] = {"data": [], "constants": []}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                folder = entry.filename.split("/")[1:-1]
                if len(folder) == 1 and folder[0] in sizes:
                    sizes[folder[0]].append(entry.file_size)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeError) as error:
        raise Failed("model_failed", f"not a TorchScript file: {error}") from error
    except OSError as error:
        raise Failed("model_failed", f"the file cannot be read: {error.strerror}") from error
    return sizes["data"], sizes["constants"]


def _rounded(sizes: Any, granule: int) -> int:
    return sum(-(-size // granule) * granule for size in sizes)


def _read_ahead(path: str) -> None:
    """Brings the file into the page cache. torch holds the GIL for the whole of a load, which
    stalls the batches beside it; reading from the disk need not be part of that."""
    buffer = bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 — a plain string
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass


def _arguments(schema: Any) -> tuple[Argument, ...]:
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
