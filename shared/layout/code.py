"""The code in a TorchScript file, as text: its definitions, under names that do not depend on what
else the exporting process had exported before."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from itertools import islice, pairwise
from typing import Final, NamedTuple

from shared.layout.records import Unreadable

CODE: Final = "code/"
MAX_DEFINITIONS: Final = 20_000
"""Classes and functions, and functions of one class. BERT-base has 30."""
MAX_NAMES: Final = 4 << 20
"""Characters of all full names together: the name of a file is a part of each of its names."""
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
_CALLED: Final = re.compile(r"(?<![\w.])(\w++)\s*+\(")
_TEXT: Final = re.compile(r'"(?:[^"\\\n]|\\.)*+"?')
_STRANGE: Final = re.compile(
    r"['\\#$;`\t\r\f\v]"
    r"|<\d+:"  # would look like a name that was given a number here
    r'|(?:\b[A-Za-z_]\w*+|[)\]"])\.\s'  # `x. a`
)
"""What torch never prints outside of quotes."""
_SPACED: Final = re.compile(r"\s=(?!=)")
_FOREIGN: Final = re.compile(
    r"[A-Z](?:[a-z]\w*|\w\w+)|bool|complex|dict|float|int|list|number|str|tuple"
    r"|aten|fork|infj?|nanj?|ops|torch|_|__\w*"
)
"""Names that mean something by themselves: types and constants."""


class Definition(NamedTuple):
    """A class or function of the file's own."""

    kind: str
    """`Module`, `Enum`, `NamedTuple` …, empty for a plain class; `def` for a function."""
    text: str
    before: str = ""
    """SHA-256 of what stands before the first definition of its file, if anything does."""


def is_code(name: str) -> bool:
    return name.startswith(CODE) and name.endswith(_SUFFIX)


def definitions(files: dict[str, str]) -> dict[str, Definition]:
    """Classes and functions by their full names, e.g. `__torch__.torch.nn.modules.linear.Linear`.

    `files` are texts by member name. What stands before a file's first definition (notes of old
    torch) counts as a part of each of that file. Raises `Unreadable` also where the code is not
    as torch prints it, or is made of more names than any program has.
    """
    found: dict[str, Definition] = {}
    letters = 0
    for path, text in files.items():
        _check_style(text)
        module = path[len(CODE) : -len(_SUFFIX)].replace("/", ".")
        starts = _bounded(_DEFINITION, text)
        letters += (len(starts) + 1) * len(module) + sum(len(start[2]) for start in starts)
        if len(found) + len(starts) > MAX_DEFINITIONS or letters > MAX_NAMES:
            raise Unreadable("its code has too many definitions, or too long names")
        if not starts:
            found[f"{module}."] = Definition("", text)
            continue
        ends = [*(match.start() for match in starts[1:]), len(text)]
        head = text[: starts[0].start()].strip()
        before = hashlib.sha256(head.encode()).hexdigest() if head else ""
        for match, end in zip(starts, ends, strict=True):
            keyword, name, base = match.groups()
            kind = "def" if keyword == "def" else base or ""
            full = f"{module}.{name}"
            body = text[match.start() : end].rstrip()
            if full in found:
                raise Unreadable(f"its code defines {full[:80]} twice")
            found[full] = Definition(kind, body, before)
    return found


def _bounded(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    found = list(islice(pattern.finditer(text), MAX_DEFINITIONS + 1))
    if len(found) > MAX_DEFINITIONS:
        raise Unreadable(f"its code has more than {MAX_DEFINITIONS:,} definitions")
    return found


def _check_style(text: str) -> None:
    """Raises `Unreadable` where somebody wrote by hand what torch would write otherwise: there
    it is not certain what is a variable, and two programs might be taken for one."""
    plain = _without_texts(text)
    if '"""' in text or plain is None or _STRANGE.search(plain):
        raise Unreadable("its code is not written as torch writes it")


def _without_texts(text: str) -> str | None:
    """None where a text in quotes does not end in its line."""
    closed = True

    def empty(match: re.Match[str]) -> str:
        nonlocal closed
        closed = closed and len(match[0]) > 1 and match[0].endswith('"')
        return '""'

    plain = _TEXT.sub(empty, text)
    return plain if closed else None


def _check_statements(body: str) -> None:
    """Each is one line, and ` = ` stands in none but to assign: in a call that goes over lines,
    or is spaced out, a keyword would look like a variable. Raises `Unreadable`."""
    for line in (_without_texts(body) or "").split("\n"):
        left, *right = _SPACED.split(line, 2)
        if len(right) > 1 or not (_balanced(line) and _balanced(left)):
            raise Unreadable("its statements are not written as torch writes them")


def _balanced(line: str) -> bool:
    return (
        line.count("(") == line.count(")")
        and line.count("[") == line.count("]")
        and line.count("{") == line.count("}")
    )


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
            kind, text, before = self._known[full]
            texts.append(f"{kind} {own} {before}")
            functions = _bounded(_FUNCTION, text)
            indent = "" if kind == "def" else "  "
            # A function in a function shares its variables.
            nested = any(match.group(1) != indent for match in functions)
            starts = [match.start() for match in functions]
            texts.append(self._rename(text[: starts[0] if starts else len(text)], function=False))
            texts += [
                self._rename(text[start:end], function=not nested)
                for start, end in pairwise([*starts, len(text)])
            ]
        for full in sorted(self._known.keys() - self._numbers.keys()):
            texts.append(f"{full} {self._known[full].before}\n{self._known[full].text}")
        return texts

    def _rename(self, text: str, *, function: bool) -> str:
        """The text with the file's names, and a function's own variables, as every export has
        them: torch numbers variables over all that stands in one file."""
        own: dict[str, str] = {}
        if function and (end := _SIGNATURE_END.search(text)):
            body = end.end()
            for match in _ASSIGNED.finditer(text, body):
                for name in (match.group(1) or match.group(2)).split(", "):
                    if not _FOREIGN.fullmatch(name):
                        own.setdefault(name, f"${len(own)}")
            for name in _NAMES.finditer(text, 0, body):
                own.pop(name.group(2), None)
            for called in _CALLED.finditer(text, body):
                own.pop(called.group(1), None)  # a function of torch's, whatever the name
            if own:
                _check_statements(text[body:])

        def rename(match: re.Match[str]) -> str:
            full, variable = match.groups()
            if full is not None:
                return self.name(full)
            return own.get(variable) or match.group()

        return _NAMES.sub(rename, text)
