from __future__ import annotations

import os

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
