"""The machine under Triton's names."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry

from services.worker.devices import GpuMeasured, measure_gpu
from services.worker.nvmetrics import MachineMetrics
from shared.nvmetrics import encoder

STAT = "cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 0 0 1 0 0 0 0 0 0\n"
MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\n"


def scraped(metrics: MachineMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(metrics)
    lines = encoder("")[0](registry).decode().splitlines()
    return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "stat").write_text(STAT.format(busy=100, idle=900))
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def test_the_cpu_is_told_since_the_last_scrape(machine):
    """As a share of all cores; with the machine's memory, and no GPU where there is none."""
    metrics = MachineMetrics(stat=machine / "stat", meminfo=machine / "meminfo")
    (machine / "stat").write_text(STAT.format(busy=130, idle=970))
    assert scraped(metrics) == {
        "nv_cpu_utilization": pytest.approx(0.3),
        "nv_cpu_memory_total_bytes": 1000 * 1024,
        "nv_cpu_memory_used_bytes": 600 * 1024,
    }
    assert "nv_cpu_utilization" not in scraped(metrics)  # no time has passed


def test_what_the_system_does_not_tell_is_left_out(tmp_path):
    """As on a machine without /proc."""
    assert scraped(MachineMetrics(stat=tmp_path / "none", meminfo=tmp_path / "none")) == {}


def test_energy_counts_from_the_worker_s_start(machine):
    """As Triton's does from the server's; each series has the GPU's own name."""
    energy = iter((500.0, 500.0, 730.5))
    seen = GpuMeasured(0.42, 80, 20, 300.5, 700.0)
    metrics = MachineMetrics(
        lambda _: seen._replace(energy_j=next(energy)), machine / "stat", machine / "meminfo"
    )
    metrics.uuid = "GPU-1"
    scraped(metrics)
    scraped(metrics)
    told = {key: value for key, value in scraped(metrics).items() if "gpu_uuid" in key}
    assert told == {
        'nv_gpu_utilization{gpu_uuid="GPU-1"}': 0.42,
        'nv_gpu_memory_total_bytes{gpu_uuid="GPU-1"}': 80,
        'nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"}': 20,
        'nv_gpu_power_usage{gpu_uuid="GPU-1"}': 300.5,
        'nv_gpu_power_limit{gpu_uuid="GPU-1"}': 700.0,
        'nv_energy_consumption{gpu_uuid="GPU-1"}': 230.5,
    }


class Nvml:
    """A GPU that measures no power, as some do not."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetMemoryInfo(self, _):  # noqa: N802
        return SimpleNamespace(total=100, used=25)

    def nvmlDeviceGetUtilizationRates(self, _):  # noqa: N802
        return SimpleNamespace(gpu=37)

    def nvmlDeviceGetEnforcedPowerLimit(self, _):  # noqa: N802
        return 450_000

    def nvmlDeviceGetTotalEnergyConsumption(self, _):  # noqa: N802
        return 12_500

    def nvmlDeviceGetPowerUsage(self, _):  # noqa: N802
        raise self.NVMLError

    @contextlib.contextmanager
    def opened(self):
        yield self


def test_units_are_those_that_triton_tells():
    """Watts and joules of NVML's thousandths, a share of its percent; nothing of what it lacks."""
    measured = measure_gpu("GPU-1", Nvml().opened)
    assert measured == GpuMeasured(0.37, 100, 25, None, 450.0, 12.5)


def test_without_nvml_a_gpu_tells_nothing():
    """As in a container without the driver's library."""
    assert measure_gpu("GPU-1", contextlib.nullcontext) == GpuMeasured()
