"""From a recorded trace to "how many workers does this need": the trace's requests, simulated on
fleets of different sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from services.placer.core.policy import Policy
from shared.errors import InvalidRequest
from shared.models import Case
from shared.names import ModelId
from shared.traces import Counts, Header, Trace, TracedModel, TracedWorker
from sim.arrivals import merged
from sim.model import Outcome, SimModel, SimWorker, Workload
from sim.policies import POLICIES
from sim.run import run
from sim.workloads import of_arrivals

_MOST_REQUESTS = 50_000_000
"""That are simulated: some hours on one core, and some gigabytes."""


class Window(msgspec.Struct, frozen=True):
    """Seconds of a trace."""

    begin_s: float
    end_s: float


class Assumed(msgspec.Struct, frozen=True):
    """What the trace does not tell, and was assumed."""

    times: tuple[ModelId, ...] = ()
    """Models of which no batch had been measured: they take what the median one takes."""
    loads: tuple[ModelId, ...] = ()
    """Models of which no load had been measured: `Policy.unknown_load_s`."""


def busiest(trace: Trace, seconds: float) -> Window:
    """The window of this length in which most requests came."""
    interval = trace.header.interval_s
    slots = max(int(np.ceil(trace.duration_s / interval)), 1)
    totals = np.zeros(slots)
    for counts in trace.counts:
        totals[int(counts.at / interval)] += sum(counts.requests.values())
    length = min(max(round(seconds / interval), 1), slots)
    sums = np.convolve(totals, np.ones(length), "valid")
    begin = int(np.argmax(sums)) * interval
    return Window(begin, begin + length * interval)


def models_of(trace: Trace) -> tuple[tuple[SimModel, ...], Assumed]:
    """The models that were asked. Raises `InvalidRequest` when no batch of any was measured."""
    asked = {name for counts in trace.counts for name in counts.requests}
    traced = [trace.models[name] for name in sorted(asked)]
    known = [_cases(each)[0].seconds for each in traced if _cases(each)]
    if traced and not known:
        raise InvalidRequest(
            "the trace has no measured batch of any model: record while the models are asked"
        )
    usual = (Case(1, 0, float(np.median(known))),) if known else ()
    times: list[ModelId] = []
    loads: list[ModelId] = []
    made = []
    for each in traced:
        cases = _cases(each)
        load = each.load_seconds or Policy().unknown_load_s
        if not cases:
            times.append(each.id)
        if not each.load_seconds:
            loads.append(each.id)
        made.append(
            SimModel(
                manifest=each.manifest,
                cases=cases or usual,
                weights_bytes=each.weights_bytes or each.manifest.size_bytes,
                load_seconds=load,
                swap_seconds=each.swap_seconds or load * Policy().host_load_share,
                architecture=each.architecture,
            )
        )
    return tuple(made), Assumed(tuple(times), tuple(loads))


def workload_of(
    trace: Trace, models: Sequence[SimModel], window: Window | None = None, *,
    warmup_s: float = 0.0, seed: int = 0, name: str = "trace",
) -> Workload:  # fmt: skip
    """The trace's requests: as many in each interval as were counted, at moments drawn evenly
    within it. Bursts shorter than an interval are lost in a trace; those here are Poisson's.
    Raises `InvalidRequest` when they are more than can be simulated."""
    index = {model.id: number for number, model in enumerate(models)}
    interval = trace.header.interval_s
    window = window or Window(0.0, trace.duration_s)
    rng = np.random.default_rng([seed, *b"trace"])
    meant = [each for each in trace.counts if window.begin_s <= each.at < window.end_s]
    total = sum(sum(counts.requests.values()) for counts in meant)
    if total > _MOST_REQUESTS:
        raise InvalidRequest(
            f"{total:,} requests are too many to simulate; at most {_MOST_REQUESTS:,}: "
            "take the busiest stretch only"
        )
    times, which = [], []
    for counts in meant:
        numbers = np.array([index[each] for each in counts.requests], dtype=np.int32)
        repeated = np.repeat(numbers, list(counts.requests.values()))
        which.append(repeated)
        times.append(counts.at - window.begin_s + rng.random(len(repeated)) * interval)
    at, who = merged(times, which)
    duration = min(window.end_s, trace.duration_s) - window.begin_s
    return of_arrivals(name, models, at, who, duration, warmup_s=warmup_s, seed=seed)


def fleet_of(
    trace: Trace, count: int, *, budget_bytes: int = 0, host_bytes: int | None = None
) -> tuple[SimWorker, ...]:
    """`count` workers like the last one of the trace, or with this budget. Raises
    `InvalidRequest` when neither tells what a worker has."""
    like = trace.workers[-1] if trace.workers else None
    budget = budget_bytes or (like.budget_bytes if like else 0)
    if budget <= 0:
        raise InvalidRequest("the trace has seen no worker: say --budget, e.g. --budget 12GiB")
    if host_bytes is None:
        # A budget of one's own is another machine, of whose host memory nothing is known.
        host_bytes = like.host_bytes if like and not budget_bytes else 0
    return tuple(
        SimWorker(
            name=f"w{number}", budget_bytes=budget, host_bytes=host_bytes,
            device_kind=like.device_kind if like else "sim", labels=like.labels if like else {},
        )
        for number in range(count)
    )  # fmt: skip


def simulate(
    trace: Trace, workload: Workload, sizes: Sequence[int], policy: str, *,
    budget_bytes: int = 0, host_bytes: int | None = None,
) -> Iterator[Outcome]:  # fmt: skip
    """The same workload on fleets of these sizes, one after the other."""
    for size in sizes:
        fleet = fleet_of(trace, size, budget_bytes=budget_bytes, host_bytes=host_bytes)
        yield run(workload, fleet, POLICIES[policy](workload), seed=workload.seed)


def traced(workload: Workload, workers: Sequence[SimWorker] = (), interval_s: float = 1.0) -> Trace:
    """Any workload as a trace, as the placer's recorder would have written it."""
    slots = (workload.times / interval_s).astype(np.int64)
    counts = []
    bounds = np.searchsorted(slots, np.arange(int(slots[-1]) + 2 if len(slots) else 1))
    for slot, (first, last) in enumerate(pairwise(bounds)):
        numbers, times = np.unique(workload.which[first:last], return_counts=True)
        if len(numbers):
            requests = {
                workload.models[int(number)].id: int(count)
                for number, count in zip(numbers, times, strict=True)
            }
            counts.append(Counts(at=slot * interval_s, requests=requests))
    return Trace(
        header=Header(interval_s=interval_s, source=workload.name),
        models={
            model.id: TracedModel(
                manifest=model.manifest, device_kind="sim", cases=model.cases,
                weights_bytes=model.weights_bytes, load_seconds=model.load_seconds,
                swap_seconds=model.swap_seconds, architecture=model.architecture,
            )
            for model in workload.models
        },
        workers=tuple(
            TracedWorker(
                at=0.0, worker=worker.name, device_kind=worker.device_kind,
                budget_bytes=worker.budget_bytes, host_bytes=worker.host_bytes,
                labels=dict(worker.labels),
            )
            for worker in workers
        ),
        counts=tuple(counts),
    )  # fmt: skip


def _cases(model: TracedModel) -> tuple[Case, ...]:
    """What a batch of so many rows takes; of a padded model at its greatest measured size."""
    slowest: dict[int, Case] = {}
    for case in model.cases:
        known = slowest.get(case.rows)
        if case.seconds > 0 and (known is None or case.seconds > known.seconds):
            slowest[case.rows] = msgspec.structs.replace(case, size=0)
    return tuple(slowest[rows] for rows in sorted(slowest))
