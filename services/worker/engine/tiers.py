"""One tier of memory: which blocks are in it, for whom, and where."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Generic, Protocol, TypeVar

from services.worker.engine.extents import NoRoom, Space
from services.worker.engine.failures import Failed
from services.worker.engine.places import Move, Place, merged
from shared.names import ModelId

Key = tuple[bytes | ModelId, int]
"""A block that models share: its content's digest and its bytes. One that is its model's own:
the model and a number."""


class Backing(Protocol):
    """The memory under a line of addresses."""

    def back(self, place: Place) -> None:
        """Raises `Failed` with `resource_exhausted` when the system has no more; none of these
        bytes is backed then."""

    def give_back(self, place: Place) -> None:
        """Nobody looks at these bytes any more."""


R = TypeVar("R", bound=Backing)


class _Held:
    """A block that is there or under way, and how many models have it."""

    __slots__ = ("filled", "models", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.models = 1
        self.filled = False


class Tier(Generic[R]):
    """The laws: a block is there exactly while a model has it; only blocks take room; a grain of
    the space that is backed is so in the region."""

    def __init__(
        self,
        name: str,
        space: Space,
        region: R,
        patience_s: float,
        rearrange: Callable[[Sequence[Move], Callable[[], None]], None],
    ) -> None:
        """`rearrange` moves the bytes, in this order and while nobody uses them, and calls
        before anybody does so again."""
        self.region: Final = region
        self._name = name
        self._space = space
        self._patience_s = patience_s
        self._rearrange = rearrange
        self._empty_since: dict[int, float] = {}
        self._held: dict[Key, _Held] = {}
        self._models: dict[ModelId, tuple[Key, ...]] = {}

    @property
    def used_bytes(self) -> int:
        return self._space.used_bytes

    @property
    def spare_bytes(self) -> int:
        """Backed, beyond what is used."""
        return self._space.reserved_bytes - self._space.used_bytes

    def __contains__(self, model: ModelId) -> bool:
        return model in self._models

    def place_of(self, key: Key) -> Place | None:
        """Of a block whose bytes are there. Another one after the next `enter`, perhaps."""
        held = self._held.get(key)
        return held.place if held is not None and held.filled else None

    def room_of(self, key: Key) -> Place:
        """Of a block that a model has, whether its bytes are there or not; as with `place_of`."""
        return self._held[key].place

    def enter(self, model: ModelId, blocks: Mapping[Key, int]) -> dict[Key, Place]:
        """The model has these blocks (with their bytes) from now on. Tells those whose bytes are
        not there, which must be filled, in the same order; some may be under way for another
        model, which may fail: that the same bytes are written twice does no harm. Others may be
        moved for it.

        Raises `Failed` with `resource_exhausted` when they do not fit, or the system has no more;
        then every model has what it had before.
        """
        assert model not in self._models, f"{model} is in the tier already"
        new = [key for key in blocks if key not in self._held]
        plan = self._space.plan([blocks[key] for key in new])
        if isinstance(plan, NoRoom):
            raise Failed("resource_exhausted", f"no room in the {self._name} tier: {model} {plan}")
        places = merged(plan.places)
        # All that is needed before anything is moved: only this may be refused.
        self._back([*(move.target for move in plan.moves), *places])
        if plan.moves:
            self._rearrange(plan.moves, lambda: self._moved(plan.moves))
        for key in blocks:
            if key in self._held:
                self._held[key].models += 1
        for place in places:
            self._take(place)
        for key, place in zip(new, plan.places, strict=True):
            self._held[key] = _Held(place)
        self._models[model] = tuple(blocks)
        held = ((key, self._held[key]) for key in blocks)
        return {key: each.place for key, each in held if not each.filled}

    def filled(self, keys: Iterable[Key]) -> None:
        """The bytes of these blocks are there."""
        for key in keys:
            self._held[key].filled = True

    def leave(self, model: ModelId) -> None:
        """What no other model has is free at once. Idempotent."""
        freed = []
        for key in self._models.pop(model, ()):
            held = self._held[key]
            held.models -= 1
            if not held.models:
                del self._held[key]
                freed.append(held.place)
        for place in merged(freed):
            self._space.free(place)

    def limit(self, budget_bytes: int) -> None:
        """Another budget from now on. What is held stays; what is backed for nothing goes at
        once, as far as that is needed."""
        self._space.limit(budget_bytes)
        over = self._space.reserved_bytes - self._space.budget_bytes
        if over > 0 and self._space.empty:
            count = -(-over // self._space.grain)
            self._give_back(sorted(self._space.empty)[-count:])

    def tidy(self, now: float) -> float | None:
        """Gives back the grains that have been empty long enough, since the first call that saw
        them so. Tells when the next ones will be; None when there are none."""
        self._empty_since = {
            grain: self._empty_since.get(grain, now) for grain in self._space.empty
        }
        due = [grain for grain, at in self._empty_since.items() if now >= at + self._patience_s]
        self._give_back(sorted(due))
        times = self._empty_since.values()
        return min(times) + self._patience_s if times else None

    def _back(self, places: Iterable[Place]) -> None:
        for place in places:
            for stretch in list(self._space.unbacked(place)):
                self.region.back(stretch)
                self._space.back(stretch)

    def _give_back(self, grains: Sequence[int]) -> None:
        for grain in grains:
            self._empty_since.pop(grain, None)
        for stretch in list(self._space.stretches(grains)):
            self._space.give_back(stretch)
            self.region.give_back(stretch)

    def _take(self, place: Place) -> None:
        self._space.take(place)
        for grain in self._space.grains(place):
            self._empty_since.pop(grain, None)

    def _moved(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self._space.free(move.source)
            self._take(move.target)
        starts = [move.source.offset for move in moves]
        for held in self._held.values():
            at = bisect.bisect(starts, held.place.offset) - 1
            if at >= 0 and held.place.nbytes and held.place.offset < moves[at].source.end:
                by = moves[at].source.offset - moves[at].target.offset
                held.place = Place(held.place.offset - by, held.place.nbytes)

    def validate(self) -> None:
        """Recomputes the laws; raises `AssertionError`."""
        self._space.validate()
        counts: dict[Key, int] = {}
        for keys in self._models.values():
            assert len(set(keys)) == len(keys), "a model has a block twice"
            for key in keys:
                counts[key] = counts.get(key, 0) + 1
        assert counts == {key: held.models for key, held in self._held.items()}
        assert self._space.used_bytes == sum(held.place.nbytes for held in self._held.values())
        spans = [held.place for held in self._held.values() if held.place.nbytes]
        for one, other in itertools.pairwise(sorted(spans)):
            assert one.end <= other.offset, "overlap"
