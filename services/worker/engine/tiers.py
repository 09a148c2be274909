"""One tier of memory: which blocks are in it, for whom, and in which slabs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
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
    """A block that is there or under way, and how many models have it."""

    __slots__ = ("filled", "models", "place")

    def __init__(self, place: Place) -> None:
        self.place = place
        self.models = 1
        self.filled = False


class Tier(Generic[S]):
    """The laws: a block is there exactly while a model has it; only blocks take room; a slab of
    the space is a slab of memory."""

    def __init__(
        self,
        name: str,
        space: Space,
        make: Callable[[int], S],
        patience_s: float,
        give_back: Callable[[], None] | None = None,
    ) -> None:
        """`give_back` returns what slabs have released to the system, where they do not do so
        themselves."""
        self._name = name
        self._space = space
        self._make = make
        self._patience_s = patience_s
        self._slabs: dict[int, S] = {}
        self._give_back = give_back
        self._empty_since: dict[int, float] = {}
        self._owing = False
        self._owing_since: float | None = None
        """The first tidying that saw it."""
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
        """Of a block whose bytes are there."""
        held = self._held.get(key)
        return held.place if held is not None and held.filled else None

    def slab_of(self, place: Place) -> S:
        """Of a place that has bytes."""
        return self._slabs[place.slab]

    def enter(self, model: ModelId, blocks: Mapping[Key, int]) -> dict[Key, Place]:
        """The model has these blocks (with their bytes) from now on. Tells those whose bytes are
        not there, which must be filled, in the same order; some may be under way for another
        model, which may fail: that the same bytes are written twice does no harm.

        Raises `Failed` with `resource_exhausted` when they do not fit, or the system has no more;
        then every model has what it had before, but empty slabs may be gone.
        """
        assert model not in self._models, f"{model} is in the tier already"
        new = [key for key in blocks if key not in self._held]
        plan = self._space.plan([blocks[key] for key in new])
        if isinstance(plan, NoRoom):
            raise Failed("resource_exhausted", f"no room in the {self._name} tier: {model} {plan}")
        self._prepare(plan)
        for key in blocks:
            if key in self._held:
                self._held[key].models += 1
        for place in merged(plan.places):
            self._space.take(place)
            self._empty_since.pop(place.slab, None)
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
        due = [slab for slab, at in self._empty_since.items() if now >= at + self._patience_s]
        for slab in due:
            self._drop(slab)
        times = list(self._empty_since.values())
        if self._owing and self._give_back is not None:
            # Slabs that went because others needed the room, who got it all the same.
            since = self._owing_since = now if self._owing_since is None else self._owing_since
            if due or now >= since + self._patience_s:
                self._give_back()
                self._owing, self._owing_since = False, None
            else:
                times.append(since)
        return min(times) + self._patience_s if times else None

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
        self._owing = True

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
