"""A picture of simulated runs: attainment, what was asked, bindings and workers over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sim.model import Outcome
from sim.report import bindings_over_time, over_time

_MODELS = 8
"""Shown one by one: the most asked."""


def draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes a PNG. All are of one workload; the bindings are those under the first. Raises
    `OSError` when it cannot be written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    first = outcomes[0]
    workload = first.workload
    figure, (share, asked, bound, fleet) = plt.subplots(
        4, 1, figsize=(10, 11), sharex=True, height_ratios=[3, 2, 2, 2], constrained_layout=True
    )
    figure.suptitle(f"{workload.name}, {len(workload.times):,} requests, seed {workload.seed}")
    for outcome in outcomes:
        at, met = over_time(outcome)
        label = f"{_label(outcome)}: {outcome.attainment():.2%}"
        share.step(at, met * 100, where="post", label=label)
    share.set(ylabel="answered in target, %", ylim=(-3, 103))
    share.legend(loc="lower left", fontsize="small")
    if workload.warmup_s:
        share.axvspan(0, workload.warmup_s, color="0.9", label="warm-up")

    seconds = np.arange(0, np.ceil(workload.duration_s) + 1)
    busiest = np.argsort(-np.bincount(workload.which, minlength=len(workload.models)))[:_MODELS]
    asked.stairs(np.histogram(workload.times, seconds)[0], seconds, color="0.3", label="all")
    for place, model in enumerate(busiest):
        name = workload.models[model].manifest.name
        counts = np.histogram(workload.times[workload.which == model], seconds)[0]
        line = asked.stairs(counts, seconds, label=name)
        when, count = bindings_over_time(first, workload.models[model].id)
        when, count = np.append(when, workload.duration_s), np.append(count, count[-1])
        # A little apart, or the last one drawn hides the others.
        lifted = count + 0.06 * place
        bound.step(when, lifted, where="post", color=line.get_edgecolor(), label=name)
    asked.set(ylabel="requests/s", yscale="symlog")
    asked.legend(loc="upper right", fontsize="x-small", ncols=3)
    bound.set(ylabel=f"workers bound to it\n({_label(first)})")
    bound.yaxis.get_major_locator().set_params(integer=True)

    for outcome in outcomes:
        loads = np.array([change.at for change in outcome.changes if change.what == "loaded"])
        fleet.stairs(np.histogram(loads, seconds)[0], seconds, label=f"loads/s, {_label(outcome)}")
    if first.workers_over_time:
        when = np.array([at for at, _ in first.workers_over_time] + [workload.duration_s])
        there = [count for _, count in first.workers_over_time]
        fleet.step(when, [*there, there[-1]], where="post", color="black", label="workers")
    fleet.set(xlabel="seconds", ylabel="loads/s, workers", xlim=(0, workload.duration_s))
    fleet.legend(loc="upper right", fontsize="x-small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _label(outcome: Outcome) -> str:
    count = len(outcome.busy_s)
    return f"{outcome.policy}, {count} worker{'s' * (count != 1)}"
