"""The code in a TorchScript file, as text: its definitions, under names that do not depend on what
else the exporting process had exported before."""

from __future__ import annotations

import re
from collections import deque
from itertools import pairwise
from typing import Final, NamedTuple

from shared.layout.records import Unreadable

CODE: Final = "code/"
_SUFFIX: Final = ".py"
_DEFINITION: Final = re.compile(r"^(class|def) (\w+)(?:\((\w+)\))?", re.MULTILINE)
_MANGLE: Final = re.compile(r"\.___torch_mangle_\d+(?=\.)")
_NAMES: Final = re.compile(
    r'"(?:[^"\\\n]|\\.)*+"?'  # texts in quotes: nothing inside of them is a name
    r"|(__torch__(?:\.\w+)+)"
    r"|(?<![\w.])([A-Za-z_]\w*)(?!\w|=(?!=))"  # not an attribute, not a keyword's name
)
_FUNCTION: Final = re.compile(r"^([ \t]*)def ", re.MULTILINE)
_SIGNATURE_END: Final = re.compile(r":$", re.MULTILINE)
_ASSIGNED: Final = re.compile(r"^ +((?:\w+, )*\w+),? = |\bfor (\w+) in ", re.MULTILINE)


class Definition(NamedTuple):
    """A class or function of the file's own."""

    kind: str
    """`Module`, `Enum`, `NamedTuple` …, empty for a plain class; `def` for a function."""
    text: str


def is_code(name: str) -> bool:
    return name.startswith(CODE) and name.endswith(_SUFFIX)


def definitions(files: dict[str, str]) -> dict[str, Definition]:
    """Classes and functions by their full names, e.g. `__torch__.torch.nn.modules.linear.Linear`.

    `files` are texts by member name. What stands before a file's first definition (notes of old
    torch) counts as a part of each of that file. Raises `Unreadable`.
    """
    found: dict[str, Definition] = {}
    for path, text in files.items():
        module = path[len(CODE) : -len(_SUFFIX)].replace("/", ".")
        starts = list(_DEFINITION.finditer(text))
        if not starts:
            found[f"{module}."] = Definition("", text)
            continue
        ends = [*(match.start() for match in starts[1:]), len(text)]
        before = text[: starts[0].start()].strip()
        for match, end in zip(starts, ends, strict=True):
            keyword, name, base = match.groups()
            kind = "def" if keyword == "def" else base or ""
            full = f"{module}.{name}"
            body = text[match.start() : end].rstrip()
            if full in found:
                raise Unreadable(f"its code defines {full[:80]} twice")
            found[full] = Definition(kind, f"{before}\n{body}" if before else body)
    return found


class Canon:
    """Gives the file's names numbers, in the order in which they are first heard of.

    torch keeps one name apart from another by `___torch_mangle_7`, counted over all that a
    process ever made. Two exports of one model differ in these counts, and in how classes are
    spread over files, and in nothing else.
    """

    def __init__(self, known: dict[str, Definition]) -> None:
        self._known = known
        self._numbers: dict[str, int] = {}
        self._unread: deque[str] = deque()

    def name(self, full: str) -> str:
        """The name as every export of the same model has it; what the file does not define keeps
        its own."""
        defined, rest = full, ""
        if defined not in self._known:  # a value of an enum, a method
            defined, _, rest = full.rpartition(".")
            if defined not in self._known:
                return full
            rest = f".{rest}"
        number = self._numbers.get(defined)
        if number is None:
            number = self._numbers[defined] = len(self._numbers)
            self._unread.append(defined)
        return f"<{number}:{_MANGLE.sub('', defined)}>{rest}"

    def program(self) -> list[str]:
        """The text of every definition, in the order in which they are heard of from the names
        asked for so far, breadth first; then those that nobody mentions, as they are."""
        texts: list[str] = []
        while self._unread:
            full = self._unread.popleft()
            own = self.name(full)
            kind, text = self._known[full]
            texts.append(f"{kind} {own}")
            functions = list(_FUNCTION.finditer(text))
            indent = "" if kind == "def" else "  "
            # A function in a function shares its variables.
            nested = any(match.group(1) != indent for match in functions)
            starts = [match.start() for match in functions]
            texts += [
                self._rename(text[start:end], function=start in starts and not nested)
                for start, end in pairwise([0, *starts, len(text)])
            ]
        for full in sorted(self._known.keys() - self._numbers.keys()):
            texts.append(f"{full}\n{self._known[full].text}")
        return texts

    def _rename(self, text: str, *, function: bool) -> str:
        """The text with the file's names, and a function's own variables, as every export has
        them: torch numbers variables over all that stands in one file."""
        own: dict[str, str] = {}
        if function and (end := _SIGNATURE_END.search(text)):
            body = end.end()
            for match in _ASSIGNED.finditer(text, body):
                for name in (match.group(1) or match.group(2)).split(", "):
                    own.setdefault(name, f"${len(own)}")
            for name in _NAMES.finditer(text, 0, body):
                own.pop(name.group(2), None)

        def rename(match: re.Match[str]) -> str:
            full, variable = match.groups()
            if full is not None:
                return self.name(full)
            return own.get(variable) or match.group()

        return _NAMES.sub(rename, text)
