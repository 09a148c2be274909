"""Where models are and what they take: the block store, what lies outside it, and the programs.
The copier's thread owns it; any thread may ask for `memory`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final, Generic, TypeVar

from services.worker.engine.architectures import Architecture, Architectures
from services.worker.engine.blocks import BlockMemory, BlockStore, Placed
from services.worker.engine.executor import Executor
from services.worker.engine.failures import Failed
from services.worker.engine.files import ScatteredFile
from services.worker.engine.memory import Device
from services.worker.engine.programs import Skeleton
from services.worker.engine.unrest import Unrest
from services.worker.wire import MemoryMeasured
from shared.fit import fit
from shared.layout import Layout
from shared.models import Footprint
from shared.names import ModelId

L = TypeVar("L")


class Residency(Generic[L]):
    """One budget for all that is on the device: blocks in the store, and outside it modules
    that were loaded whole, programs' constants, and what batches need. The store reserves no
    more than those leave.

    Modules are weighed against the blocks and not against what is backed for them, as the agent
    does it. So beside holes that are half a grain the device may be asked for a little more than
    the budget; it is its allocator that refuses then, which a load survives.
    """

    def __init__(
        self,
        device: Device,
        budget_bytes: int,
        host_bytes: int,
        unrest: Unrest,
        standstill: Callable[[Callable[[], None]], None],
        *,
        share: bool,
    ) -> None:
        """`standstill` does some work while no model runs, and returns after it."""
        self.programs: Final[Architectures[L]] = Architectures()
        self._device = device
        self._budget_bytes = budget_bytes
        self._unrest = unrest
        self._store = BlockStore(
            device,
            device_bytes=budget_bytes,
            host_bytes=host_bytes,
            share=share,
            standstill=standstill,
        )
        self._program_of: Final[dict[ModelId, Architecture[L]]] = {}
        """Of each model that is in the store."""
        self._workspace_bytes = 0
        self._wholes: Final[dict[ModelId, int]] = {}
        """Bytes of each model that is outside it, or on its way there."""

    def memory(self) -> MemoryMeasured:
        """As it is now."""
        held = self._store.memory()
        used = self._device.used_bytes()
        if self._device.torch_device.type == "cpu":  # where both tiers are in one memory
            used -= held.host_bytes + held.host_spare_bytes
        return MemoryMeasured(used, held.device_spare_bytes, held.host_bytes, held.host_spare_bytes)

    def program_of(self, model: ModelId) -> Architecture[L] | None:
        """Of a model in the store."""
        return self._program_of.get(model)

    def held(self) -> BlockMemory:
        """What the store has."""
        return self._store.memory()

    # --- in the store

    def know(self, program: Architecture[L], skeleton: Skeleton) -> None:
        """The program is there, and takes what its constants take."""
        program.skeleton = skeleton
        granule = self._device.granule
        program.constants_bytes = sum(
            -(-nbytes // granule) * granule for nbytes in skeleton.constants_nbytes
        )
        self._limit_store()

    def hold(
        self, model: ModelId, program: Architecture[L], layout: Layout, file: ScatteredFile
    ) -> Generator[None]:
        """Into the host's memory, a piece with each step; see `BlockStore.hold`."""
        steps = self._store.hold(model, layout, file)
        self._keep(model, program)
        try:
            while True:
                with self._unrest:
                    if next(steps, steps) is steps:
                        return
                yield
        finally:
            steps.close()
            self._leave(model)

    def place(
        self,
        model: ModelId,
        program: Architecture[L],
        layout: Layout,
        file: ScatteredFile,
        *,
        keep_host: bool,
    ) -> Placed:
        """Onto the device. Raises `Failed` when it does not fit."""
        with self._unrest:
            placed = self._store.place(model, layout, file, keep_host=keep_host)
        self._keep(model, program)
        return placed

    def release(self, model: ModelId) -> None:
        """What the host's memory holds of the model."""
        self._store.evict(model, "host")
        self._leave(model)

    def leave(self, workspace_bytes: int) -> None:
        """So much of the budget is for batches: the store reserves nothing of it."""
        self._workspace_bytes = workspace_bytes
        self._limit_store()

    # --- outside the store

    def take_room(self, model: ModelId, weights_bytes: int) -> None:
        """For a module outside the store; what it took before is forgotten. Weights alone: that
        there is room for workspaces besides is planned by the agent, which knows them all.

        Raises `Failed` (`resource_exhausted`) with the numbers when it does not fit.
        """
        self._wholes.pop(model, None)
        taken = self._outside_bytes() + self._store.memory().device_bytes
        refusal = fit(Footprint(weights_bytes), (Footprint(taken),), self._budget_bytes)
        if refusal is not None:
            raise Failed("resource_exhausted", str(refusal))
        self._wholes[model] = weights_bytes
        self._limit_store()

    # --- both

    def drop(self, model: ModelId, executor: Executor | None) -> bool:
        """Everything of the model that is on the device. Whether something of it was outside the
        store, which the device has to be told to give back."""
        with self._unrest:
            if executor is not None:
                executor.close()
            self._store.evict(model, "device")
            outside = self._wholes.pop(model, None) is not None
            if outside:
                self._limit_store()
        self._leave(model)
        return outside

    def tidy(self, now: float) -> float | None:
        """Gives back what nobody needs; the time when there may be more."""
        closed = self.programs.forget_unused()
        with self._unrest:
            for skeleton in closed:
                skeleton.close()
            if closed:
                self._device.reclaim()
                self._limit_store()
            return self._store.tidy(now)

    def _limit_store(self) -> None:
        self._store.limit_device(self._budget_bytes - self._outside_bytes() - self._workspace_bytes)

    def _outside_bytes(self) -> int:
        return sum(self._wholes.values()) + self.programs.constants_bytes

    def _keep(self, model: ModelId, program: Architecture[L]) -> None:
        program.models.add(model)
        self._program_of[model] = program

    def _leave(self, model: ModelId) -> None:
        """Its program is not needed for it any more, if it is in neither tier."""
        if self._store.in_tier(model, "device") or self._store.in_tier(model, "host"):
            return
        program = self._program_of.pop(model, None)
        if program is not None:
            program.models.discard(model)
