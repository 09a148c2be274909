"""Makes a stack's models spike, one after the other, and takes apart where the time went.

The same for executors from a table (benchmarks/spike.py) and for real models
(benchmarks/real_spike.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from benchmarks import diary
from benchmarks.asking import Answer, Ask, Client
from benchmarks.stack import BenchStack
from benchmarks.statistics import quantile
from shared.names import ModelId, model_queue

TIMES: Final = 10
_DEADLINE_S: Final = 10.0
BACK_S: Final = 120.0
_CALM_S: Final = 2.0
"""Without a change of any assignment before a spike may begin."""
SETTLE_S: Final = 12.0
"""After the first requests: what they made workers load is then out of the placer's window."""
_AFTER_S: Final = 2.0
"""So long after a spike a change still counts as caused by it."""
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
    limit = time.time() + BACK_S
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
    rate = setting.base * TIMES
    asks += [
        Ask(setting.quiet_s + number / rate, name) for number in range(int(setting.spike_s * rate))
    ]
    return sorted(asks, key=lambda ask: ask.at)


def _poisson(rate: float, seconds: float, rng: np.random.Generator) -> list[float]:
    return sorted(float(at) for at in rng.uniform(0, seconds, rng.poisson(rate * seconds)))


# --- what happened ---------------------------------------------------------------------------


async def _calm(stack: BenchStack) -> None:
    """Nothing was assigned for a while: what earlier traffic caused is over."""
    limit = time.time() + BACK_S
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
