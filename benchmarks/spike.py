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
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from benchmarks import diary
from benchmarks.asking import Answer, Ask, Client
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.stack import BenchStack, running
from benchmarks.statistics import median, quantile
from benchmarks.table import Table, register, request
from shared.names import ModelId, model_queue

_TIMES: Final = 10
_DEADLINE_S: Final = 10.0
_BACK_S: Final = 120.0
_CALM_S: Final = 2.0
"""Without a change of any assignment before a spike may begin."""
SETTLE_S: Final = 12.0
"""After the first requests: what they made workers load is then out of the placer's window."""
_AFTER_S: Final = 2.0
"""So long after a spike a change still counts as caused by it."""
_TABLE: Final = Table(cases=((1, 0.008), (4, 0.024)), weights_bytes=1 << 20, swap_seconds=0.01)
SETTINGS: Final = {"ROOST_PLACER_HOLD_DOWN_S": "2"}
"""A copy too many goes after 2 s instead of 10: only so long does a spike last here."""


@dataclass(frozen=True)
class Setting:
    """How a stack is spiked. Rates are requests per second."""

    models: tuple[str, ...]
    """All that are registered; the first `spiked` of them are spiked, one after the other."""
    spiked: int
    base: float
    """For the spiked model before, a tenth of what it is in the spike."""
    others: float
    """For all others together."""
    quiet_s: float = 4.0
    spike_s: float = 4.0


@dataclass
class Spiked:
    """One spike. Seconds from the first excess request unless it is said otherwise."""

    model: str
    warm: bool
    reaction_s: float = float("nan")
    """Nan: no second worker answered, or it had two already."""
    already: bool = False
    """Two workers had it before."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of each step, one after the other."""
    load: str = ""
    """What the second worker's load was, as it logged."""
    changed: list[str] = field(default_factory=list)
    """Models of which an assignment changed from the first excess request on, without those that
    were spiked before: they give theirs back."""
    given_back_s: float = float("nan")
    """From the end of the spike. Nan: not in time, or there was nothing to give back."""
    before_it: frozenset[str] = frozenset()
    """Workers that had the model before."""
    ended: float = 0.0
    """Unix time of the spike's end."""
    before: list[float] = field(default_factory=list)
    """Latencies of the other models."""
    during: list[float] = field(default_factory=list)
    failed: int = 0
    late_s: float = 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in self.parts.items())
        return (
            f"  {self.model} {'warm' if self.warm else 'cold'}: {self.reaction_s * 1e3:.0f} ms "
            f"({parts}){f'; {self.load}' if self.load else ''}; changed {self.changed}; "
            f"others' p99 {quantile(self.before, 0.99) * 1e3:.0f} "
            f"-> {quantile(self.during, 0.99) * 1e3:.0f} ms"
        )


async def run(
    device: str, *, family_name: str = "minilm", spiked: int = 5, seed: int = 0
) -> Outcome:
    """`device` and `family_name` (benchmarks/models.py) are those of the real models."""
    from benchmarks import real_spike  # torch

    began = time.monotonic()
    table = await table_run(spiked=spiked, seed=seed)
    real = await real_spike.run(device, family_name, spiked=spiked, seed=seed)
    figures = (*_figures("real models", real), *_figures("table", table))
    what = (
        f"x{_TIMES} on one of {family_name} models on 2 workers, and of models of a table on 3; "
        f"{spiked} models, each once cold and once warm"
    )
    ran_on = machine(*real_spike.described(device))
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


async def spike_all(
    stack: BenchStack,
    setting: Setting,
    body: tuple[bytes, int | None],
    seed: int,
    *,
    add_worker: bool = False,
    settle_s: float = SETTLE_S,
    warm: bool = True,
) -> list[Spiked]:
    """Every model is asked once, then (with one more worker) some are spiked, and once more if
    `warm`."""
    rng = np.random.default_rng(seed)
    client = Client(await stack.producer(), stack.gateway_url, body, deadline_s=_DEADLINE_S)
    await client.start()
    try:
        for name in setting.models:
            await client.ask(name)
        if add_worker:
            await stack.add_worker()
        await asyncio.sleep(settle_s)
        done: list[Spiked] = []
        for again in (False, True) if warm else (False,):
            round_: list[Spiked] = []
            for name in setting.models[: setting.spiked]:
                await _calm(stack)
                earlier = {f"{each.model}/1" for each in round_}
                round_.append(await _spike(stack, client, setting, name, rng, earlier, warm=again))
                print(round_[-1], flush=True)
            if warm:
                await _give_back(stack, client, round_)
            done += round_
        return done
    finally:
        await client.close()


async def _spike(
    stack: BenchStack,
    client: Client,
    setting: Setting,
    name: str,
    rng: np.random.Generator,
    earlier: set[str],
    *,
    warm: bool,
) -> Spiked:
    model = ModelId(f"{name}/1")
    start = time.time()
    asks = _asks(setting, name, rng)
    answers = await client.play(asks)
    excess = min(
        answer.asked_at
        for ask, answer in zip(asks, answers, strict=True)
        if ask.model == name and ask.at >= setting.quiet_s
    )
    end = excess + setting.spike_s
    done = Spiked(name, warm, late_s=max(answer.late_s for answer in answers))
    others = [answer for answer in answers if answer.model != name]
    done.before = [a.seconds for a in others if start + 0.5 <= a.asked_at < excess]
    done.during = [a.seconds for a in others if excess <= a.asked_at < end]
    done.failed = sum(not answer.ok for answer in answers)
    # Who had it before, who has it then?
    before = diary.holders(stack, model, excess)
    await _take_apart(stack, done, model, before, excess, answers)
    await asyncio.sleep(max(end + _AFTER_S - time.time(), 0.0))
    done.changed = sorted(diary.changed(stack, excess) - earlier)
    done.before_it, done.ended = frozenset(before), end
    return done


async def _give_back(stack: BenchStack, client: Client, spikes: Sequence[Spiked]) -> None:
    """Until each has as many workers as before, with hardly anything asked of anybody."""
    limit = time.time() + _BACK_S
    waiting = [each for each in spikes if not each.already and each.parts]
    while waiting and time.time() < limit:
        for each in waiting:
            model = f"{each.model}/1"
            if len(diary.holders(stack, model, time.time())) <= len(each.before_it):
                changes = [at for at, _, models in diary.moves(stack) if model in models]
                each.given_back_s = max(changes) - each.ended
        waiting = [each for each in waiting if math.isnan(each.given_back_s)]
        for each in waiting:
            await client.ask(each.model)
        await asyncio.sleep(0.5)


def _asks(setting: Setting, name: str, rng: np.random.Generator) -> list[Ask]:
    """Poisson arrivals; in the spike of one model they come evenly, so that it begins at once."""
    until = setting.quiet_s + setting.spike_s
    others = [other for other in setting.models if other != name]
    asks = [
        Ask(at, others[int(rng.integers(len(others)))])
        for at in _poisson(setting.others, until, rng)
    ]
    asks += [Ask(at, name) for at in _poisson(setting.base, setting.quiet_s, rng)]
    rate = setting.base * _TIMES
    asks += [
        Ask(setting.quiet_s + number / rate, name) for number in range(int(setting.spike_s * rate))
    ]
    return sorted(asks, key=lambda ask: ask.at)


def _poisson(rate: float, seconds: float, rng: np.random.Generator) -> list[float]:
    return sorted(float(at) for at in rng.uniform(0, seconds, rng.poisson(rate * seconds)))


# --- what happened ---------------------------------------------------------------------------


async def _calm(stack: BenchStack) -> None:
    """Nothing was assigned for a while: what earlier traffic caused is over."""
    limit = time.time() + _BACK_S
    while time.time() < limit:
        newest = max((at for at, _, _ in diary.assignments(stack)), default=0.0)
        if time.time() - newest > _CALM_S:
            return
        await asyncio.sleep(0.1)


async def _take_apart(
    stack: BenchStack,
    done: Spiked,
    model: ModelId,
    before: set[str],
    excess: float,
    answers: Sequence[Answer],
) -> None:
    """Where the time went, from the first excess request to the second worker's first reply."""
    replies = [
        (answer.answered_at, answer.worker)
        for answer in answers
        if answer.model == done.model and answer.worker not in {*before, ""}
    ]
    done.already = len(before) > 1
    if not replies or done.already:
        return
    replied, second = min(replies)
    done.reaction_s = replied - excess
    diaries = stack.diaries()
    told = min(at for at, who, models in diary.assignments(stack)
               if at > excess and who == second and model in models)  # fmt: skip
    decided = max(
        event["at"]
        for event in (await stack.explain(done.model))["events"]
        if event["what"] == "assigned" and event["worker"] == second and event["at"] <= told
    )
    seen = min(e.at for e in diaries if e.at > excess and model in e.arrived)
    queue = model_queue(model)
    consuming = min(
        e.at for e in diaries if e.at > told and e.worker == second and e.queue == queue
    )
    done.parts = {
        "until a worker reported the first of it": seen - excess,
        "until the placer had decided": decided - seen,
        "until the second worker was told": told - decided,
        "until it consumed (loading included)": consuming - told,
        "until its first reply": replied - consuming,
    }
    done.load = diary.load(stack.log(second), model, told, consuming)


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
        Figure(f"{where}: bindings not given back within {_BACK_S:g} s",
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
