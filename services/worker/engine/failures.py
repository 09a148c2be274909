"""What went wrong, as the agent is told it: a code of the wire and a text fit for a caller.

Knows torch's errors by their words alone, so that what is pure here stays free of torch.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from services.worker.wire import Code

MAX_MESSAGE: Final = 2000

# The interpreter of TorchScript keeps the words of torch's allocators and loses the exception's
# type, so the words decide.
_NO_MEMORY: Final = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|STATUS_ALLOC_FAILED|\bOutOfMemoryError\b"
    r"|DefaultCPUAllocator: (?:can't allocate|not enough) memory"
)
_ERROR_LINE: Final = re.compile(r"^(?:[\w.]*\.)?\w*(?:Error|Exception|Warning): ?")
_NATIVE_STACK: Final = re.compile(r"\nException raised from .*", re.DOTALL)


class Failed(Exception):
    """This load or this batch failed, for a reason that the engine itself knows."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Diagnosis(NamedTuple):
    """An error without its frames, so that nothing it held stays alive."""

    code: Code
    message: str


def diagnose(error: Exception) -> Diagnosis:
    """Which code an exception means, and its text: never longer than `MAX_MESSAGE`."""
    if isinstance(error, Failed):
        return Diagnosis(error.code, str(error)[:MAX_MESSAGE])
    kind = type(error).__name__
    message = essence(str(error)) or kind
    if isinstance(error, MemoryError) or _NO_MEMORY.search(f"{kind}: {message}"):
        return Diagnosis("resource_exhausted", f"out of device memory: {message}"[:MAX_MESSAGE])
    return Diagnosis("model_failed", message)


def essence(text: str) -> str:
    """The error itself out of an interpreter's report, without source and stack.

    TorchScript's report ends with `<type>: <message>`, where the message may have many lines.
    """
    lines = _NATIVE_STACK.sub("", text).strip().splitlines()
    for index in range(len(lines) - 1, -1, -1):
        if _ERROR_LINE.match(lines[index]):
            return "\n".join(lines[index:]).strip()[:MAX_MESSAGE]
    if "Traceback of TorchScript" in text:
        return lines[-1].strip()[:MAX_MESSAGE]
    return "\n".join(lines)[:MAX_MESSAGE]
