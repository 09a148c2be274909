from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.failures import MAX_MESSAGE, Failed, diagnose, essence

REPORT = """The following operation failed in the TorchScript interpreter.
Traceback of TorchScript (most recent call last):
  File "/secret/model.py", line 26, in forward
    def forward(self, x):
        raise ValueError("bad")
        ~~~~~~~~~~~~~~~~~ <--- HERE
"""


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("RuntimeError: shapes (2x3 and 2x3)\n", "RuntimeError: shapes (2x3 and 2x3)"),
        ("builtins.ValueError: first\nsecond\n", "builtins.ValueError: first\nsecond"),
        (
            "RuntimeError: x\nException raised from f at a.cpp:1 (most recent call first):\n#0 y",
            "RuntimeError: x",
        ),
        ("no type here", "no type here"),
    ],
)
def test_a_report_is_cut_to_its_error(tail, message):
    """Source, paths and native stacks stay here; all lines of the message itself go out."""
    assert essence(REPORT + tail) == message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(REPORT + "RuntimeError: CUDA out of memory. Tried to"), "resource_exhausted"),
        (RuntimeError("CUDA error: out of memory"), "resource_exhausted"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "resource_exhausted"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                "can't allocate memory: you tried to allocate 8 bytes."
            ),
            "resource_exhausted",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("told nothing"), "resource_exhausted"),
        (MemoryError(), "resource_exhausted"),
        (RuntimeError("CUDA error: device-side assert triggered"), "model_failed"),
        (ValueError("I ran out of memory of that"), "model_failed"),
        (Failed("too_large", "by far"), "too_large"),
    ],
)
def test_memory_is_told_from_other_errors(error, code):
    """Only what torch's own allocators say means that memory ran out."""
    assert diagnose(error).code == code


@given(st.text())
def test_a_message_is_never_long_and_never_empty(text):
    """Whatever a model raises, a caller gets some text of bounded length."""
    for error in (ValueError(text), ValueError(text * 500), Failed("model_failed", text * 500)):
        assert len(diagnose(error).message) <= MAX_MESSAGE
    assert diagnose(ValueError(text)).message
