"""The simulator against reality: the same requests through both, and what became of them.

The real stack (RabbitMQ, Redis, gateway, placer, workers, each a process) serves every trace with
executors that take their times from a table, and the simulator serves it with the same table, the
real placer's core and the real worker's core, in virtual time. Four of five requests are published
to RabbitMQ by a producer, one comes over HTTP. Some hundred requests a second are far below what
two cores can pass on, so the table is the limit and the machine is not; by how much requests were
made later than planned says whether that held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from benchmarks import baseline
from benchmarks.asking import Answer, Ask, Client
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.stack import BenchStack, running
from benchmarks.statistics import median
from benchmarks.table import Table, register, request
from sim import model as sim
from sim.placings import Roost
from sim.run import Settings
from sim.run import run as simulate
from sim.workloads import drifting, fleet_of_workers, stepping

_MODELS: Final = 16
_WORKERS: Final = 3
_ROOM: Final = 4
"""Models that fit on each worker: a quarter of all must always be elsewhere."""
_TARGET_MS: Final = 200.0
_TIMEOUT_S: Final = 30.0
_HTTP: Final = 5
"""One of so many comes over HTTP."""
_TABLE: Final = Table(
    cases=((1, 0.020), (8, 0.055)), weights_bytes=96 << 20, load_seconds=0.15, swap_seconds=0.02
)


@dataclass(frozen=True)
class Compared:
    """One trace, served twice."""

    simulated: sim.Outcome
    real: sim.Outcome
    late_s: float
    """By how much requests were made later than planned, at the 99th percentile."""

    def apart(self) -> float:
        """In attainment, real less simulated."""
        return self.real.attainment() - self.simulated.attainment()

    def __str__(self) -> str:
        lines = []
        for name, outcome in (("simulated", self.simulated), ("real", self.real)):
            p50, p99 = latency_ms(outcome, 50), latency_ms(outcome, 99)
            lines.append(
                f"  {name:9}: in target {outcome.attainment():.3f}, p50 {p50:.0f} ms, "
                f"p99 {p99:.0f} ms, {loads(outcome)} loads, "
                f"{float(bindings(outcome).mean()):.1f} bindings"
            )
        return "\n".join([f"  {self.simulated.workload.name}", *lines])


async def run(
    device: str, *, traces: int = 4, seconds: float = 40.0, rate: float = 90.0, seed: int = 0
) -> Outcome:
    """`traces` of `seconds` each, in turn with drifting popularity and with a model that steps up
    tenfold. `rate`: requests per second over all models."""
    began = time.monotonic()
    done = [
        await compare(number, seconds=seconds, rate=rate, seed=seed + number)
        for number in range(traces)
    ]
    apart = [abs(each.apart()) for each in done]
    real, simulated = [each.real for each in done], [each.simulated for each in done]
    figures = (
        Figure("in target, simulated against real: furthest apart", max(apart), "", 0.05),
        Figure("… mean over the traces", float(np.mean(apart)), ""),
        Figure("in target, simulated", _mean(each.attainment() for each in simulated), ""),
        Figure("in target, real", _mean(each.attainment() for each in real), ""),
        *(
            Figure(f"{what} p{q}, real over simulated",
                   median([latency_ms(each.real, q) / latency_ms(each.simulated, q)
                           for each in done]), "x")
            for what, q in (("latency", 50), ("latency", 99))
        ),
        Figure("latency p50, real", _mean(latency_ms(each, 50) for each in real), "ms"),
        Figure("latency p99, real", _mean(latency_ms(each, 99) for each in real), "ms"),
        Figure("loads a trace, simulated", _mean(loads(each) for each in simulated), ""),
        Figure("loads a trace, real", _mean(loads(each) for each in real), ""),
        Figure("bindings at any time, simulated", _mean(bindings(e).mean() for e in simulated), ""),
        Figure("bindings at any time, real", _mean(bindings(e).mean() for e in real), ""),
        Figure("bindings apart in one second, mean", _mean(_bindings_apart(e) for e in done), ""),
        Figure("requests refused or lost, real",
               sum(int((each.ending >= _ENDING["refused"]).sum()) for each in real), "", 0),
        Figure("requests made later than planned, p99",
               max(each.late_s for each in done) * 1e3, "ms"),
        Figure("simulating took, of the time that passed",
               _mean(each.wall_s / each.workload.duration_s for each in simulated), "x"),
    )  # fmt: skip
    what = (
        f"{traces} traces of {seconds:g} s with {rate:g} requests/s over {_MODELS} models, "
        f"{_WORKERS} workers with room for {_ROOM} each; executors from a table"
    )
    ran_on = machine(*baseline.described(device))
    return Outcome("reality", what, ran_on, figures, time.monotonic() - began, now())


async def compare(number: int, *, seconds: float, rate: float, seed: int) -> Compared:
    """One trace: an even `number` drifts, an odd one steps."""
    workers = fleet_of_workers(_WORKERS, _ROOM, weights_bytes=_TABLE.weights_bytes)
    async with running(
        "reality", workers=_WORKERS, budget_bytes=workers[0].budget_bytes, table=True
    ) as stack:
        models = [
            await asyncio.to_thread(
                register, stack.repository, f"model-{each:02d}", _TABLE, target_ms=_TARGET_MS
            )
            for each in range(_MODELS)
        ]
        warmup_s = min(10.0, seconds / 4)
        if number % 2:
            workload = stepping(models, rate, at_s=seconds / 3, lasting_s=seconds / 3,
                                duration_s=seconds, warmup_s=warmup_s, seed=seed)  # fmt: skip
        else:
            workload = drifting(models, rate, cv=2.0, duration_s=seconds, warmup_s=warmup_s,
                                seed=seed)  # fmt: skip
        simulated = simulate(workload, workers, Roost(), seed=seed,
                             settings=Settings(timeout_s=_TIMEOUT_S))  # fmt: skip
        compared = await _serve(stack, workload, simulated)
    print(compared, flush=True)
    return compared


async def _serve(stack: BenchStack, workload: sim.Workload, simulated: sim.Outcome) -> Compared:
    client = Client(await stack.producer(), stack.gateway_url, request(), deadline_s=_TIMEOUT_S)
    await client.start()
    names = [model.manifest.name for model in workload.models]
    asks = [
        Ask(float(at), names[which], http=number % _HTTP == 0)
        for number, (at, which) in enumerate(zip(workload.times, workload.which, strict=True))
    ]
    try:
        start = time.time()
        answers = await client.play(asks)
    finally:
        await client.close()
    real = sim.Outcome(
        workload=workload,
        policy="real",
        latency=np.array([each.seconds if each.ok else np.nan for each in answers]),
        ending=np.array([_ending(each) for each in answers], np.int32),
        busy_s={},
        changes=tuple(_changes(stack, start)),
    )
    return Compared(simulated, real, float(np.quantile([each.late_s for each in answers], 0.99)))


_ENDING: Final = {name: number for number, name in enumerate(sim.ENDINGS)}
_BAD: Final[dict[str, sim.Ending]] = {"lost": "lost", "deadline_exceeded": "late"}


def _ending(answer: Answer) -> int:
    if answer.ok:
        return _ENDING["answered"]
    return _ENDING[_BAD.get(answer.code, "refused")]


def _changes(stack: BenchStack, start: float) -> Iterable[sim.Change]:
    """Loads as the workers logged them (times are left out), bindings as they reported them."""
    for worker in stack.workers():
        for line in stack.log(worker).splitlines():
            if '"model_loaded"' in line:
                loaded = msgspec.json.decode(line)
                yield sim.Change(0.0, "loaded", loaded["model"], worker)
    bound: dict[str, int] = {}
    for entry in stack.diaries():
        if entry.bound < 0:
            continue
        more = entry.bound - bound.get(entry.worker, 0)
        bound[entry.worker] = entry.bound
        for _ in range(abs(more)):
            yield sim.Change(entry.at - start, "bound" if more > 0 else "unbound", "", entry.worker)


# --- what is compared -------------------------------------------------------------------------


def latency_ms(outcome: sim.Outcome, q: float) -> float:
    """Percentile of the counted requests that were answered."""
    counted = outcome.workload.times >= outcome.workload.warmup_s
    return float(np.nanpercentile(outcome.latency[counted], q)) * 1e3


def loads(outcome: sim.Outcome) -> int:
    return sum(change.what == "loaded" for change in outcome.changes)


def bindings(outcome: sim.Outcome) -> sim.Floats:
    """At the end of each second of the run, warm-up left out."""
    changes = sorted(
        (change.at, 1 if change.what == "bound" else -1)
        for change in outcome.changes
        if change.what in {"bound", "unbound"}
    )
    at = np.array([each for each, _ in changes])
    count = np.concatenate(([0.0], np.cumsum([more for _, more in changes])))
    seconds = np.arange(np.ceil(outcome.workload.warmup_s), outcome.workload.duration_s + 1e-9)
    return np.asarray(count[np.searchsorted(at, seconds, side="right")], np.float64)


def _bindings_apart(compared: Compared) -> float:
    return float(np.abs(bindings(compared.real) - bindings(compared.simulated)).mean())


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
