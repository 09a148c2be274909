"""What batches take of the device beyond the weights, by the peaks of what was allocated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from services.worker.engine.memory import Device
from services.worker.engine.unrest import Unrest


class Before(NamedTuple):
    """What was true when a measurement began."""

    quiet: int
    others: dict[int, int]
    """Bytes of each other batch that was on the device."""


class Peaks:
    """Batches are measured one at a time, on the dispatch thread; they land on any."""

    def __init__(self, device: Device, unrest: Unrest, *, beside: bool) -> None:
        """`beside`: while one batch computes, another one comes or goes."""
        self._device = device
        self._unrest = unrest
        self._beside = beside
        self._aboard: dict[int, int] = {}
        self._lock = threading.Lock()

    def board(self, batch: int, nbytes: int) -> None:
        """So much of the device the batch keeps for its inputs, and its outputs once they are
        known, until it has landed."""
        if self._beside:
            with self._lock:
                self._aboard[batch] = nbytes

    def land(self, batch: int, end: Callable[[], None]) -> None:
        """`end` lets go of the batch's bytes."""
        with self._lock:  # `end` below sees both or neither
            end()
            self._aboard.pop(batch, None)

    def begin(self, batch: int) -> Before | None:
        """None when nothing could be learnt, since models come or go."""
        quiet = self._unrest.quiet()
        if quiet is None:
            return None
        with self._lock:
            others = {each: nbytes for each, nbytes in self._aboard.items() if each != batch}
        self._device.begin_measuring()
        return Before(quiet, others)

    def end(self, before: Before) -> int | None:
        """The peak since then, with room for the batch beside it. None when models came or went
        meanwhile: their bytes cannot be told from a batch's."""
        peak = self._device.peak_bytes()
        if self._unrest.quiet() != before.quiet:
            return None
        if not self._beside:
            return peak
        with self._lock:
            # The peak is counted from what was taken at the beginning. Of that, what has been
            # freed since may have been taken again unseen.
            landed = [nbytes for each, nbytes in before.others.items() if each not in self._aboard]
            return peak + sum(landed) + max((*self._aboard.values(), *before.others.values()))
