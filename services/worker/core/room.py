"""The room of one tier: what stands in it, against its budget.

The question of `shared.fit`, put to sums that are kept: a worker of hundreds of models that share
tensors decides what to swap at every batch, so whoever is thought away, or back again, costs no
more than what it has itself. Law: the sum is what `used_bytes` says of all that is held
(`validate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from shared.fit import used_bytes
from shared.models import Footprint
from shared.names import ModelId


class Room:
    def __init__(self) -> None:
        self.budget_bytes = 0
        self.version = 0
        """Another one after each change of what is held."""
        self._held: dict[ModelId, Footprint] = {}
        self._sums = _Sums()

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
        self._sums.add(footprint)

    def remove(self, model: ModelId) -> None:
        footprint = self._held.pop(model, None)
        if footprint is not None:
            self.version += 1
            self._sums.subtract(footprint)

    def clear(self) -> None:
        for model in list(self._held):
            self.remove(model)

    def footprints(self) -> list[Footprint]:
        return list(self._held.values())

    # --- questions ------------------------------------------------------------------------

    def used_bytes(self) -> int:
        return self._sums.weights + self._sums.workspace

    def shared_bytes(self) -> int:
        """What would be needed more if nothing were shared."""
        return sum((count - 1) * nbytes for count, nbytes in self._sums.shared.values())

    @property
    def over(self) -> bool:
        return self.used_bytes() > self.budget_bytes

    def fits(self, newcomer: Footprint | None, without: Iterable[ModelId] = ()) -> bool:
        """Whether it fits once these are gone; for None, whether the rest does."""
        thought = _Thought(self._sums, newcomer)
        for model in without:
            thought.leaves(self._held[model])
        return thought.used <= self.budget_bytes

    def victims(
        self, newcomer: Footprint | None, candidates: Iterable[ModelId]
    ) -> list[ModelId] | None:
        """Who must go so that the newcomer fits: of the candidates the first ones, as few as
        will do, without those that turn out not to matter. None when all of them would not do.
        """
        thought = _Thought(self._sums, newcomer)
        if thought.used <= self.budget_bytes:
            return []
        victims: list[ModelId] = []
        for candidate in candidates:
            victims.append(candidate)
            thought.leaves(self._held[candidate])
            if thought.used <= self.budget_bytes:
                break
        else:
            return None
        spared: set[ModelId] = set()
        for victim in victims[-2::-1]:
            if thought.used_with(self._held[victim]) <= self.budget_bytes:
                thought.stays(self._held[victim])
                spared.add(victim)
        return [victim for victim in victims if victim not in spared]

    def validate(self) -> None:
        """Raises `AssertionError` where the law does not hold."""
        assert self.used_bytes() == used_bytes(self._held.values()), self


class _Sums:
    def __init__(self) -> None:
        self.weights = 0
        """What several have counts once."""
        self.shared: dict[str, tuple[int, int]] = {}
        """How many have a part, and its bytes."""
        self.workspaces: Counter[int] = Counter()
        """How many have one of so many bytes."""
        self.workspace = 0
        """The greatest of them."""

    def add(self, footprint: Footprint) -> None:
        self.weights += footprint.weights_bytes
        for share in footprint.shares:
            count, _ = self.shared.get(share.key, (0, 0))
            self.shared[share.key] = (count + 1, share.nbytes)
            self.weights -= share.nbytes if count else 0
        self.workspaces[footprint.workspace_bytes] += 1
        self.workspace = max(self.workspace, footprint.workspace_bytes)

    def subtract(self, footprint: Footprint) -> None:
        self.weights -= footprint.weights_bytes
        for share in footprint.shares:
            count, nbytes = self.shared.pop(share.key)
            if count > 1:
                self.shared[share.key] = (count - 1, nbytes)
                self.weights += nbytes
        workspace = footprint.workspace_bytes
        self.workspaces[workspace] -= 1
        if not self.workspaces[workspace]:
            del self.workspaces[workspace]
            if workspace == self.workspace:
                self.workspace = max(self.workspaces, default=0)


class _Thought:
    """Sums with a newcomer, and without some of those that are there."""

    def __init__(self, sums: _Sums, newcomer: Footprint | None) -> None:
        self._sums = sums
        self._weights = sums.weights
        self._gone: dict[str, int] = {}
        """Of those that have a shared part."""
        self._gone_with: dict[int, int] = {}
        """Of those that have such a workspace."""
        self._workspace = sums.workspace
        """The greatest of those that are left."""
        self._lower: list[int] | None = None
        """The others, the greatest last: of all that are there, once that is asked."""
        self._at_least = 0
        self._brings: frozenset[str] = frozenset()
        if newcomer is not None:
            self._at_least = newcomer.workspace_bytes
            self._brings = frozenset(share.key for share in newcomer.shares)
            self._weights += newcomer.weights_bytes
            for share in newcomer.shares:
                self._weights -= share.nbytes if share.key in sums.shared else 0

    @property
    def used(self) -> int:
        return self._weights + max(self._workspace, self._at_least)

    def leaves(self, footprint: Footprint) -> None:
        """Only before anything `stays`."""
        self._weights -= footprint.weights_bytes
        for share in footprint.shares:
            gone = self._gone[share.key] = self._gone.get(share.key, 0) + 1
            if share.key in self._brings or gone < self._sums.shared[share.key][0]:
                self._weights += share.nbytes  # somebody has it still
        of_all, workspace = self._sums.workspaces, footprint.workspace_bytes
        self._gone_with[workspace] = self._gone_with.get(workspace, 0) + 1
        while self._workspace and self._gone_with.get(self._workspace) == of_all[self._workspace]:
            if self._lower is None:
                self._lower = sorted(each for each in of_all if each < self._workspace)
            self._workspace = self._lower.pop() if self._lower else 0

    def used_with(self, footprint: Footprint) -> int:
        """If one that left stays after all."""
        workspace = max(self._workspace, footprint.workspace_bytes, self._at_least)
        return self._weights + self._own_bytes(footprint) + workspace

    def stays(self, footprint: Footprint) -> None:
        self._weights += self._own_bytes(footprint)
        self._workspace = max(self._workspace, footprint.workspace_bytes)
        for share in footprint.shares:
            self._gone[share.key] -= 1

    def _own_bytes(self, footprint: Footprint) -> int:
        """Of one that left: what nobody else has now."""
        there = (
            share.nbytes
            for share in footprint.shares
            if share.key in self._brings or self._gone[share.key] < self._sums.shared[share.key][0]
        )
        return footprint.weights_bytes - sum(there)
