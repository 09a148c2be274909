"""What the device says of its memory: NVML for a GPU, /proc for the CPU that stands for one.

The only file that imports pynvml, and only when a GPU is asked about. NVML counts by device
and needs no CUDA context, which would cost the agent hundreds of megabytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import structlog

from services.worker.hostmemory import machine_bytes, process_bytes
from services.worker.wire import MemoryMeasured
from shared.config import ConfigError

log = structlog.get_logger(__name__)


def resolve(device: str) -> str:
    """`cpu` or `cuda:<n>` for what the configuration says."""
    if device == "auto":
        with _nvml() as nvml:
            return "cuda:0" if nvml is not None and nvml.nvmlDeviceGetCount() else "cpu"
    return "cuda:0" if device == "cuda" else device


def capacity_bytes(device: str) -> int:
    """All the memory of a device of `resolve`. Raises `ConfigError` when nobody can tell."""
    if device == "cpu":
        return machine_bytes()
    with _nvml() as nvml:
        if nvml is None:
            raise ConfigError(
                f"NVML does not tell what {device} has: set ROOST_WORKER_BUDGET_BYTES "
                "(or ROOST_WORKER_DEVICE=cpu where there is no GPU)"
            )
        handle = _handle(nvml, int(device.partition(":")[2] or 0))
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).total)


def count() -> int:
    """GPUs of this machine, or of this container, whichever of them CUDA_VISIBLE_DEVICES leaves
    to this worker; 1 when nobody can tell."""
    with contextlib.suppress(ConfigError), _nvml() as nvml:
        if nvml is not None:
            return max(int(nvml.nvmlDeviceGetCount()), 1)
    return 1


class GpuMeasured(NamedTuple):
    """What NVML says of a GPU now; None for what it does not tell of this one."""

    utilization: float | None = None
    """Share of the last moments in which anything ran on it."""
    total_bytes: int | None = None
    used_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    """Since its driver was loaded."""


def measure_gpu(
    uuid: str, nvml: Callable[[], AbstractContextManager[Any]] | None = None
) -> GpuMeasured:
    """Of the GPU with this UUID. Some milliseconds; not for the event loop."""

    def ask(question: Callable[[Any, Any], float]) -> float | None:
        with contextlib.suppress(ConfigError), (nvml or _nvml)() as library:
            if library is not None:
                try:
                    return question(library, library.nvmlDeviceGetHandleByUUID(uuid))
                except library.NVMLError:
                    return None  # not of this kind of GPU: nothing to warn of at each scrape
        return None

    total = ask(lambda library, gpu: library.nvmlDeviceGetMemoryInfo(gpu).total)
    used = ask(lambda library, gpu: library.nvmlDeviceGetMemoryInfo(gpu).used)
    return GpuMeasured(
        utilization=ask(lambda library, gpu: library.nvmlDeviceGetUtilizationRates(gpu).gpu / 100),
        total_bytes=None if total is None else int(total),
        used_bytes=None if used is None else int(used),
        power_w=ask(lambda library, gpu: library.nvmlDeviceGetPowerUsage(gpu) / 1e3),
        power_limit_w=ask(lambda library, gpu: library.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3),
        energy_j=ask(lambda library, gpu: library.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3),
    )


class Meter:
    """Measures what the models of one engine take, from outside the engine."""

    def __init__(
        self,
        device: str,
        uuid: str,
        pid: int,
        base_bytes: int,
        nvml: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """To be made while the engine has no model. What it takes by then is not counted:
        `base_bytes` by its own word, on a GPU what NVML says, which counts otherwise (with what
        the driver keeps for itself)."""
        self._uuid = uuid if device != "cpu" else ""
        self._pid = pid
        self._nvml = nvml or _nvml
        self._base_bytes = base_bytes
        if self._uuid:
            self._base_bytes = self._gpu_used() or base_bytes

    def models_bytes(self, told: MemoryMeasured | None = None) -> int:
        """Bytes in use beyond the engine's own, less what it has `told` that it keeps reserved
        and holds nothing. On a GPU that includes other processes' models: it is the device that
        is full or not. 0 when it cannot be measured (now)."""
        used = self._gpu_used() if self._uuid else process_bytes("RssAnon", self._pid)
        if told is not None:
            used -= told.spare_bytes
            if not self._uuid:  # the host tier lies in the same memory
                used -= told.host_bytes + told.host_spare_bytes
        return max(used - self._base_bytes, 0)

    def _gpu_used(self) -> int:
        with contextlib.suppress(ConfigError), self._nvml() as nvml:
            if nvml is not None:
                handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
                return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return 0


def _handle(nvml: Any, index: int) -> Any:
    """The device that CUDA calls `index`, which CUDA_VISIBLE_DEVICES may have renamed."""
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[index] if index < len(visible) and visible[index] else str(index)
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


_started = False


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The library, initialised once per process; None where there is no driver. Its errors
    leave the block as `ConfigError`."""
    global _started  # noqa: PLW0603 — NVML itself is one per process
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        if not _started:
            pynvml.nvmlInit()
            _started = True
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        log.warning("nvml_failed", error=str(error))
        raise ConfigError(f"NVML: {error}") from error
