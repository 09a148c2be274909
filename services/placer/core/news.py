"""What is new in a worker's report, apart from what it counts: that goes from column to column
(`core.heard`)."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import msgspec

from shared.control import ModelReport, Report
from shared.names import ModelId

state = attrgetter("bound", "saturated", "tier", "phase", "footprint")
"""What is told of a model apart from numbers, as far as anybody looks for what is new in it."""


class News(msgspec.Struct, frozen=True):
    """A report against the one before."""

    models: dict[ModelId, ModelReport]
    """All that it tells; never changed."""
    changed: Sequence[tuple[ModelReport | None, ModelReport]] = ()
    """What was told before, None if nothing, and what is now: of models where
    `state` differs."""
    gone: Sequence[ModelReport] = ()
    """What was told before of models that it does not mention."""
    timed: bool = False
    """How long some model takes, to answer or to load, is not what it was."""


def header(report: Report) -> tuple[object, ...]:
    """What a view shows of a report beside its models."""
    return (
        report.device_kind,
        report.budget_bytes,
        report.host_budget_bytes,
        report.engine_up,
        report.draining,
        report.labels,
    )


def shows_the_same(was: ModelReport, told: ModelReport) -> bool:
    """What a view shows of one model on one worker, sizes and times aside: not what is counted."""
    return was.bound == told.bound and was.tier == told.tier and was.phase == told.phase
