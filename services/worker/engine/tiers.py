"""One tier of memory: which blocks are in it, for whom, and in which slabs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from services.worker.engine.extents import NoRoom, Place, Plan, Space, merged
from services.worker.engine.failures import Failed
from services.worker.engine.slabs import Slab
from shared.names import ModelId

Key = tuple[bytes | ModelId, int]
"""A block that models share: its content's digest and its bytes. One that is its model's own:
the model and a number."""

S = TypeVar("S", bound=Slab)


class _Held:
    """A block that is there, and how many models have it."""

    __slots__ = ("models", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.models = 1


class Tier(Generic[S]):
    """The laws: a block is there exactly while a model has it; only blocks take room; a slab of
    the space is a slab of memory."""

    def __init__(
        self, name: str, space: Space, make: Callable[[int], S], patience_s: float
    ) -> None:
        self._name = name
        self._space = space
        self._make = make
        self._patience_s = patience_s
        self._slabs: dict[int, S] = {}
        self._empty_since: dict[int, float] = {}
        self._held: dict[Key, _Held] = {}
        self._models: dict[ModelId, tuple[Key, ...]] = {}

    @property
    def used_bytes(self) -> int:
        return self._space.used_bytes

    @property
    def spare_bytes(self) -> int:
        """In slabs, beyond what is used."""
        return self._space.reserved_bytes - self._space.used_bytes

    def __contains__(self, model: ModelId) -> bool:
        return model in self._models

    def place_of(self, key: Key) -> Place | None:
        held = self._held.get(key)
        return None if held is None else held.place

    def slab_of(self, place: Place) -> S:
        """Of a place that has bytes."""
        return self._slabs[place.slab]

    def enter(self, model: ModelId, blocks: Mapping[Key, int]) -> dict[Key, Place]:
        """The model has these blocks (with their bytes) from now on. Tells those that were not
        there, which must be filled, in the same order.

        Raises `Failed` with `resource_exhausted` when they do not fit; then nothing has changed.
        """
        assert model not in self._models, f"{model} is in the tier already"
        missing = [key for key in blocks if key not in self._held]
        plan = self._space.plan([blocks[key] for key in missing])
        if isinstance(plan, NoRoom):
            raise Failed("resource_exhausted", f"no room in the {self._name} tier: {model} {plan}")
        self._prepare(plan)
        for key in blocks:
            if key in self._held:
                self._held[key].models += 1
        for place in merged(plan.places):
            self._space.take(place)
            self._empty_since.pop(place.slab, None)
        for key, place in zip(missing, plan.places, strict=True):
            self._held[key] = _Held(place)
        self._models[model] = tuple(blocks)
        return dict(zip(missing, plan.places, strict=True))

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
        """Another budget from now on. What is held stays; empty slabs go at once, as far as that
        is needed."""
        self._space.limit(budget_bytes)
        for number in self._space.empty_slabs():
            if self._space.reserved_bytes <= self._space.budget_bytes:
                break
            self._drop(number)

    def tidy(self, now: float) -> float | None:
        """Gives back the slabs that have been empty long enough, since the first call that saw
        them so. Tells when the next ones will be; None when there are none."""
        empty = self._space.empty_slabs()
        self._empty_since = {slab: self._empty_since.get(slab, now) for slab in empty}
        for slab, since in list(self._empty_since.items()):
            if now >= since + self._patience_s:
                self._drop(slab)
        if not self._empty_since:
            return None
        return min(self._empty_since.values()) + self._patience_s

    def _prepare(self, plan: Plan) -> None:
        for number in plan.drop:
            self._drop(number)
        made: dict[int, S] = {}
        try:
            for number, nbytes in plan.make:
                made[number] = self._make(nbytes)
        except BaseException:
            for slab in made.values():
                slab.release()
            raise
        for number, slab in made.items():
            self._space.add(number, slab.nbytes)
        self._slabs |= made

    def _drop(self, number: int) -> None:
        self._space.drop(number)
        self._empty_since.pop(number, None)
        self._slabs.pop(number).release()

    def validate(self) -> None:
        """Recomputes the laws; raises `AssertionError`."""
        self._space.validate()
        assert self._slabs.keys() == self._space.slab_sizes.keys()
        counts: dict[Key, int] = {}
        for keys in self._models.values():
            assert len(set(keys)) == len(keys), "a model has a block twice"
            for key in keys:
                counts[key] = counts.get(key, 0) + 1
        assert counts == {key: held.models for key, held in self._held.items()}
        assert self._space.used_bytes == sum(held.place.nbytes for held in self._held.values())
        spans = [held.place for held in self._held.values() if held.place.nbytes]
        for one, other in itertools.pairwise(sorted(spans)):
            assert one.slab != other.slab or one.offset + one.nbytes <= other.offset, "overlap"
