"""The weights of all models that an engine holds: blocks of bytes in two tiers, the host's
memory and the device's.

A block is known by its content: models that have the same one share it, and it is there for as
long as one of them is. So nothing may write through the views that are handed out. With sharing
off, every block is its model's own.

The laws: what does not fit is refused with numbers, and then no model has less; nothing is
refused that the bytes suffice for (others are moved for it, while no model runs); what could
not be read is not there at all; every block counts the models that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Final, Literal, NamedTuple

import torch

from services.worker.engine.cudaregion import CudaRegion
from services.worker.engine.extents import Space, grain_for
from services.worker.engine.files import ScatteredFile
from services.worker.engine.memory import Device
from services.worker.engine.movers import Read, move_in_host, mover_for, read_to_host
from services.worker.engine.places import Move, Place, joined
from services.worker.engine.regions import HostRegion, Region, Typed
from services.worker.engine.tiers import Key, Tier
from services.worker.engine.views import Spot, Weights, check, views
from shared.layout import Block, Layout, aligned
from shared.names import ModelId

TierName = Literal["host", "device"]

_PATIENCE_S: Final = 5.0
"""Longer than the time between an eviction and the load that it made room for; short enough
that who looks for the bytes finds them."""


_STEP_BYTES: Final = 2 << 20
"""Read at once while a model is held: a millisecond from a fast disk, during which a swap waits."""


_PINNED_GRAIN: Final = 32 << 20
"""Of the host's memory, where a device copies from it: each grain is registered by itself, and
each needs a copy of its own."""


class Placed(NamedTuple):
    """A model on the device."""

    weights: Weights
    weights_bytes: int
    """Of its distinct blocks, those that others have as well included."""
    source: Literal["disk", "host"]
    """`disk` when anything had to be read."""


class BlockMemory(NamedTuple):
    """All in bytes."""

    device_bytes: int
    """Taken by blocks."""
    device_spare_bytes: int
    """Reserved beyond these."""
    host_bytes: int
    host_spare_bytes: int


class _Anatomy(NamedTuple):
    """What the store has worked out of a layout. Kept while the model is in a tier: bringing it
    back shall cost little more than the copy."""

    layout: Layout
    dtypes: tuple[torch.dtype, ...]
    """One per slot."""
    keys: tuple[Key, ...]
    """One per block of the layout."""
    blocks: dict[Key, Block]
    """The distinct ones, in the file's order: both tiers keep it where they can, so that what
    lies together in one lies together in the other."""
    sizes: dict[Key, int]
    """Bytes of each of these."""
    weights_bytes: int


class BlockStore:
    """One thread calls everything but `memory`, which any may call.

    `device_bytes` and `host_bytes` are the budgets of the blocks, the greatest that they will
    ever have. What is backed and has been empty for `patience_s` is given back, by grains, which
    follow from the budgets unless they are told.
    """

    def __init__(
        self,
        device: Device,
        *,
        device_bytes: int,
        host_bytes: int,
        share: bool = True,
        patience_s: float = _PATIENCE_S,
        grain: int | None = None,
        standstill: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        """`standstill` does some work while no model runs, and returns after it."""
        target = device.torch_device
        cuda = target.type == "cuda"
        self._share = share
        self._mover = mover_for(target)
        self._standstill = standstill
        host_grain = grain or (max(grain_for(host_bytes), _PINNED_GRAIN) if cuda else None)
        host, room = Space(host_bytes, host_grain), Space(device_bytes, grain)
        self._host: Tier[HostRegion] = Tier(
            "host",
            host,
            HostRegion(host.most_bytes, host.grain, pin_for=target if cuda else None),
            patience_s,
            self._rearrange_host,
        )
        region: Region = HostRegion(room.most_bytes, room.grain)
        if cuda:
            region = CudaRegion(room.most_bytes, room.grain, target, device)
        self._device: Tier[Region] = Tier("device", room, region, patience_s, self._rearrange)
        self._no_bytes = Typed(torch.empty(0, dtype=torch.uint8, device=target))
        self._anatomies: dict[ModelId, _Anatomy] = {}
        self._weights: dict[ModelId, Weights] = {}
        """Of each model on the device."""
        self._memory = BlockMemory(0, 0, 0, 0)

    def hold(self, model: ModelId, layout: Layout, file: ScatteredFile) -> Generator[None]:
        """Into the host's memory, from the disk: a piece with each step, so that other things
        can be done between them, except with this model. It is there when the steps have come to
        their end; closing them earlier undoes them. Raises as `place` does."""
        anatomy = self._anatomy(model, layout)
        if model in self._host:
            return
        with ExitStack() as undo:
            undo.callback(self._settle, model)
            missing = self._host.enter(model, anatomy.sizes)
            undo.callback(self._host.leave, model)
            self._settle(model, anatomy)
            for lot in _lots(missing, anatomy, _STEP_BYTES):
                read_to_host(file, [self._part(anatomy, *part) for part in lot])
                yield
            self._host.filled(missing)
            undo.pop_all()

    def place(
        self, model: ModelId, layout: Layout, file: ScatteredFile, *, keep_host: bool
    ) -> Placed:
        """Onto the device: what the host's memory has from there, the rest from the disk, with
        `keep_host` through the host's memory, where it stays. When it is there already, only the
        views are made.

        Raises `Failed`: `resource_exhausted` when it does not fit one of the tiers,
        `model_failed` when the file cannot be read or does not suit the layout.
        """
        anatomy = self._anatomy(model, layout)
        with ExitStack() as undo:
            undo.callback(self._settle, model)
            # 1. Room first: a "no" costs nothing yet.
            missing: Mapping[Key, Place] = {}
            if model not in self._device:
                missing = self._device.enter(model, anatomy.sizes)
                undo.callback(self._device.leave, model)
            # 2. Through the host's memory, or with only what is there.
            read = keep_host and self._hold(model, anatomy, file, undo)
            # Bytes that are under way must not arrive in room that is another's by then.
            undo.callback(self._mover.finish)
            read = self._fill(missing, anatomy, file) or read
            self._device.filled(missing)
            # 3. A device makes its copies meanwhile.
            tensors = self._views(anatomy)
            self._mover.finish()
            undo.pop_all()
        self._settle(model, anatomy)
        weights = self._weights.setdefault(model, Weights(tensors))
        return Placed(weights, anatomy.weights_bytes, "disk" if read else "host")

    def evict(self, model: ModelId, tier: TierName) -> None:
        """Its bytes can be had at once, those that no other model has; the system gets them with
        `tidy`. Nothing to do when it is not there."""
        self._tier(tier).leave(model)
        if tier == "device":
            self._weights.pop(model, None)
        self._settle(model)

    def limit_device(self, device_bytes: int) -> None:
        """Another budget of the device from now on, since others take of it as well. No model
        goes; what comes later must fit."""
        self._device.limit(device_bytes)
        self._publish()

    def in_tier(self, model: ModelId, tier: TierName) -> bool:
        return model in self._tier(tier)

    def memory(self) -> BlockMemory:
        """As it was after the last change that was completed."""
        return self._memory

    def tidy(self, now: float) -> float | None:
        """To be called after evictions, and again at the time that it tells, if any. `now` is of
        any clock that only goes forward, in seconds."""
        times = [tier.tidy(now) for tier in (self._host, self._device)]
        self._publish()
        return min((time for time in times if time is not None), default=None)

    def validate(self) -> None:
        """Recomputes the laws of both tiers; raises `AssertionError`."""
        self._host.validate()
        self._device.validate()

    # --- the parts

    def _tier(self, name: TierName) -> Tier[HostRegion] | Tier[Region]:
        return self._host if name == "host" else self._device

    def _anatomy(self, model: ModelId, layout: Layout) -> _Anatomy:
        known = self._anatomies.get(model)
        if known is not None:
            return known
        dtypes = check(layout)
        keys: tuple[Key, ...] = tuple(
            (block.digest, block.nbytes) if self._share else (model, index)
            for index, block in enumerate(layout.blocks)
        )
        pairs = sorted(zip(keys, layout.blocks, strict=True), key=lambda pair: pair[1].offset)
        blocks = dict(pairs)
        sizes = {key: block.nbytes for key, block in blocks.items()}
        return _Anatomy(layout, dtypes, keys, blocks, sizes, sum(map(aligned, sizes.values())))

    def _hold(
        self, model: ModelId, anatomy: _Anatomy, file: ScatteredFile, undo: ExitStack
    ) -> bool:
        """Whether anything was read."""
        if model in self._host:
            return False
        missing = self._host.enter(model, anatomy.sizes)
        undo.callback(self._host.leave, model)
        reads = list(_reads(self._host, missing.items(), anatomy))
        read_to_host(file, reads)
        self._host.filled(missing)
        return bool(reads)

    def _fill(self, missing: Mapping[Key, Place], anatomy: _Anatomy, file: ScatteredFile) -> bool:
        """Whether anything was read."""
        copies, rest = [], []
        for key, place in missing.items():
            source = self._host.place_of(key)
            if source is None:
                rest.append((key, place))
            else:
                copies.append((source, place))
        for source, place in joined(copies):
            self._mover.copy(self._host.region, source, self._device.region, place)
        reads = list(_reads(self._device, rest, anatomy))
        if reads:
            self._mover.read(file, reads)
        return bool(reads)

    def _views(self, anatomy: _Anatomy) -> tuple[torch.Tensor, ...]:
        """As plain tensors, in whatever thread: no module takes inference tensors."""
        spots = []
        for key in anatomy.keys:
            place = self._device.place_of(key)
            assert place is not None, "the model is in the device tier"
            typed = self._device.region.typed if place.nbytes else self._no_bytes
            spots.append(Spot(typed, place.offset))
        with torch.inference_mode(mode=False):
            return views(anatomy.layout, anatomy.dtypes, spots)

    def _part(self, anatomy: _Anatomy, key: Key, start: int, count: int) -> Read:
        """Of a block into the host's memory, wherever its room is now."""
        place = Place(self._host.room_of(key).offset + start, aligned(count))
        return Read(anatomy.blocks[key].offset + start, count, self._host.region, place)

    def _rearrange_host(self, moves: Sequence[Move], moved: Callable[[], None]) -> None:
        """Nothing looks at the host's blocks but copies, which this thread has waited for."""
        move_in_host(self._host.region, moves)
        moved()

    def _rearrange(self, moves: Sequence[Move], moved: Callable[[], None]) -> None:
        """While no model runs: from then on each finds its tensors where they are."""

        def work() -> None:
            self._mover.move(self._device.region, moves)
            self._mover.finish()
            moved()
            for model, weights in self._weights.items():
                weights.views = self._views(self._anatomies[model])

        self._standstill(work)

    def _settle(self, model: ModelId, anatomy: _Anatomy | None = None) -> None:
        """After every change, and every one that failed."""
        if model not in self._host and model not in self._device:
            self._anatomies.pop(model, None)
        elif anatomy is not None:
            self._anatomies[model] = anatomy
        self._publish()

    def _publish(self) -> None:
        """One assignment, for threads that look at any time."""
        self._memory = BlockMemory(
            self._device.used_bytes,
            self._device.spare_bytes,
            self._host.used_bytes,
            self._host.spare_bytes,
        )


def _reads(
    tier: Tier[HostRegion] | Tier[Region],
    missing: Iterable[tuple[Key, Place]],
    anatomy: _Anatomy,
) -> Iterator[Read]:
    for key, place in missing:
        if place.nbytes:
            block = anatomy.blocks[key]
            yield Read(block.offset, block.nbytes, tier.region, place)


def _lots(
    keys: Iterable[Key], anatomy: _Anatomy, room: int
) -> Iterator[list[tuple[Key, int, int]]]:
    """Of each block where a part begins and how long it is, in lots of about `room` bytes."""
    lot: list[tuple[Key, int, int]] = []
    left = room
    for key in keys:
        nbytes, done = anatomy.sizes[key], 0
        while done < nbytes:
            count = min(nbytes - done, left)
            lot.append((key, done, count))
            done += count
            left -= aligned(count)
            if left <= 0:
                yield lot
                lot, left = [], room
    if lot:
        yield lot
