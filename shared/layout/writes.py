"""Could this code write to an attribute, or in place? Told from its text, and rather yes than no:
who is told yes asks torch, which looks at the graph.

What is looked for is what torch prints. Somebody may write such a file by hand, to write to
weights that other models share; so whatever is not in torch's own style counts as writing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_TEXT: Final = re.compile(r'"(?:[^"\\\n]|\\.)*+"?')
"""What stands in quotes, to the line's end where they are not closed."""
_BATCH_NORM: Final = re.compile(r"torch\.(?:batch_norm|instance_norm)\(")
_CALL: Final = 1000
"""Letters of a call that are looked at: nesting them must not make this slow."""

PURE_NAMESPACES: Final = frozenset({"aten", "prim", "torchvision"})
"""Their operators do as their names say: an underscore at the end writes, none does not, but for
those of `WRITERS`."""

WRITERS: Final = frozenset({
    # Operators on lists and dicts.
    "Delete", "_set_item", "append", "clear", "extend", "insert", "pop", "popitem", "remove",
    "reverse", "setdefault", "sort", "update",
    # On tensors, with no underscore to show it.
    "_batch_norm_impl_index", "_batch_norm_with_update", "_cummax_helper", "_cummin_helper",
    "_flash_attention_forward_no_dropout_inplace", "_fused_moving_avg_obs_fq_helper",
    "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
    "fbgemm_linear_fp16_weight", "fbgemm_linear_fp16_weight_fp32_activation",
    "fused_moving_avg_obs_fake_quant", "miopen_batch_norm", "native_batch_norm", "record_stream",
    "retain_grad", "rrelu_with_noise", "set_data",
    # On a generator.
    "manual_seed", "seed",
})  # fmt: skip

OUTPUTS: Final = frozenset({
    "LD", "LU", "L", "M", "P", "Q", "R", "S", "U", "V", "Vh", "X", "a", "bin_edges", "buffer",
    "eigenvalues", "eigenvectors", "eigvals", "eigvecs", "exponent", "grad_bias", "grad_input",
    "grad_weight", "hist", "indices", "info", "inverse", "is_target", "logabsdet", "mantissa",
    "max", "max_values", "min", "min_indices", "out", "out0", "out1", "out2", "out3", "out4",
    "out5", "out6", "output", "pivots", "rank", "reserve", "residuals", "result",
    "save_invstd", "save_mean", "sign", "singular_values", "solution", "tau", "total_weight",
    "values",
})  # fmt: skip
"""Keywords under which torch's operators take a tensor to write their result to."""

_WORDS: Final = re.compile(r"\b\w++(?:\s*+\(|=)")
_NAMESPACES: Final = re.compile(r"ops\.(\w+)")
_DECLARED: Final = re.compile(
    r'^  (?:__annotations__\[""\]|\w++ : Final\[[^\n=]*\]) = ', re.MULTILINE
)
"""The only assignments to something in brackets that torch prints, in the head of a class."""
_WRITING: Final = [
    # One by one: a pattern that begins with a letter of its own is found much faster.
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"_(?<=[A-Za-z0-9]_)(?!\w)",  # `torch.add_(x)`
        r"\.\s*\w++\s*=(?!=)",  # `self.x = `
        r"^[ \t][^\n=(.]*\.[^\n=(]*+=(?!=)",  # `self.x, y = `
        r"\]\s*=(?!=)",  # `x[0] = `
        r"=(?<=[-+*/%&|^@]=)(?!=)",  # `x += `
        rf"[(,]\s*(?:{'|'.join(sorted(OUTPUTS))})\s+=(?!=)",  # `f(x, out = y)`
        "['\\\\;#\\t]",  # not torch's style
        "__torch__\\.torch\\.classes",  # C++ objects do what they like
    )
]
_FORBIDDEN: Final = frozenset(
    {f"{name}(" for name in WRITERS}
    | {f"{name}=" for name in OUTPUTS}
    | {f"__i{name}__(" for name in ("and", "or", "xor", "lshift", "rshift", "add", "sub", "mul")}
    | {f"__i{name}__(" for name in ("matmul", "div", "truediv", "floordiv", "mod", "pow")}
    | {"setattr("}
)


def may_write(code: Iterable[str]) -> bool:
    """False: nothing in these texts writes to what was there before the call."""
    text = "\n".join(code)
    if '"""' in text:
        return True
    closed: list[bool] = []

    def empty(match: re.Match[str]) -> str:
        closed.append(len(match[0]) > 1 and match[0].endswith('"'))
        return '""'

    text = _DECLARED.sub("", _TEXT.sub(empty, text))
    words = {word[:-1].rstrip() + word[-1] for word in _WORDS.findall(text)}
    return (
        not all(closed)
        or not words.isdisjoint(_FORBIDDEN)
        or not PURE_NAMESPACES.issuperset(_NAMESPACES.findall(text))
        or any(pattern.search(text) for pattern in _WRITING)
        or any(_trains(text, match.end()) for match in _BATCH_NORM.finditer(text))
    )


def _trains(text: str, at: int) -> bool:
    """Whether the call whose parenthesis was opened just before `at` keeps statistics."""
    # input, weight, bias, running mean, running variance, training, momentum, …
    arguments = _arguments(text[at : at + _CALL])
    if len(arguments) < 6:
        return True
    return arguments[5] != "False" and arguments[3:5] != ["None", "None"]


def _arguments(text: str) -> list[str]:
    """The arguments of a call, as far as they are here."""
    found: list[str] = []
    depth, start = 0, 0
    for position, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter == "," and not depth:
            found.append(text[start:position].strip())
            start = position + 1
        elif letter in ")]}":
            if not depth:
                break
            depth -= 1
    return found
