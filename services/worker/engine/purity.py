"""Does a program write to what it keeps? If not, one module may stand for all models of its
architecture, with other weights each time.

The answer is torch's own alias analysis of the whole graph, which is conservative: what it cannot
follow counts as written to. It needs the graph with all calls inlined. Doing that at once holds
the interpreter for long; from the leaves up it is done in small steps, because torch keeps what
it has inlined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from services.worker.engine.torchscript import children
from shared.layout.writes import PURE_NAMESPACES

_C: Final[Any] = torch._C  # noqa: SLF001 — private, and typed in part

_LEAVING: Final = frozenset({
    "prim::CallFunction", "prim::CallMethod", "prim::PythonOp", "prim::awaitable", "prim::fork",
    "prim::rpc_async", "prim::rpc_remote", "prim::rpc_sync",
})  # fmt: skip
"""Where the graph goes on elsewhere."""
_NORMS: Final = ("batch_norm", "instance_norm")
"""These update their statistics without saying so in their schema."""
_PLAIN: Final = frozenset({
    "BoolType", "ClassType", "ComplexType", "DeviceObjType", "EnumType", "FloatType",
    "FunctionType", "IntType", "InterfaceType", "NoneType", "NumberType", "StringType",
})  # fmt: skip
"""No tensors in these; in objects they are attributes, which are asked about by themselves."""


def why_impure(module: Any) -> str | None:
    """What `forward` may write to, for a reader; None when it writes to nothing that outlives the
    call. The module must be in evaluation mode already."""
    _inline_below(module)
    graph = module._get_method("forward").graph.copy()  # noqa: SLF001
    _C._jit_pass_inline(graph)  # noqa: SLF001
    _fold_training(graph, module)
    # Decides the branches that hang on it, so that those for training are gone.
    _C._jit_pass_constant_propagation_immutable_types(graph)  # noqa: SLF001
    nodes = list(_nodes(graph))
    for node in nodes:
        why = _why_suspect(node)
        if why is not None:
            return why
    aliases = graph.alias_db()
    for node in nodes:
        if node.kind() not in {"prim::GetAttr", "prim::Constant"}:
            continue
        for value in node.outputs():
            if value.type().kind() not in _PLAIN and aliases.has_writers(value):
                return f"it may write to {_told(node)}"
    return None


def _inline_below(module: Any) -> None:
    """Has torch inline every method, callees before their callers."""
    for child in children(module):
        _inline_below(child)
    if module._has_method("forward"):  # noqa: SLF001
        _C._jit_pass_inline(module._get_method("forward").graph.copy())  # noqa: SLF001


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _fold_training(graph: Any, module: Any) -> None:
    """Puts False for each module's `training`, which it is and stays: nothing sets an attribute,
    or the answer is no in any case."""
    found = [
        node
        for node in _nodes(graph)
        if node.kind() == "prim::GetAttr"
        and node.s("name") == "training"
        and node.output().type().kind() == "BoolType"
    ]
    if not found:
        return
    with graph.insert_point_guard(next(graph.nodes())):
        false = graph.insertConstant(False)
    for node in found:
        owner = _owner(node, graph, module)
        if owner is not None and owner.getattr("training") is False:
            node.output().replaceAllUsesWith(false)


def _owner(node: Any, graph: Any, module: Any) -> Any:
    """The module that the node takes its attribute from; None when that cannot be told."""
    names: list[str] = []
    value = node.input()
    root = next(graph.inputs())
    while value.debugName() != root.debugName():
        node = value.node()
        if node.kind() != "prim::GetAttr":
            return None
        names.append(node.s("name"))
        value = node.input()
    for name in reversed(names):
        if not isinstance(module, _C.ScriptModule):
            return None
        module = module.getattr(name)
    return module if isinstance(module, _C.ScriptModule) else None


def _why_suspect(node: Any) -> str | None:
    kind: str = node.kind()
    if kind == "prim::SetAttr":
        return f"it sets its attribute {node.s('name')[:80]}"
    if kind in _LEAVING:
        return f"its graph has a {kind}"
    namespace, _, name = kind.partition("::")
    if namespace not in PURE_NAMESPACES:
        return f"it has an operator of its own kind, {kind[:80]}"
    if any(norm in name for norm in _NORMS) and not _is_still(node):
        return f"{kind} may update its statistics"
    return None


def _is_still(node: Any) -> bool:
    """Whether a normalisation has no statistics, or leaves them as they are."""
    # input, weight, bias, running mean, running variance, training, momentum, …
    inputs = list(node.inputs())
    if len(inputs) < 6:
        return False
    training = inputs[5].node()
    literal = training.kind() == "prim::Constant" and inputs[5].type().kind() == "BoolType"
    if literal and not inputs[5].toIValue():
        return True
    return all(value.type().kind() == "NoneType" for value in inputs[3:5])


def _told(node: Any) -> str:
    return f"its {node.s('name')[:80]}" if node.kind() == "prim::GetAttr" else "a constant"
