"""Which model runs next: the one with the most urgent item, but none takes more than two
batches in a row while others wait, so that a spiking model fills only its own share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from shared.names import ModelId

MAX_IN_A_ROW: Final = 2


class Turns:
    def __init__(self) -> None:
        self._last: ModelId | None = None
        self._in_a_row = 0

    def __repr__(self) -> str:
        return f"Turns(last={self._last}, in_a_row={self._in_a_row})"

    def choose(
        self, waiting: Iterable[tuple[float, ModelId]], may: Callable[[ModelId], bool]
    ) -> ModelId | None:
        """The first of these (due, model), which are sorted, that may run, or the second when
        the first has had its turns. None when none may run."""
        able = (model for _, model in waiting if may(model))
        first = next(able, None)
        if first is None or first != self._last or self._in_a_row < MAX_IN_A_ROW:
            return first
        return next(able, first)

    def ran(self, model: ModelId) -> None:
        """A batch of `model` was handed to the engine."""
        self._in_a_row = self._in_a_row + 1 if model == self._last else 1
        self._last = model
