"""What runs TorchScript: one program for all models of an architecture, or a module of its own.

A *skeleton* is a module without weights of its own. Before a batch of a model its tensors are
pointed at that model's (`tensor.data = view`), which takes microseconds, and nothing that torch
has prepared for the graph is lost. That is right only where the program writes to none of them;
otherwise, and where a file is not understood, the model has a module to itself.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from services.worker.engine.bare import Unshareable, import_bare, name_of
from services.worker.engine.files import ScatteredFile
from services.worker.engine.importing import (
    Parts,
    Refused,
    import_program,
    load_plainly,
    read_storages,
    take_apart,
)
from services.worker.engine.purity import why_impure
from services.worker.engine.signature import Argument
from services.worker.engine.tensors import Value
from services.worker.engine.torchscript import (
    Inputs,
    arguments_of,
    evaluate,
    forward_of,
)
from services.worker.engine.views import Weights
from shared.layout import Layout
from shared.models import Manifest

__all__ = ["Skeleton", "TorchScriptExecutor", "Unshareable", "WholeExecutor"]


class Skeleton:
    """The program of one architecture.

    `point` and `run` belong to one thread; the rest may come from others.
    """

    def __init__(self, module: Any, layout: Layout, tensors: list[torch.Tensor]) -> None:
        """`tensors` are the module's in the order of the slots, without memory."""
        self._module = module
        self.forward = forward_of(module)
        self.schema: tuple[Argument, ...] = arguments_of(self.forward.schema)
        self.slots = layout.slots
        self.blocks_nbytes = [block.nbytes for block in layout.blocks]
        self.constants_nbytes: list[int] = []
        self._tensors = tensors
        self._ids = frozenset(map(id, tensors))
        self._empty = tuple(tensor.detach() for tensor in tensors)
        self._views: tuple[torch.Tensor, ...] = self._empty
        self._lock = threading.Lock()

    @classmethod
    def load(cls, file: ScatteredFile, layout: Layout, device: torch.device) -> Skeleton:
        """Raises `Unshareable`, `Failed` when the file can be no model at all, and whatever
        torch raises when memory runs out."""
        if layout.obstacle is not None:
            raise Unshareable(layout.obstacle)
        parts = _taken_apart(file)
        module, tensors = import_bare(file, parts, layout, device)
        skeleton = cls(module, layout, tensors)
        if layout.may_write:
            why = why_impure(module)
            if why is not None:
                raise Unshareable(why)
        skeleton.constants_nbytes = [each.nbytes for each in parts.constants.values()]
        return skeleton

    def check(self, views: Sequence[torch.Tensor]) -> None:
        """Raises `Unshareable` when the views are not such as the program's tensors are."""
        if len(views) != len(self.slots):
            raise Unshareable(f"{len(views)} tensors for a program with {len(self.slots)}")
        for slot, view, empty in zip(self.slots, views, self._empty, strict=True):
            if (
                view.dtype != empty.dtype
                or view.shape != slot.shape
                or view.stride() != slot.stride
                or view.device.type != empty.device.type
            ):
                raise Unshareable(f"a tensor of another kind for {name_of(slot)}")

    def run(self, arguments: Sequence[object]) -> object:
        """What `forward` returns. Tensors in it stay what they are when others are pointed at."""
        return self._apart(self.forward(*arguments))

    def _apart(self, value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.detach() if id(value) in self._ids else value
        if isinstance(value, dict):
            return {key: self._apart(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._apart(each) for each in value]
        if isinstance(value, tuple):
            values = [self._apart(each) for each in value]
            named: Any = type(value)
            return named(*values) if hasattr(value, "_fields") else tuple(values)
        return value

    def point(self, views: tuple[torch.Tensor, ...]) -> None:
        """Has the program compute with these; a no-op if it does so already. They must have
        been checked."""
        with self._lock:
            if views is not self._views:
                self._put(views)

    def detach(self, views: tuple[torch.Tensor, ...]) -> None:
        """Lets go of these, should they be in place: nothing here keeps their memory."""
        with self._lock:
            if views is self._views:
                self._put(self._empty)

    def _put(self, views: tuple[torch.Tensor, ...]) -> None:
        self._views = ()  # until all are in place, nobody's are
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.data = view
        self._views = views

    def close(self) -> None:
        """Lets go of everything; nothing else may be called after it."""
        with self._lock:
            self._views = self._empty = ()
            self._tensors.clear()
            del self._module, self.forward


class TorchScriptExecutor:
    """One model of an architecture: a skeleton that others use too, and weights. Runs on one
    thread at a time."""

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Weights,
        manifest: Manifest,
        device: torch.device,
    ) -> None:
        """`weights` may be moved while this is not running. Raises `Unshareable` when they do not
        suit the skeleton."""
        self._weights = weights
        skeleton.check(weights.views)
        self._skeleton = skeleton
        self._inputs = Inputs(skeleton.schema, manifest.inputs, device)

    @property
    def schema(self) -> tuple[Argument, ...]:
        return self._skeleton.schema

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        arguments = self._inputs.arguments(inputs)
        self._skeleton.point(self._weights.views)
        return self._skeleton.run(arguments)

    def weights_bytes(self, granule: int) -> int:
        return _rounded(
            itertools.chain(self._skeleton.blocks_nbytes, self._skeleton.constants_nbytes), granule
        )

    def close(self) -> None:
        """Lets go of the weights. The skeleton stays."""
        self._skeleton.detach(self._weights.views)
        self._weights = Weights(())


class WholeExecutor:
    """One model with a module of its own. Runs on one thread at a time."""

    def __init__(
        self, file: ScatteredFile, layout: Layout | None, manifest: Manifest, device: torch.device
    ) -> None:
        """Raises `Failed` (`model_failed`) for what is no TorchScript or has no callable
        `forward`, and whatever torch raises."""
        try:
            parts = take_apart(file)
            self._sizes = [
                each.nbytes for each in (*parts.weights.values(), *parts.constants.values())
            ]
            self._module = import_whole(file, parts, layout, device)
        except Refused as refused:
            self._module = load_plainly(file, device, manifest.id, str(refused))
            self._sizes = [file.size]
        evaluate(self._module)
        self._forward = forward_of(self._module)
        self._schema = arguments_of(self._forward.schema)
        self._inputs = Inputs(self._schema, manifest.inputs, device)

    @property
    def schema(self) -> tuple[Argument, ...]:
        return self._schema

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        result: object = self._forward(*self._inputs.arguments(inputs))
        return result

    def weights_bytes(self, granule: int) -> int:
        return _rounded(self._sizes, granule)

    def close(self) -> None:
        del self._forward, self._module


def import_whole(
    file: ScatteredFile, parts: Parts, layout: Layout | None, device: torch.device
) -> Any:
    """A module with its own weights. Raises `Refused`."""
    if device.type == "cpu":
        weights = read_storages(file, parts.weights)
        return import_program(parts, weights, read_storages(file, parts.constants))
    if layout is not None and layout.obstacle is None:
        # Weights that torch copies to the device during the import, it copies while it holds
        # the interpreter; so they come afterwards.
        try:
            return import_apart(file, parts, layout, device)
        except Unshareable:
            pass
    weights = read_storages(file, parts.weights)
    return import_program(parts, weights, read_storages(file, parts.constants), device)


def import_apart(file: ScatteredFile, parts: Parts, layout: Layout, device: torch.device) -> Any:
    """A module with its own weights, which are copied to the device by themselves. Raises
    `Unshareable` when the layout does not allow it."""
    module, tensors = import_bare(file, parts, layout, device)
    storages: list[torch.Tensor] = []
    for block in layout.blocks:
        host = torch.empty(block.nbytes, dtype=torch.uint8)
        file.read_into(block.offset, memoryview(host.numpy().data).cast("B"))
        storages.append(host.to(device))
    for slot, tensor in zip(layout.slots, tensors, strict=True):
        storage = storages[slot.block].untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype, device=device)
        tensor.data = view.set_(storage, slot.start, slot.shape, slot.stride)
    return module


def _taken_apart(file: ScatteredFile) -> Parts:
    try:
        parts = take_apart(file)
    except Refused as refused:
        raise Unshareable(str(refused)) from refused
    if parts.mentions(b"__setstate__"):
        raise Unshareable("its code has a __setstate__, which runs while it is loaded")
    return parts


def _rounded(sizes: Iterable[int], granule: int) -> int:
    return sum(-(-size // granule) * granule for size in sizes)
