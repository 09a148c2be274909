"""Modules without weights: their tensors are of the right kind and shape, and take no memory.

What a layout says is believed after it was found true of the module itself: it was made by
another process, perhaps of another version, from another reading of the file.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from services.worker.engine.files import ScatteredFile
from services.worker.engine.importing import (
    Parts,
    Refused,
    import_program,
    read_storages,
)
from services.worker.engine.torchscript import children, evaluate
from shared.layout import Layout, Slot

_NO_RESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""The number that Linux gives it; Python tells it from 3.13 on."""
_C: Final[Any] = torch._C  # noqa: SLF001 — private, and typed in part


class Unshareable(Exception):
    """The file needs a module of its own."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def import_bare(
    file: ScatteredFile, parts: Parts, layout: Layout, device: torch.device
) -> tuple[Any, list[torch.Tensor]]:
    """The module, evaluated, and its tensors in the order of the slots, which are still to be
    pointed at weights: they have no memory. Constants are on the device.

    Raises `Unshareable` when the layout is not true of the module.
    """
    memory = mmap.mmap(
        -1,
        max((each.nbytes for each in parts.weights.values()), default=0) or 1,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE,
    )
    unused = weakref.ref(memory)
    weights = {
        key: torch.frombuffer(memory, dtype=torch.uint8, count=record.nbytes)
        if record.nbytes
        else torch.empty(0, dtype=torch.uint8)
        for key, record in parts.weights.items()
    }
    del memory
    try:
        constants = read_storages(file, parts.constants)
        module = import_program(parts, weights, constants)
    except Refused as refused:
        raise Unshareable(str(refused)) from refused
    evaluate(module)
    tensors = _find(module, layout, parts, weights)
    _empty(tensors, device)
    weights.clear()
    if unused() is not None:
        raise Unshareable("it has a tensor that the layout does not tell of")
    if device.type != "cpu":
        move_constants(module, constants, device)
    return module, tensors


def _find(
    module: Any, layout: Layout, parts: Parts, weights: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The module's tensors in the order of the slots. Raises `Unshareable` when one is not as
    the layout says."""
    places = {
        weights[key].untyped_storage()._cdata: (record.offset, record.nbytes)  # noqa: SLF001
        for key, record in parts.weights.items()
    }
    modules: dict[tuple[str, ...], Any] = {(): module}
    tensors: list[torch.Tensor] = []
    seen: dict[int, Slot] = {}
    for slot in layout.slots:
        tensor = _attribute(modules, slot.path)
        if not isinstance(tensor, torch.Tensor):
            raise Unshareable(f"it has no tensor {name_of(slot)}")
        if (
            tensor.layout is not torch.strided
            or str(tensor.dtype) != f"torch.{slot.dtype}"
            or tensor.shape != slot.shape
            or tensor.stride() != slot.stride
            or tensor.storage_offset() != slot.start
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            raise Unshareable(f"{name_of(slot)} is not as the layout says")
        block = layout.blocks[slot.block] if 0 <= slot.block < len(layout.blocks) else None
        place = places.get(tensor.untyped_storage()._cdata)  # noqa: SLF001
        if block is None or place != (block.offset, block.nbytes):
            raise Unshareable(f"{name_of(slot)} lies elsewhere than the layout says")
        first = seen.setdefault(id(tensor), slot)
        if (first.block, first.start) != (slot.block, slot.start):
            raise Unshareable(f"{name_of(slot)} is tied to what the layout has apart")
        tensors.append(tensor)
    return tensors


def _attribute(modules: dict[tuple[str, ...], Any], path: tuple[str, ...]) -> Any:
    """What is there, or None. `modules` are those that were found before."""
    if not path:
        return modules[()]
    if path in modules:
        return modules[path]
    owner = _attribute(modules, path[:-1])
    if not isinstance(owner, _C.ScriptModule) or not owner.hasattr(path[-1]):
        return None
    found = owner.getattr(path[-1])
    if isinstance(found, _C.ScriptModule):
        modules[path] = found
    return found


def _empty(tensors: Sequence[torch.Tensor], device: torch.device) -> None:
    """Leaves them of the same kind, but without memory: one zero of each dtype, which stands for
    all the elements of all of them."""
    zeros = {
        dtype: torch.zeros((), dtype=dtype, device=device)
        for dtype in {tensor.dtype for tensor in tensors}
    }
    for tensor in tensors:
        tensor.data = zeros[tensor.dtype].expand(tensor.shape)


def move_constants(
    module: Any, constants: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """The tensors that are part of the code. An import could move them as well, but would move
    the placeholders with them, and fill them for that. Raises `Unshareable` when some are not
    found in the modules' methods."""
    missing = {storage.untyped_storage()._cdata for storage in constants.values()}  # noqa: SLF001
    moved: dict[int, torch.Tensor] = {}
    for node in _constants(module, set()):
        tensor = node.t("value")
        if id(tensor) not in moved:
            missing.discard(tensor.untyped_storage()._cdata)  # noqa: SLF001
            tensor.data = tensor.to(device)
            moved[id(tensor)] = tensor
        node.output().inferTypeFrom(tensor)
    if missing:
        raise Unshareable("some of its constants are in functions")


def _constants(module: Any, seen: set[str]) -> Iterator[Any]:
    """The nodes that hold a tensor, of each class of modules once."""
    name = module._type().qualified_name()  # noqa: SLF001
    if name in seen:
        return
    seen.add(name)
    for method in module._method_names():  # noqa: SLF001
        for node in module._get_method(method).graph.findAllNodes("prim::Constant"):  # noqa: SLF001
            if node.hasAttribute("value") and node.kindOf("value") == "t":
                yield node
    for child in children(module):
        yield from _constants(child, seen)


def name_of(slot: Slot) -> str:
    return ".".join(slot.path)[:200]
