"""The device's memory, as the engine can measure it: on CUDA by torch's allocator, on a CPU by
the process' own pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from services.worker.hostmemory import machine_bytes, process_bytes

_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"


class Device(Protocol):
    """What the engine needs of a device. All figures are bytes."""

    torch_device: torch.device
    kind: str
    name: str
    uuid: str
    capacity_bytes: int
    base_bytes: int
    granule: int
    """What an allocation is rounded up to."""
    cheap_to_measure: bool
    """Whether every batch may be measured."""

    def enter_thread(self) -> None:
        """To be called first by each thread of the engine: torch keeps per thread which device
        is meant where none is named."""

    def running(self) -> contextlib.AbstractContextManager[None]:
        """To be entered once by each thread that runs models: torch keeps these settings per
        thread."""

    def begin_measuring(self) -> None:
        """From here on the peak counts. One measurement at a time."""

    def peak_bytes(self) -> int:
        """The peak beyond what was taken at `begin_measuring`; 0 when it cannot be told."""

    def synchronize(self) -> None:
        """Returns when the device has done all it was told."""

    def reclaim(self) -> None:
        """Really gives back what nobody refers to any more."""

    def used_bytes(self) -> int:
        """What this process takes of the device."""

    def healthy(self) -> bool:
        """False when the device's context is lost for the life of this process."""

    def outside_torch(self, nbytes: int) -> None:
        """So many bytes more (or fewer) are taken, or are about to be, that torch's allocator
        does not know of: it has to leave them."""


@contextlib.contextmanager
def _interpreter_settings() -> Iterator[None]:
    # Without the profiling executor the first two calls of a model take as long as all others.
    jit: Any = torch.jit  # torch leaves it untyped
    with jit.optimized_execution(False), torch.inference_mode():
        yield


class CpuDevice:
    """A CPU with a byte budget that stands for a device's memory."""

    kind = "cpu"
    uuid = ""
    granule = 64
    cheap_to_measure = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = _cpu_name()
        self.capacity_bytes = machine_bytes()
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._before: int | None = None
        self.base_bytes = self.used_bytes()

    def enter_thread(self) -> None:
        pass

    def running(self) -> contextlib.AbstractContextManager[None]:
        return _interpreter_settings()

    def begin_measuring(self) -> None:
        # Free bytes that the heap still holds would take the next allocation unseen.
        self._trim()
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._before = process_bytes("VmRSS")
        except OSError:
            self._before = None

    def peak_bytes(self) -> int:
        if self._before is None:
            return 0
        peak = max(process_bytes("VmHWM") - self._before, 0)
        self._before = None
        return peak

    def synchronize(self) -> None:
        pass

    def reclaim(self) -> None:
        gc.collect()
        self._trim()

    def _trim(self) -> None:
        if self._malloc_trim is not None:
            self._malloc_trim(0)

    def used_bytes(self) -> int:
        """The process' own pages: neither the shared regions, which are the agent's as well, nor
        the libraries, of which ever more is touched."""
        return process_bytes("RssAnon")

    def healthy(self) -> bool:
        return True

    def outside_torch(self, nbytes: int) -> None:
        pass


class CudaDevice:
    """One CUDA device, which torch may fill up to `budget_bytes`."""

    granule = 512
    cheap_to_measure = True

    def __init__(self, torch_device: torch.device, budget_bytes: int) -> None:
        self.torch_device = torch.device("cuda", torch_device.index or 0)
        self.enter_thread()
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        self.kind = f"cuda:{self.name}"
        uuid = str(getattr(properties, "uuid", ""))
        self.uuid = uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        torch.ones(1, device=self.torch_device).add_(1)
        self.synchronize()
        free, self.capacity_bytes = torch.cuda.mem_get_info(self.torch_device)
        # All that is taken by now: alone on its device, that is this process' context.
        self.base_bytes = self.capacity_bytes - free - self._reserved()
        self._budget_bytes = budget_bytes
        self._outside_torch = 0
        self.outside_torch(0)
        self._before = 0

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.torch_device)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        new_stream: Any = torch.cuda.Stream  # torch leaves it untyped
        with _interpreter_settings(), torch.cuda.stream(new_stream(self.torch_device)):
            yield

    def begin_measuring(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self._before = torch.cuda.memory_allocated(self.torch_device)

    def peak_bytes(self) -> int:
        return max(torch.cuda.max_memory_allocated(self.torch_device) - self._before, 0)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def reclaim(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def used_bytes(self) -> int:
        return self.base_bytes + self._reserved() + self._outside_torch

    def outside_torch(self, nbytes: int) -> None:
        self._outside_torch += nbytes
        left = max(self._budget_bytes - self._outside_torch, 0)
        if nbytes > 0 and self._reserved() > left:
            torch.cuda.empty_cache()
        # Beyond the budget torch raises an error that a batch can recover from.
        share = min(left / self.capacity_bytes, 1.0)
        torch.cuda.set_per_process_memory_fraction(share, self.torch_device)

    def _reserved(self) -> int:
        return int(torch.cuda.memory_reserved(self.torch_device))

    def healthy(self) -> bool:
        try:
            self.synchronize()
            return int(torch.ones(1, device=self.torch_device).add_(1).item()) == 2
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False


def open_device(name: str, budget_bytes: int) -> Device:
    """`cpu` or `cuda:<n>`. Raises `RuntimeError` or `ValueError` when there is no such device."""
    device = torch.device(name)
    if device.type == "cpu":
        return CpuDevice()
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"there is no device {name}: torch sees {count} CUDA devices")
        return CudaDevice(device, budget_bytes)
    raise ValueError(f"{name!r} is not a device of this engine: cpu or cuda:<n>")


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return os.uname().machine
