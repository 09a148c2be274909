"""Memory of the host that a CUDA device copies from and to by itself, while others compute.
Without that copies are slower, and the thread that orders them waits for them.

To be called by threads that stand on the device (`Device.enter_thread`).
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Protocol

import torch


class Runtime(Protocol):
    """Of CUDA, as torch has it. Both return the runtime's error number, 0 for none."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> Any: ...  # noqa: N802

    def cudaHostUnregister(self, address: int) -> Any: ...  # noqa: N802


def pin(address: int, nbytes: int, device: torch.device, runtime: Runtime | None = None) -> bool:
    """Where the system refuses, the log is told, and the memory serves as it is."""
    error = int((runtime or _cudart()).cudaHostRegister(address, nbytes, 0))
    return _good(error, f"{nbytes:,} bytes could not be pinned", device)


def unpin(address: int, nbytes: int, device: torch.device, runtime: Runtime | None = None) -> bool:
    """To be called before the memory goes: after a refusal, which the log is told, the device
    still has it."""
    error = int((runtime or _cudart()).cudaHostUnregister(address))
    return _good(error, f"{nbytes:,} bytes stay pinned", device)


def _good(error: int, what: str, device: torch.device) -> bool:
    if not error:
        return True
    print(f"{what}: CUDA error {error}", file=sys.stderr, flush=True)  # noqa: T201
    # The runtime keeps the error for whoever asks next: the check after this kernel.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
    return False


def _cudart() -> Runtime:
    cuda: Any = torch.cuda  # torch leaves this function of it untyped
    runtime: Runtime = cuda.cudart()
    return runtime
