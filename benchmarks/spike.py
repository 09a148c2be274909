"""N2: ten times as many requests for one model, until a second worker answers some of them.

On the real stack, twice: with executors that take their times from a table, where the machine's
few cores are not the limit and the reaction is Roost's own; and with real models, where they are.
Each model is spiked twice. The first spike is *cold*: the second worker never had the model. Then
all wait until the bindings are given back; the second spike is *warm*: the weights are still there.

From the first excess request to the first reply of the second worker. What happened in between
is taken from the workers' diaries, the placer's events and the clients, all on one machine's
clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from benchmarks import baseline, real_spike
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.spiking import BACK_S, SETTINGS, SETTLE_S, TIMES, Setting, Spiked, spike_all
from benchmarks.stack import running
from benchmarks.statistics import median, quantile
from benchmarks.table import Table, register, request

_TABLE: Final = Table(cases=((1, 0.008), (4, 0.024)), weights_bytes=1 << 20, swap_seconds=0.01)


async def run(
    device: str, *, family_name: str = "minilm", spiked: int = 5, seed: int = 0
) -> Outcome:
    """`device` and `family_name` (benchmarks/models.py) are those of the real models."""
    began = time.monotonic()
    table = await table_run(spiked=spiked, seed=seed)
    real = await real_spike.run(device, family_name, spiked=spiked, seed=seed)
    figures = (*_figures("real models", real), *_figures("table", table))
    what = (
        f"x{TIMES} on one of {family_name} models on 2 workers, and of models of a table on 3; "
        f"{spiked} models, each once cold and once warm"
    )
    ran_on = machine(*baseline.described(device))
    return Outcome("spike", what, ran_on, figures, time.monotonic() - began, now())


async def table_run(
    *,
    spiked: int,
    seed: int,
    models: int = 12,
    workers: int = 3,
    settle_s: float = SETTLE_S,
    quiet_s: float = 4.0,
    spike_s: float = 4.0,
    load_s: float = 0.3,
    warm: bool = True,
) -> list[Spiked]:
    """The executors only sleep: 8 ms for one request, 24 ms for four. The spike asks for 1.3
    device-seconds per second, more than one worker has."""
    names = tuple(f"model-{number:02d}" for number in range(models))
    setting = Setting(names, spiked, base=22, others=20, quiet_s=quiet_s, spike_s=spike_s)
    async with running(
        "spike",
        workers=workers,
        budget_bytes=64 << 20,
        table=True,
        settings=SETTINGS,
    ) as stack:
        table = msgspec.structs.replace(_TABLE, load_seconds=load_s)
        for name in names:
            await asyncio.to_thread(register, stack.repository, name, table, target_ms=100)
        return await spike_all(stack, setting, request(), seed, settle_s=settle_s, warm=warm)


# --- figures ---------------------------------------------------------------------------------


def _figures(where: str, spikes: Sequence[Spiked]) -> tuple[Figure, ...]:
    warm = [each for each in spikes if each.warm]
    cold = [each for each in spikes if not each.warm]
    before = [s for each in spikes for s in each.before]
    during = [s for each in spikes for s in each.during]
    reactions = [each.reaction_s for each in warm if not math.isnan(each.reaction_s)]
    most = max(len(each.changed) for each in spikes)
    strange = sum(each.changed not in ([], [f"{each.model}/1"]) for each in spikes)
    figures = [
        Figure(f"{where}: warm, first excess request to the second worker's first reply, p50",
               _ms(reactions, 0.5), "ms", 250),
        Figure("… slowest", _ms(reactions, 1.0), "ms"),
        Figure(f"{where}: cold, p50", _ms([e.reaction_s for e in cold], 0.5), "ms"),
        Figure("… the first of all on a fresh worker", cold[0].reaction_s * 1e3, "ms"),
        Figure(f"{where}: spikes that no second worker served",
               sum(math.isnan(e.reaction_s) and not e.already for e in spikes), "", 0),
        Figure("… of models that two workers had before", sum(e.already for e in spikes), ""),
        Figure(f"{where}: other models' p99 during the spike over before",
               quantile(during, 0.99) / quantile(before, 0.99), "x", 1.2),
        Figure("… p50", median(during) / median(before), "x"),
        Figure("… p99 before", _ms(before, 0.99), "ms"),
        Figure(f"{where}: models whose bindings changed, most in one spike", most, "", 1),
        Figure("… spikes with changes of another model", strange, "", 0),
        Figure(f"{where}: bindings not given back within {BACK_S:g} s",
               sum(bool(e.parts) and math.isnan(e.given_back_s) for e in spikes), "", 0),
        Figure("… given back after, p50", _ms([e.given_back_s for e in spikes], 0.5) / 1e3, "s"),
        Figure(f"{where}: requests that failed", sum(e.failed for e in spikes), "", 0),
    ]  # fmt: skip
    for name in next((e.parts for e in warm if e.parts), {}):
        parts = [e.parts[name] for e in warm if name in e.parts]
        figures.append(Figure(f"{where}: warm, {name}", _ms(parts, 0.5), "ms"))
    figures.append(
        Figure("… asked later than planned, worst", max(e.late_s for e in spikes) * 1e3, "ms")
    )
    return tuple(figures)


def _ms(seconds: Sequence[float], q: float) -> float:
    known = [each for each in seconds if not math.isnan(each)]
    return quantile(known, q) * 1e3 if known else float("nan")
