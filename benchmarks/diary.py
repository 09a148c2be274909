"""What happened on a stack, as its workers' diaries and logs tell it."""

from __future__ import annotations

import json
from datetime import datetime

from benchmarks.stack import BenchStack


def assignments(stack: BenchStack) -> list[tuple[float, str, frozenset[str]]]:
    return [
        (entry.at, entry.worker, frozenset(entry.models))
        for entry in stack.diaries()
        if entry.what == "assigned"
    ]


def holders(stack: BenchStack, model: str, at: float) -> set[str]:
    """Workers to which it was assigned at that time."""
    last = {worker: models for when, worker, models in assignments(stack) if when < at}
    return {worker for worker, models in last.items() if model in models}


def moves(stack: BenchStack) -> list[tuple[float, str, frozenset[str]]]:
    """Every change of a worker's assignment: when, whose, and of which models."""
    last: dict[str, frozenset[str]] = {}
    moves = []
    for at, worker, models in assignments(stack):
        moves.append((at, worker, models ^ last.get(worker, frozenset())))
        last[worker] = models
    return moves


def changed(stack: BenchStack, since: float) -> set[str]:
    """Models of which some worker's assignment changed after `since`."""
    return {model for at, _, models in moves(stack) if at >= since for model in models}


def load(log: str, model: str, since: float, until: float) -> str:
    for line in log.splitlines():
        if "model_loaded" not in line or model not in line:
            continue
        said = json.loads(line)
        at = datetime.fromisoformat(said["timestamp"]).timestamp()
        if since <= at <= until + 0.05:
            return (
                f"load from {said['source']} {said['seconds'] * 1e3:.0f} ms, architecture "
                f"{said['architecture']}"
            )
    return ""
