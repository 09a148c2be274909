"""What is new in a worker's report. Workers report whole, and most of it stands since the last
one: comparing it is cheap, looking into every model of every worker is not."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shared.control import ModelReport, Report
from shared.names import ModelId


class News(msgspec.Struct, frozen=True):
    """A report against the one before."""

    models: dict[ModelId, ModelReport]
    """All that it tells; never changed."""
    changed: list[tuple[ModelReport | None, ModelReport]]
    """What was told before, None if nothing, and what is now: of models where it differs."""
    gone: list[ModelReport]
    """What was told before of models that it does not mention."""


def compare(before: Mapping[ModelId, ModelReport], report: Report) -> News:
    """`before`: all that the report before told."""
    models = {told.model: told for told in report.models}
    known = before.get
    changed = [(was, told) for model, told in models.items() if (was := known(model)) != told]
    if len(models) == len(before) and not any(was is None for was, _ in changed):
        return News(models, changed, [])
    return News(models, changed, [was for model, was in before.items() if model not in models])


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
    """What a view shows of one model on one worker, sizes aside: not what is counted."""
    return (
        was.seconds_per_item == told.seconds_per_item
        and was.bound == told.bound
        and was.tier == told.tier
        and was.phase == told.phase
        and was.load_seconds == told.load_seconds
    )
