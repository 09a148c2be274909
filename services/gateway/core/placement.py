"""Where models are, told in words: from the workers' reports to a line a person reads."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shared.control import Report
from shared.names import ModelId


class Placement(msgspec.Struct):
    """What the workers together say of one model version."""

    device: list[str] = msgspec.field(default_factory=list)
    """Workers that have it on their device."""
    bound: list[str] = msgspec.field(default_factory=list)
    """Workers that consume its queue."""
    host: list[str] = msgspec.field(default_factory=list)
    """Workers that hold its weights in their host's memory, to be swapped in."""
    loading: list[str] = msgspec.field(default_factory=list)
    failed: dict[str, str] = msgspec.field(default_factory=dict)
    """Why it could not be loaded, by worker."""
    device_bytes: int = 0
    """Weights and workspace on all devices together."""
    bytes_of: dict[str, int] = msgspec.field(default_factory=dict)
    """The same by kind of memory, `GPU` or `CPU`."""

    @property
    def servable(self) -> bool:
        """A registered model is, since it is loaded when asked, unless all who tried failed."""
        serving = {*self.device, *self.host, *self.loading, *self.bound} - self.failed.keys()
        return not self.failed or bool(serving)

    @property
    def tiers(self) -> dict[str, str]:
        """Where it is, by worker; on the others it is on disk."""
        return dict.fromkeys(self.host, "host") | dict.fromkeys(self.device, "device")

    def __str__(self) -> str:
        """E.g. `on device of 2 workers`, `host memory`, `disk`."""
        if not self.servable:
            return "cannot be loaded: " + next(iter(self.failed.values()))
        if self.device:
            return f"on device of {len(self.device)} worker" + "s" * (len(self.device) > 1)
        where = "host memory" if self.host else "disk"
        return f"{where}, loading" if self.loading else where


UNPLACED = Placement()
"""Of a model that no worker mentions: it is on disk."""


def placements(reports: Iterable[Report]) -> dict[ModelId, Placement]:
    """By model version, of all that any worker mentions. A worker whose engine is down has
    nothing on its device."""
    found: dict[ModelId, Placement] = {}
    for report in reports:
        for model in report.models:
            place = found.setdefault(model.model, Placement())
            if model.phase == "failed":
                place.failed[report.worker] = model.error or "the worker gave no reason"
            elif model.phase == "loading":
                place.loading.append(report.worker)
            elif model.tier == "device" and report.engine_up:
                place.device.append(report.worker)
                nbytes = model.footprint.weights_bytes + model.footprint.workspace_bytes
                place.device_bytes += nbytes
                kind = "GPU" if report.device_kind.startswith("cuda") else "CPU"
                place.bytes_of[kind] = place.bytes_of.get(kind, 0) + nbytes
            if model.tier == "host" and model.phase != "failed" and report.engine_up:
                place.host.append(report.worker)
            if model.bound:
                place.bound.append(report.worker)
    return found
