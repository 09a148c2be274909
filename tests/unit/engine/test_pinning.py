from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.pinning import pin, unpin  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")


class Runtime:
    """Of CUDA: answers with an error number."""

    def __init__(self, error: int):
        self._error = error
        self.calls = []

    def cudaHostRegister(self, *arguments):  # noqa: N802
        self.calls.append(("register", *arguments))
        return self._error

    def cudaHostUnregister(self, *arguments):  # noqa: N802
        self.calls.append(("unregister", *arguments))
        return self._error


def test_memory_is_pinned_and_let_go(capsys):
    """Nothing to tell."""
    runtime = Runtime(0)
    assert pin(4096, 512, CPU, runtime)
    assert unpin(4096, 512, CPU, runtime)
    assert runtime.calls == [("register", 4096, 512, 0), ("unregister", 4096)]
    assert capsys.readouterr().err == ""


def test_a_refusal_is_told_to_the_log(capsys):
    """The memory serves unpinned; what stays pinned must not be taken for free."""
    assert not pin(4096, 1 << 20, CPU, Runtime(2))
    assert not unpin(4096, 1 << 20, CPU, Runtime(713))
    assert capsys.readouterr().err.splitlines() == [
        "1,048,576 bytes could not be pinned: CUDA error 2",
        "1,048,576 bytes stay pinned: CUDA error 713",
    ]
