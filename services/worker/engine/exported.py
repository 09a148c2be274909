"""`torch.export` programs: loaded, described, run operator by operator.

An exported file may carry pickles, and loading it runs them. That is why this process has no
network and no credentials. Upstream promises no more than that a file loads in the version of
torch that saved it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Final, cast

import torch

from services.worker.engine.failures import Failed, essence
from services.worker.engine.files import ScatteredFile
from services.worker.engine.limits import Binder, Limits, Span, check_batching
from services.worker.engine.signature import Argument, merge
from services.worker.engine.tensors import DTYPE, Value
from shared import pt2
from shared.errors import InvalidRequest
from shared.models import Manifest
from shared.tensors import shown

_LOADING: Final = threading.Lock()
"""Loads that run at the same time fail: torch keeps its fake tensors' mode globally."""
_LEAST_DYNAMIC: Final = 2
"""As torch has it: a dynamic dimension is traced as 2 or more, and may be 0 or 1 all the same."""


def estimate(file: ScatteredFile) -> int:
    """Bytes of the program's tensors, told without loading it. Raises `Failed`."""
    with file.open() as raw:
        try:
            return pt2.exported_bytes(cast("BinaryIO", raw))
        except InvalidRequest as error:
            raise Failed("model_failed", str(error)) from None


class ExportedExecutor:
    """One program on one device. Runs on one thread at a time."""

    def __init__(self, file: ScatteredFile, manifest: Manifest, device: torch.device) -> None:
        """Raises `Failed` (`model_failed`) for what cannot be loaded or asked, and for a program
        that does not take what the manifest promises."""
        program = _on(device, _load(file))
        arguments = list(_arguments(program))
        self.schema = tuple(argument for argument, _ in arguments)
        self._limits = tuple(limits for _, limits in arguments)
        self._keywords = _keywords(program)
        self._device = device
        self._binder = Binder(self.schema, manifest.inputs)
        _check_outputs(program)
        self._check_manifest(manifest)
        if not manifest.stateful and (written := _written(program)):
            print(  # noqa: T201 — the agent logs our stderr
                f"{manifest.id} changes its {', '.join(written)} as it runs: say stateful in its "
                "manifest if an answer depends on the calls before",
                file=sys.stderr,
                flush=True,
            )
        self._module = cast("Any", program.module())  # torch leaves it untyped
        del program  # with its example inputs

    def run(self, inputs: Sequence[tuple[str, Value]]) -> object:
        plan = self._binder.plan(inputs)
        values: list[object] = []
        for argument, limits, at in zip(self.schema, self._limits, plan, strict=True):
            if limits is None or at is None:
                values.append(argument.default)
            else:
                tensor = limits.check(argument.name, inputs[at][1])
                values.append(tensor.to(self._device, non_blocking=True))
        split = len(values) - len(self._keywords)
        try:
            return self._module(
                *values[:split], **dict(zip(self._keywords, values[split:], strict=True))
            )
        except (AssertionError, RuntimeError) as error:
            # What the limits of each input alone do not tell, e.g. that two must be as long.
            if str(error).startswith(("Guard failed", "Expected input")):
                raise Failed(
                    "invalid_argument", f"the inputs do not suit the program: {essence(str(error))}"
                ) from None
            raise

    def weights_bytes(self, granule: int) -> int:
        storages = {
            storage.data_ptr(): storage.nbytes()
            for tensor in _tensors(self._module)
            for storage in (tensor.untyped_storage(),)
        }
        return sum(-(-nbytes // granule) * granule for nbytes in storages.values())

    def close(self) -> None:
        # A graph refers to itself in circles; its weights shall not wait for the collector.
        for tensor in _tensors(self._module):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        del self._module

    def _check_manifest(self, manifest: Manifest) -> None:
        for argument, limits in zip(self.schema, self._limits, strict=True):
            if limits is not None:
                check_batching(argument.name, limits.spans, manifest.max_batch_size)
        if manifest.inputs is None:
            return
        merge(self.schema, manifest.inputs)  # the names
        plan = self._binder.plan([(spec.name, []) for spec in manifest.inputs])
        for limits, at in zip(self._limits, plan, strict=True):
            if limits is None or at is None:
                continue
            spec = manifest.inputs[at]
            dimensions = len(spec.shape) + (manifest.max_batch_size > 0)
            if DTYPE.get(spec.datatype) is not limits.dtype or dimensions != len(limits.spans):
                raise Failed(
                    "model_failed",
                    f"the manifest says that input {shown(spec.name)} is {spec.datatype} with "
                    f"{dimensions} dimensions, the program takes {limits}",
                )


def _load(file: ScatteredFile) -> Any:
    with file.open() as raw:
        try:
            with _LOADING:
                return torch.export.load(cast("Any", raw))
        except Failed:
            raise
        except Exception as error:  # noqa: BLE001 — a file raises anything
            why = f"{type(error).__name__}: {essence(str(error))}"
        # Outside the except block: an error keeps alive what its frames hold.
        saved = pt2.saved_with(cast("BinaryIO", raw))
    versions = f"torch {torch.__version__}" + (f", the file is from {saved}" if saved else "")
    raise Failed("model_failed", f"torch.export.load ({versions}) refuses the file: {why}")


def _on(device: torch.device, program: Any) -> Any:
    """The program with its tensors and its operators on the device."""
    tensors = [*program.state_dict.values(), *program.constants.values()]
    found = {each.device for each in tensors if isinstance(each, torch.Tensor)}
    found |= {
        torch.device(node.kwargs["device"])
        for node in program.graph.nodes
        if node.kwargs.get("device") is not None
    }
    if all(each == device for each in found):
        return program
    from torch.export.passes import move_to_device_pass

    return move_to_device_pass(program, device)


def _arguments(program: Any) -> Iterator[tuple[Argument, Limits | None]]:
    """The program's inputs in order, with what it takes; None for one that was a constant when
    the program was exported. Raises `Failed` for one that no request can carry."""
    positional, keywords = _tree(program)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    signature = program.module_call_graph[0].signature
    forward = list(getattr(signature, "forward_arg_names", None) or ())
    users = [
        spec.arg for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"
    ]
    names = forward[:positional] if len(forward) >= positional else []
    names = names or [argument.name for argument in users[:positional]]
    for argument, name in zip(users, [*names, *keywords], strict=True):
        if hasattr(argument, "value"):
            yield Argument(name, "other", optional=True, default=argument.value), None
            continue
        value = placeholders[argument.name].meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise Failed(
                "model_failed",
                f"input {shown(name)} of the program is a number that varies, which no request "
                "can carry: let it take a tensor",
            )
        spans = tuple(_span(size, program.range_constraints) for size in value.shape)
        yield Argument(name, "tensor"), Limits(value.dtype, spans)


def _tree(program: Any) -> tuple[int, list[str]]:
    """How many arguments are given by place, and the names of the others. Raises `Failed` for
    nested ones."""
    places, by_name = _children(program.call_spec.in_spec)
    for spec in (*_children(places), *_children(by_name)):
        if _children(spec):
            raise Failed(
                "model_failed",
                f"the program takes a nested input ({_kind(spec)}), which no request can carry: "
                "export a wrapper that takes tensors one by one",
            )
    return len(_children(places)), [str(key) for key in by_name.context]


def _keywords(program: Any) -> list[str]:
    return _tree(program)[1]


def _check_outputs(program: Any) -> None:
    for spec in _children(program.call_spec.out_spec):
        if _children(spec):
            raise Failed(
                "model_failed",
                f"the program returns a nested output ({_kind(spec)}); a model returns a tensor, "
                "or a tuple, list or dict of tensors",
            )


def _children(spec: Any) -> list[Any]:
    """Of a tree of arguments; newer versions of torch have made the attribute a method."""
    children = getattr(spec, "children", None)
    if callable(children):
        return list(children())
    return list(getattr(spec, "children_specs", ()))


def _kind(spec: Any) -> str:
    return str(getattr(spec.type, "__name__", spec.type))


def _span(size: Any, ranges: Any) -> Span:
    """What a traced dimension may be, by the constraints that were exported with it."""
    if isinstance(size, int):
        return Span(size, size)
    known = ranges.get(size.node.expr)
    if known is None:  # depends on another dimension; the program's own guards tell
        return Span()
    least, most = _whole(known.lower), _whole(known.upper)
    return Span(0 if least is None or least <= _LEAST_DYNAMIC else least, most)


def _whole(bound: Any) -> int | None:
    """None for infinity."""
    try:
        return int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None


def _written(program: Any) -> list[str]:
    """Names of parameters, buffers and constants that running the program changes."""
    signature = program.graph_signature
    written = dict.fromkeys(signature.buffers_to_mutate.values())
    owner = {
        spec.arg.name: spec.target
        for spec in signature.input_specs
        if spec.kind.name != "USER_INPUT" and spec.target is not None
    }
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for argument, given in zip(schema.arguments, node.args, strict=False):
            target = owner.get(getattr(given, "name", ""))
            if target is None or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                written[target] = None
            owner[node.name] = target  # a view of it
    return [str(target) for target in written]


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All that the module keeps: parameters, buffers and plain attributes."""
    for each in module.modules():
        for held in (each._parameters, each._buffers, vars(each)):  # noqa: SLF001 — no other way
            yield from [value for value in held.values() if isinstance(value, torch.Tensor)]
