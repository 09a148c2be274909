"""Which model runs next: the one with the most urgent item, but none takes more than two
batches in a row while others wait, so that a spiking model fills only its own share."""

from __future__ import annotations

from collections.abc import Iterable

from shared.names import ModelId

MAX_IN_A_ROW = 2


class Turns:
    def __init__(self) -> None:
        self._last: ModelId | None = None
        self._in_a_row = 0

    def __repr__(self) -> str:
        return f"Turns(last={self._last}, in_a_row={self._in_a_row})"

    def choose(self, waiting: Iterable[tuple[float, ModelId]]) -> ModelId | None:
        """The model of the earliest due time among (due, model); None when none waits."""
        candidates = sorted(waiting)
        if not candidates:
            return None
        first = candidates[0][1]
        if first == self._last and self._in_a_row >= MAX_IN_A_ROW and len(candidates) > 1:
            return candidates[1][1]
        return first

    def ran(self, model: ModelId) -> None:
        """A batch of `model` was handed to the engine."""
        self._in_a_row = self._in_a_row + 1 if model == self._last else 1
        self._last = model
