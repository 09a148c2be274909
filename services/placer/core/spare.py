"""What is done where nobody waits: memory that is free holds copies that may be needed, slowly
(`Pace`)."""

from __future__ import annotations

import heapq

import msgspec
import numpy as np

from services.placer.core.planner import Planner


def add_spare(planner: Planner) -> None:
    """Copies for models with the most demand per copy, where a device has room to spare."""
    fleet, columns, policy = planner.fleet, planner.columns, planner.policy
    at, spared = planner.view.at, planner.pace.spared
    if not policy.spare_at_once or not planner.nobody_waits:
        return
    if spared is not None and at - spared < policy.spare_every_s:
        return
    usual = columns.usual
    limit = np.minimum(columns.limit, fleet.serving)
    some = (fleet.count > 0) & (fleet.count < limit) & columns.present
    some &= usual >= policy.spare_above * fleet.count
    for move in planner.pace.moves:
        if move.model in columns.row:
            some[columns.row[move.model]] = False
    due = [(-float(usual[row] / fleet.count[row]), row) for row in np.flatnonzero(some).tolist()]
    heapq.heapify(due)
    added = tried = 0
    # As many again may be looked at in vain: where memory is full that is every model.
    while due and added < policy.spare_at_once and tried < 2 * policy.spare_at_once:
        _, row = heapq.heappop(due)
        model = columns.ids[row]
        assert model is not None, "a row that a model has"
        tried += 1
        chosen = planner.chooser.spare(planner.view.models[model])
        if chosen is None:
            continue
        each = float(usual[row]) / int(fleet.count[row])
        planner.put(model, chosen, f"spare memory, {each:.2f} device s/s per copy", spare=True)
        added += 1
        if fleet.count[row] < limit[row] and usual[row] >= policy.spare_above * fleet.count[row]:
            heapq.heappush(due, (-float(usual[row] / fleet.count[row]), row))
    if added:
        planner.pace = msgspec.structs.replace(planner.pace, spared=at)
