"""What a simulated run came to, as numbers and as a table of text."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from sim.model import ENDINGS, Floats, Outcome


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Shares are of the counted requests (after the warm-up), seconds of them too;
    loads and bindings are those of the whole run."""

    workload: str
    policy: str
    workers: int
    requests: int
    attainment: float
    p50_s: float
    """nan where nothing was answered, as the next."""
    p99_s: float
    endings: dict[str, float]
    """Share by `ENDINGS`."""
    loads: int
    load_seconds: float
    bound: int
    unbound: int
    busy: float
    """Of all devices' time until the last answer, the share in which batches ran."""


def summary(outcome: Outcome) -> Summary:
    workload = outcome.workload
    counted = workload.times >= workload.warmup_s
    latency = outcome.latency[counted]
    answered = latency[np.isfinite(latency)]
    p50, p99 = np.quantile(answered, (0.5, 0.99)) if len(answered) else (np.nan, np.nan)
    endings = np.bincount(outcome.ending[counted], minlength=len(ENDINGS))
    total = max(int(counted.sum()), 1)
    kinds = [change.what for change in outcome.changes]
    workers = len(outcome.busy_s)
    ended = workload.times + np.where(np.isfinite(outcome.latency), outcome.latency, 0.0)
    # An overloaded fleet works on after the last arrival.
    lasted = max(workload.duration_s, float(ended.max(initial=0.0)))
    return Summary(
        workload=workload.name,
        policy=outcome.policy,
        workers=workers,
        requests=int(counted.sum()),
        attainment=outcome.attainment(),
        p50_s=float(p50),
        p99_s=float(p99),
        endings={name: int(endings[n]) / total for n, name in enumerate(ENDINGS)},
        loads=kinds.count("loaded"),
        load_seconds=outcome.load_seconds,
        bound=kinds.count("bound"),
        unbound=kinds.count("unbound"),
        busy=sum(outcome.busy_s.values()) / max(workers * lasted, 1e-9),
    )


HEAD = (
    "policy", "workers", "requests", "in target", "p50 ms", "p99 ms", "late", "refused", "lost",
    "loads", "loading s", "bound", "unbound", "busy",
)  # fmt: skip


def row(each: Summary) -> tuple[str, ...]:
    """As text, in the order of `HEAD`."""
    return (
        each.policy, str(each.workers), f"{each.requests:,}", percent(each.attainment),
        milliseconds(each.p50_s), milliseconds(each.p99_s),
        *(percent(each.endings[name]) for name in ENDINGS[1:]),
        f"{each.loads:,}", f"{each.load_seconds:.1f}", f"{each.bound:,}", f"{each.unbound:,}",
        percent(each.busy),
    )  # fmt: skip


def percent(share: float) -> str:
    """Never rounds to 100 % what is not all."""
    if 0.999 < share < 1:
        return f"{int(share * 1e5) / 1e3:.3f} %"
    return f"{share:.1%}".replace("%", " %")


def milliseconds(seconds: float) -> str:
    return "-" if np.isnan(seconds) else f"{seconds * 1e3:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    widths = [max(len(line[n]) for line in (head, *rows)) for n in range(len(head))]

    def told(line: Sequence[str]) -> str:
        first, *rest = line
        others = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        return "  ".join((first.ljust(widths[0]), *others)).rstrip()

    return "\n".join((told(head), told(["-" * width for width in widths]), *map(told, rows)))


def over_time(outcome: Outcome, step_s: float = 1.0) -> tuple[Floats, Floats]:
    """Begin of each step, and the share of the requests that came in it that were answered in
    target; nan where none came. The warm-up is included."""
    workload = outcome.workload
    targets = np.array([model.manifest.target_ms / 1e3 for model in workload.models])
    met = outcome.latency <= targets[workload.which]
    steps = max(int(np.ceil(workload.duration_s / step_s)), 1)
    which = np.minimum((workload.times / step_s).astype(int), steps - 1)
    came = np.bincount(which, minlength=steps).astype(float)
    good = np.bincount(which, weights=met, minlength=steps)
    share = np.divide(good, came, out=np.full(steps, np.nan), where=came > 0)
    return np.arange(steps, dtype=np.float64) * step_s, share


def bindings_over_time(outcome: Outcome, model: str) -> tuple[Floats, Floats]:
    """When the number of workers bound to the model changed, and to what."""
    at, count, now = [0.0], [0.0], 0
    for change in outcome.changes:
        if change.model != model or change.what not in {"bound", "unbound"}:
            continue
        now += 1 if change.what == "bound" else -1
        at.append(change.at)
        count.append(float(max(now, 0)))
    return np.array(at), np.array(count)
