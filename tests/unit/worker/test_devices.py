from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

from services.worker.devices import Meter
from services.worker.wire import MemoryMeasured


def test_what_is_reserved_and_empty_is_no_models():
    """Beside the engine's own, what it holds in reserve does not count; nor does the host tier,
    which on a CPU lies in the same memory."""
    meter = Meter("cpu", "", os.getpid(), base_bytes=1 << 20)
    told = MemoryMeasured(0, spare_bytes=2 << 20, host_bytes=3 << 20, host_spare_bytes=1 << 20)
    all_of_it = meter.models_bytes()
    assert abs(all_of_it - meter.models_bytes(told) - (6 << 20)) < 1 << 20
    assert meter.models_bytes(MemoryMeasured(0, spare_bytes=1 << 60)) == 0


class Nvml:
    """One GPU, of which so much is used."""

    def __init__(self, used: int) -> None:
        self.used = used

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "GPU-1"
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(used=self.used)

    @contextlib.contextmanager
    def opened(self):
        yield self


def test_what_the_driver_keeps_for_itself_is_no_model_s():
    """NVML counts it as used and CUDA, which the engine asked for its own share, does not: the
    same one must tell what was there before."""
    reserved, context, models = 600 << 20, 400 << 20, 100 << 20
    nvml = Nvml(reserved + context)
    meter = Meter("cuda:0", "GPU-1", 0, base_bytes=context, nvml=nvml.opened)
    assert meter.models_bytes() == 0
    nvml.used += models
    assert meter.models_bytes() == models


def test_without_nvml_nothing_is_measured():
    """As in a container without the driver's library."""
    meter = Meter("cuda:0", "GPU-1", 0, base_bytes=1, nvml=contextlib.nullcontext)
    assert meter.models_bytes() == 0
