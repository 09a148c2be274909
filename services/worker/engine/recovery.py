"""After a failure: whether the engine can go on."""

from __future__ import annotations

from services.worker.engine.dispatch import DeviceLost
from services.worker.engine.failures import Diagnosis
from services.worker.engine.memory import Device


def recover(device: Device, why: Diagnosis) -> None:
    """Gives back what a failure left behind. To be called once all that it held has been let go
    of. Raises `DeviceLost` when it took the device."""
    device.reclaim()
    if not device.healthy():
        raise DeviceLost(why.message)
