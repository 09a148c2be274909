"""The room of one tier: what stands in it, against its budget.

The question of `shared.fit`, put to a sum that is kept: a worker of hundreds of models that share
tensors decides what to swap at every batch. Law: the sum is what `used_bytes` says of all that is
held (`validate`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from shared.fit import used_bytes
from shared.models import Footprint
from shared.names import ModelId


class Room:
    def __init__(self) -> None:
        self.budget_bytes = 0
        self.version = 0
        """Another one after each change of what is held."""
        self._held: dict[ModelId, Footprint] = {}
        self._own: dict[ModelId, int] = {}
        """Bytes of each that it shares with nobody."""
        self._sum_own = 0
        self._shared: dict[str, tuple[int, int]] = {}
        """How many have a part, and its bytes."""
        self._sum_shared = 0

    def __repr__(self) -> str:
        return f"Room({len(self)} in {self.used_bytes():,} of {self.budget_bytes:,} bytes)"

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[ModelId]:
        return iter(list(self._held))

    def __getitem__(self, model: ModelId) -> Footprint:
        return self._held[model]

    # --- what is held ---------------------------------------------------------------------

    def put(self, model: ModelId, footprint: Footprint) -> None:
        """Takes a model in, or notes that it takes another amount now."""
        if self._held.get(model) == footprint:
            return
        self.remove(model)
        self.version += 1
        self._held[model] = footprint
        own = footprint.weights_bytes
        for share in footprint.shares:
            count, _ = self._shared.get(share.key, (0, 0))
            self._shared[share.key] = (count + 1, share.nbytes)
            self._sum_shared += 0 if count else share.nbytes
            own -= share.nbytes
        self._own[model] = own
        self._sum_own += own

    def remove(self, model: ModelId) -> None:
        footprint = self._held.pop(model, None)
        if footprint is None:
            return
        self.version += 1
        self._sum_own -= self._own.pop(model)
        for share in footprint.shares:
            count, nbytes = self._shared.pop(share.key)
            if count > 1:
                self._shared[share.key] = (count - 1, nbytes)
            else:
                self._sum_shared -= nbytes

    def clear(self) -> None:
        for model in list(self._held):
            self.remove(model)

    def footprints(self) -> list[Footprint]:
        return list(self._held.values())

    # --- questions ------------------------------------------------------------------------

    def used_bytes(self) -> int:
        return self._sum_own + self._sum_shared + self._workspace(())

    def shared_bytes(self) -> int:
        """What would be needed more if nothing were shared."""
        return sum((count - 1) * nbytes for count, nbytes in self._shared.values())

    @property
    def over(self) -> bool:
        return self.used_bytes() > self.budget_bytes

    def fits(self, newcomer: Footprint | None, without: Collection[ModelId] = ()) -> bool:
        """Whether it fits once these are gone; for None, whether the rest does."""
        return self._used(newcomer, without) <= self.budget_bytes

    def victims(
        self, newcomer: Footprint | None, candidates: Iterable[ModelId]
    ) -> list[ModelId] | None:
        """Who must go so that the newcomer fits: of the candidates the first ones, as few as
        will do, without those that turn out not to matter. None when all of them would not do.
        """
        if self.fits(newcomer):
            return []
        victims: list[ModelId] = []
        for candidate in candidates:
            victims.append(candidate)
            if self.fits(newcomer, victims):
                break
        else:
            return None
        for spared in victims[-2::-1]:
            rest = [victim for victim in victims if victim != spared]
            if self.fits(newcomer, rest):
                victims = rest
        return victims

    def _used(self, newcomer: Footprint | None, without: Collection[ModelId]) -> int:
        gone: dict[str, int] = {}
        weights = self._sum_own + self._sum_shared
        for model in without:
            weights -= self._own[model]
            for share in self._held[model].shares:
                left = gone[share.key] = gone.get(share.key, 0) + 1
                count, nbytes = self._shared[share.key]
                weights -= nbytes if left == count else 0
        workspace = self._workspace(without)
        if newcomer is None:
            return weights + workspace
        weights += newcomer.weights_bytes
        for share in newcomer.shares:
            count, _ = self._shared.get(share.key, (0, 0))
            weights -= share.nbytes if count > gone.get(share.key, 0) else 0
        return weights + max(workspace, newcomer.workspace_bytes)

    def _workspace(self, without: Collection[ModelId]) -> int:
        if not without:
            return max((each.workspace_bytes for each in self._held.values()), default=0)
        left = (each.workspace_bytes for name, each in self._held.items() if name not in without)
        return max(left, default=0)

    def validate(self) -> None:
        """Raises `AssertionError` where the law does not hold."""
        assert self.used_bytes() == used_bytes(self._held.values()), self
