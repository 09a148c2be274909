"""Which queues the broker is asked about in one look: so many at most, the most urgent first,
and all of those that wait in turns. Why so few: ADR 0012.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection

from shared.names import ModelId

_URGENT_WEIGHT = 4
"""An urgent question is as due after one look as another after four."""
_NEW_AGE = 4
"""Looks for which a newcomer counts as having waited: it goes before most, but a stream of them
does not shut out the old."""


class DepthQuestions:
    """Laws: never more than `limit` at a look; whoever goes on waiting is asked at last, however
    many others do; while all fit, all are asked."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._look = 0
        self._asked: dict[ModelId, int] = {}

    def __repr__(self) -> str:
        return f"<DepthQuestions limit={self.limit} look={self._look} waiting={len(self._asked)}>"

    def choose(self, urgent: Collection[ModelId], others: Collection[ModelId]) -> list[ModelId]:
        """`urgent`: nobody consumes the queue although something was put there, or a consumer's
        window is full. `others`: something waited when last asked, or nobody is known to look."""
        self._look += 1
        new = self._look - _NEW_AGE
        self._asked = {
            model: self._asked.get(model, new) for models in (urgent, others) for model in models
        }
        if len(self._asked) <= self.limit:
            chosen = [*urgent, *others]
        else:
            due = [(-self._age(model) * _URGENT_WEIGHT, model) for model in urgent]
            due += [(-self._age(model), model) for model in others]
            chosen = [model for _, model in heapq.nsmallest(self.limit, due)]
        self._asked |= dict.fromkeys(chosen, self._look)
        return chosen

    def _age(self, model: ModelId) -> int:
        return self._look - self._asked[model]
