"""Which queues a cycle asks about, and when the next one looks: over what is known, without
effects, since the simulator does the same (sim/placings.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from services.placer.knowledge import Knowledge
from shared.names import ModelId

_SOONEST_S: Final = 0.05
"""A model that aims at a few milliseconds does not make everybody's cycle that short."""


def unclear(knowledge: Knowledge) -> tuple[list[ModelId], list[ModelId]]:
    """Models of whose queues only the broker knows the depth: the urgent ones, and others
    (`DepthQuestions.choose`)."""
    urgent, others = [], []
    for model, active in knowledge.active.items():
        if model in knowledge.saturated or active.waiting_at is not None:
            urgent.append(model)
        elif active.depth or model not in knowledge.consumers:
            others.append(model)
    return urgent, others


def next_look_s(knowledge: Knowledge, depths: Mapping[ModelId, int]) -> float:
    """Seconds until the next cycle is due for what was found waiting just now; infinite when
    nothing was. A backlog that is still there after a quarter of its model's target is one."""
    now, soonest = knowledge.clock(), math.inf
    for model, depth in depths.items():
        active = knowledge.active.get(model)
        if not depth or active is None or active.manifest is None:
            continue
        since = active.backlog_since
        due = (now if since is None else since) + active.manifest.target_ms / 4000
        if due > now:
            soonest = min(soonest, max(due - now, _SOONEST_S))
    return soonest
