"""TorchScript files for tests, and the plain way to run them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.worker.engine.files import ScatteredFile
from services.worker.engine.importing import read_storages
from services.worker.engine.programs import Skeleton, TorchScriptExecutor, WholeExecutor
from services.worker.engine.views import Weights
from shared.layout import Extent, Layout
from shared.layout.records import Record
from shared.layout.torchscript import read_layout
from shared.models import Manifest

CPU = torch.device("cpu")
MANIFEST = Manifest(name="m", version=1, digest="sha256:" + "0" * 64, size_bytes=1, created_at=0.0)


def scripted(module: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


def traced(module: Any, example: Sequence[torch.Tensor], path: Path) -> Path:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, tuple(example), check_trace=False).save(str(path))
    return path


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """The module with other weights: every tensor is drawn anew, where that makes sense."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            overlapping = 0 in tensor.stride() and tensor.numel() > 1
            if not overlapping and (tensor.is_floating_point() or tensor.is_complex()):
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1
                keeps_sign = "running_var" in name or "scale" in name
                tensor.copy_(drawn if keeps_sign else drawn - 0.6)
    return module


def open_file(path: Path) -> ScatteredFile:
    """In two extents, as a file is that shares tensors with others."""
    size = path.stat().st_size
    cut = size // 3
    return ScatteredFile([Extent(str(path), 0, cut), Extent(str(path), cut, size - cut)])


def views_of(path: Path, layout: Layout) -> tuple[torch.Tensor, ...]:
    """What the block store would hand out."""
    blocks = {
        str(index): Record(block.offset, block.nbytes, block.nbytes, packed=False)
        for index, block in enumerate(layout.blocks)
    }
    storages = read_storages(open_file(path), blocks)
    return tuple(
        torch.empty(0, dtype=getattr(torch, slot.dtype)).set_(
            storages[str(slot.block)].untyped_storage(), slot.start, slot.shape, slot.stride
        )
        for slot in layout.slots
    )


def skeleton_of(path: Path) -> Skeleton:
    return Skeleton.load(open_file(path), read_layout(path), CPU)


def executor_of(skeleton: Skeleton, path: Path) -> TorchScriptExecutor:
    return TorchScriptExecutor(skeleton, Weights(views_of(path, read_layout(path))), MANIFEST, CPU)


def whole_of(path: Path) -> WholeExecutor:
    return WholeExecutor(open_file(path), read_layout(path), MANIFEST, CPU)


def plain(path: Path) -> Callable[..., Any]:
    """The file as everyone else loads it."""
    return torch.jit.load(str(path)).eval().forward


def inputs_of(executor: Any, values: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(each.name, value) for each, value in zip(executor.schema, values, strict=False)]


def run(executor: Any, values: Sequence[torch.Tensor]) -> Any:
    """As the dispatch thread does it. Inputs are copied: a model may write to them."""
    with torch.inference_mode(), torch.jit.optimized_execution(should_optimize=False):
        return copied(executor.run(inputs_of(executor, [value.clone() for value in values])))


def run_plain(forward: Callable[..., Any], values: Sequence[torch.Tensor]) -> Any:
    with torch.inference_mode(), torch.jit.optimized_execution(should_optimize=False):
        return copied(forward(*(value.clone() for value in values)))


def copied(value: Any) -> Any:
    """What was returned, as it is now."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [copied(each) for each in value]
    return value


def same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and bits(left) == bits(right)
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_bits(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return left == right


def bits(tensor: torch.Tensor) -> bytes:
    plain_tensor = tensor.dequantize() if tensor.is_quantized else tensor.resolve_conj()
    return plain_tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
