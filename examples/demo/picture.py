"""demo.png: device memory filling up model by model, and the spike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
import numpy as np

from examples.demo.traffic import Answer, quantile
from examples.demo.watch import Sight

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

STEP_S = 0.5


class Spike(msgspec.Struct, frozen=True):
    """When what happened in the spike, in `time.monotonic()` seconds."""

    model: str
    watched_from: float
    began: float
    second_binding: float | None
    ended: float
    given_back: float | None
    watched_to: float


def draw(
    path: Path,
    sights: Sequence[Sight],
    answers: Sequence[Answer],
    spike: Spike,
    *,
    filled: tuple[float, float],
    first_worker: str,
    budget_bytes: int,
    weights_bytes: int,
) -> None:
    """Writes the picture. `filled`: from the first request until all models had been asked."""
    figure, (fill, rate, bindings, latency) = plt.subplots(
        4, 1, figsize=(10, 11), height_ratios=[3, 2, 1, 2], constrained_layout=True
    )
    _fill(fill, sights, filled, first_worker, budget_bytes, weights_bytes)
    times = np.arange(spike.watched_from, spike.watched_to, STEP_S)
    hot = [a for a in answers if a.model == spike.model]
    others = [a for a in answers if a.model != spike.model]
    x = times - spike.began
    rate.step(x, [_count(hot, t, "asked") for t in times], where="post", label="asked")
    rate.step(x, [_count(hot, t, "answered") for t in times], where="post", label="answered")
    rate.set(ylabel="requests/s", title=f"The spike of {spike.model}, published to RabbitMQ")
    rate.legend(loc="upper right")

    seen = [s for s in sights if spike.watched_from <= s.at <= spike.watched_to]
    bindings.step(
        [s.at - spike.began for s in seen],
        [len(s.bound().get(spike.model, ())) for s in seen],
        where="post",
        color="tab:red",
    )
    bindings.set(ylabel="bindings", ylim=(-0.2, 2.4), yticks=(0, 1, 2))

    for label, some, color in (
        (spike.model, hot, "tab:red"),
        ("the others, p50", others, "tab:blue"),
    ):
        latency.plot(x, [_quantile(some, t, 0.5) for t in times], color=color, label=label)
    latency.plot(
        x, [_quantile(others, t, 0.99) for t in times],
        color="tab:blue", linestyle=":", label="the others, p99",
    )  # fmt: skip
    latency.set(xlabel="seconds since the spike began", ylabel="latency, ms", yscale="log")
    latency.legend(loc="upper right")
    for axes in (rate, bindings, latency):
        axes.set_xlim(x[0], x[-1])
        axes.axvspan(0, spike.ended - spike.began, color="tab:orange", alpha=0.12)
        for moment in (spike.second_binding, spike.given_back):
            if moment is not None:
                axes.axvline(moment - spike.began, color="grey", linewidth=0.8, linestyle="--")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _fill(
    axes: Axes,
    sights: Sequence[Sight],
    filled: tuple[float, float],
    worker: str,
    budget_bytes: int,
    weights_bytes: int,
) -> None:
    seen = [s for s in sights if filled[0] - 0.5 <= s.at <= filled[1]]
    if seen:
        x = [s.at - filled[0] for s in seen]
        axes.fill_between(
            x, [s.used_bytes.get(worker, 0) / 1e9 for s in seen], step="post", alpha=0.35,
            label="sum of measured footprints",
        )  # fmt: skip
        axes.step(
            x, [s.measured_bytes.get(worker, 0) / 1e9 for s in seen], where="post",
            color="grey", linewidth=1, label="the engine's resident memory",
        )  # fmt: skip
        count = axes.twinx()
        count.step(x, [len(s.resident(worker)) for s in seen], where="post", color="tab:green")
        # Both axes to one scale: a model's step on the right is its bytes on the left.
        most = max(s.measured_bytes.get(worker, 0) for s in seen)
        top = max(1.2 * budget_bytes, 1.02 * most)
        axes.set_ylim(0, top / 1e9)
        count.set(ylabel="models on the device", ylim=(0, top / weights_bytes))
        count.yaxis.label.set_color("tab:green")
    axes.axhline(budget_bytes / 1e9, color="tab:red", linestyle="--", label="device budget")
    axes.set(
        xlabel="seconds since the first request",
        ylabel="GB",
        title=f"One process fills up, model by model ({weights_bytes / 1e6:.1f} MB each)",
    )
    axes.legend(loc="upper left")


def _count(answers: Sequence[Answer], start: float, moment: str) -> float:
    """Answers per second whose `moment` (asked, answered) lies in this step."""
    hits = sum(start <= float(getattr(a, moment)) < start + STEP_S for a in answers)
    return hits / STEP_S


def _quantile(answers: Sequence[Answer], start: float, share: float) -> float:
    return 1000 * quantile([a.seconds for a in answers if start <= a.asked < start + STEP_S], share)
