"""The machine under Triton's metric names: the worker's GPU, and the CPU and memory beside it.

Asked when somebody scrapes, by the thread that answers. Several workers on one machine, or on one
GPU, tell the same: a dashboard takes the maximum by `gpu_uuid` or by host, not the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.worker.devices import GpuMeasured, measure_gpu
from shared.nvmetrics import family

_STAT: Final = Path("/proc/stat")
_MEMINFO: Final = Path("/proc/meminfo")
_IDLE: Final = (3, 4)
"""Columns of /proc/stat in which nobody works: idle, and waiting for disks."""
_GUEST_FROM: Final = 8
"""What guests used is in the columns before already."""


class MachineMetrics(Collector):
    """`nv_gpu_*`, `nv_energy_consumption` and `nv_cpu_*`."""

    def __init__(
        self,
        gpu: Callable[[str], GpuMeasured] = measure_gpu,
        stat: Path = _STAT,
        meminfo: Path = _MEMINFO,
    ) -> None:
        self.uuid = ""
        """Of the engine's GPU; empty until that is known, and on a CPU."""
        self._gpu = gpu
        self._stat, self._meminfo = stat, meminfo
        self._energy_j: float | None = None
        """As it was first seen."""
        self._ticks = self._cpu_ticks()

    def collect(self) -> Iterator[Metric]:
        if self.uuid:
            yield from self._of_gpu(self.uuid)
        yield from self._of_cpu()

    def _of_gpu(self, uuid: str) -> Iterator[Metric]:
        seen = self._gpu(uuid)
        energy = None
        if seen.energy_j is not None:
            self._energy_j = seen.energy_j if self._energy_j is None else self._energy_j
            energy = seen.energy_j - self._energy_j
        for name, text, value in (
            ("nv_gpu_utilization", "GPU utilization rate [0.0 - 1.0]", seen.utilization),
            ("nv_gpu_memory_total_bytes", "GPU total memory, in bytes", seen.total_bytes),
            ("nv_gpu_memory_used_bytes", "GPU used memory, in bytes", seen.used_bytes),
            ("nv_gpu_power_usage", "GPU power usage in watts", seen.power_w),
            ("nv_gpu_power_limit", "GPU power management limit in watts", seen.power_limit_w),
            ("nv_energy_consumption", "", energy),
        ):
            if value is not None:
                yield _one(name, text, value, {"gpu_uuid": uuid})

    def _of_cpu(self) -> Iterator[Metric]:
        """Since the last scrape, whoever scraped."""
        before, self._ticks = self._ticks, self._cpu_ticks()
        busy, all_of_it = (now - then for now, then in zip(self._ticks, before, strict=True))
        if all_of_it > 0:
            share = min(max(busy / all_of_it, 0.0), 1.0)
            yield _one("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", share)
        memory = self._memory_bytes()
        total, free = memory.get("MemTotal"), memory.get("MemAvailable")
        if total and free is not None:
            yield _one("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", total)
            yield _one("nv_cpu_memory_used_bytes", "CPU used memory (RAM), in bytes", total - free)

    def _cpu_ticks(self) -> tuple[int, int]:
        """Busy, and in all, since the machine started."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks = [int(each) for each in self._stat.read_text().split("\n", 1)[0].split()[1:]]
            return sum(ticks[:_GUEST_FROM]) - sum(ticks[at] for at in _IDLE), sum(
                ticks[:_GUEST_FROM]
            )
        return 0, 0

    def _memory_bytes(self) -> dict[str, int]:
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = (line.split() for line in self._meminfo.read_text().splitlines())
            return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
        return {}


def _one(name: str, text: str, value: float, labels: dict[str, str] | None = None) -> Metric:
    metric = family(name, text)
    metric.add_sample(name, labels or {}, value)
    return metric
