"""What a repository knows of the simulated models, beside their manifests."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shared.layout import Block, Layout, aligned
from shared.models import Profile
from shared.names import ModelId
from sim.model import SimModel, SimWorker


class Profiles:
    """What was measured of models, by kind of device: beside the manifests, in the repository."""

    def __init__(self) -> None:
        self._kept: dict[tuple[ModelId, str], Profile] = {}
        self._measured: set[str] = set()

    def get(self, model: ModelId, device_kind: str) -> Profile | None:
        return self._kept.get((model, device_kind))

    def keep(self, model: ModelId, profile: Profile) -> None:
        self._kept[model, profile.device_kind] = profile

    def measure(self, models: Iterable[SimModel], worker: SimWorker) -> None:
        """As if a worker like this one had served the models before."""
        if worker.device_kind not in self._measured:
            self._measured.add(worker.device_kind)
            for model in models:
                self.keep(model.id, profile_of(model, worker))


def profile_of(model: SimModel, worker: SimWorker) -> Profile:
    """What a worker of this kind measures of it."""
    return Profile(
        device_kind=worker.device_kind,
        weights_bytes=aligned(model.weights_bytes),
        cases=tuple(
            msgspec.structs.replace(case, seconds=case.seconds / worker.speed)
            for case in model.cases
        ),
        load_seconds=model.load_seconds / worker.copy_speed,
        swap_seconds=model.swap_seconds / worker.copy_speed,
    )


def layout_of(model: SimModel) -> Layout | None:
    """The smallest that is true: one block of all the weights. None for a model that is never
    swapped in, which is loaded as it is."""
    if not model.swap_seconds:
        return None
    block = Block(bytes(32), 0, model.weights_bytes)
    return Layout(architecture=model.architecture or model.id, may_write=False, blocks=(block,))
