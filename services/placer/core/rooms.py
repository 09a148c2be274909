"""What all that is assigned to one worker takes there: reckoned once, and kept until a size or
the assignment changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from services.placer.core.columns import Floats, Ints, Models
from services.placer.core.tenancy import whole_bytes
from services.placer.core.view import ModelView, WorkerView, footprint
from shared.fit import can_be_served, used_bytes
from shared.models import Footprint
from shared.names import ModelId


class Room:
    """One worker's part of a view; never changed."""

    __slots__ = (
        "_budget", "_owner", "_reported", "_served", "_shares", "_whole", "assigned", "bytes",
        "device_used", "loose", "rows", "since", "sizes", "spare", "spare_bytes", "used",
    )  # fmt: skip

    def __init__(
        self, worker: WorkerView, models: Mapping[ModelId, ModelView], row: Mapping[ModelId, int]
    ) -> None:
        """`row`: of each model, as in `columns_of(models)`."""
        self.assigned = worker.assigned
        self._reported = worker.reported
        self._shares = worker.shares
        self._owner = models.owner if isinstance(models, Models) else models
        assigned = worker.assigned
        facts_of = models.facts if isinstance(models, Models) else models.get
        told = [facts_of(model) for model in assigned]
        self.sizes: dict[ModelId, Footprint] = {
            model: footprint(worker, model, facts)
            for model, facts in zip(assigned, told, strict=True)
        }
        alone = any(facts is not None and facts.placement.alone for facts in told)
        self._budget = worker.budget_bytes if alone else None
        """Of which a size depends: who is alone takes all of it."""
        self.used = used_bytes(self.sizes.values())
        """On the device, if all were there."""
        self.device_used = used_bytes(
            [size for size in self.sizes.values() if size.pinned or not size.copyable]
        )
        """Of what cannot wait in the host's memory."""
        self.rows: Ints = np.array([row.get(model, -1) for model in assigned], np.int64)
        """Of the models; -1: not active."""
        self.since: Floats = np.array([each.since for each in assigned.values()], float)
        self.bytes: Ints = np.array([s.weights_bytes for s in self.sizes.values()], np.int64)
        """Each by itself."""
        self.spare = tuple(model for model, each in assigned.items() if each.spare)
        self.spare_bytes = sum(_own_bytes(self.sizes[model]) for model in self.spare)
        self.loose = tuple(model for model in worker.reported if model not in assigned)
        """What it reports and is not assigned."""
        self._served: tuple[int, int, bool] | None = None
        self._whole: Ints | None = None

    def __repr__(self) -> str:
        return f"<Room {len(self.sizes)} models, {self.used:,} bytes>"

    @property
    def whole(self) -> Ints:
        """What each takes by itself, its workspace included: what counts for its tenant."""
        if self._whole is None:
            self._whole = np.array([whole_bytes(s) for s in self.sizes.values()], np.int64)
        return self._whole

    def is_of(self, worker: WorkerView, models: Mapping[ModelId, ModelView]) -> bool:
        """Whether it is what a new one would be, as far as is cheap to tell: a
        model's known sizes may have changed."""
        return (
            self.assigned is worker.assigned
            and self._reported is worker.reported
            and self._shares == worker.shares
            and self._budget in {None, worker.budget_bytes}
            and self._owner is (models.owner if isinstance(models, Models) else models)
        )

    def follow(self, reported: Mapping[ModelId, object]) -> None:
        """A newer report tells of the same models, and the same sizes."""
        self._reported = reported  # type: ignore[assignment]  # only its identity counts

    def is_served(self, worker: WorkerView) -> bool:
        """Whether the worker has room for all of it (`shared.fit.can_be_served`)."""
        budget, host = worker.budget_bytes, worker.host_bytes
        if self._served is None or self._served[:2] != (budget, host):
            self._served = (budget, host, can_be_served(self.sizes.values(), budget, host))
        return self._served[2]


def rooms(
    workers: Iterable[WorkerView], models: Mapping[ModelId, ModelView], row: Mapping[ModelId, int]
) -> list[Room]:
    """Of each worker: what comes with the view, else made."""
    return [
        worker.room
        if isinstance(worker.room, Room) and worker.room.is_of(worker, models)
        else Room(worker, models, row)
        for worker in workers
    ]


def _own_bytes(size: Footprint) -> int:
    return size.weights_bytes - sum(share.nbytes for share in size.shares)
