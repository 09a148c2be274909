"""N8: what becomes of requests while every part is killed, suspended, restarted or cut off.

On real processes, under load, at random moments drawn from a seed. Each request's answer is known;
docs/guarantees.md says what is promised, and this counts whether it holds.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from benchmarks import baseline
from benchmarks.chaos import Chaos, Done
from benchmarks.faultstack import running
from benchmarks.ledger import Ledger, Load, Verdict, register
from benchmarks.outcome import Figure, Outcome, machine, now

_MODELS = 12
_WARM_S = 10.0
_HEAL_S = 30.0
"""Afterwards everything must be well again within that."""


async def run(
    device: str,
    *,
    minutes: float = 5.0,
    seed: int = 0,
    rate: float = 100.0,
    every_s: float = 6.0,
    only: str = "",
) -> Outcome:
    """`every_s`: seconds from one fault to the next, on average. `only`: faults whose name begins
    so. `device` is only told."""
    began = time.monotonic()
    ledger, faults = await measure(minutes * 60, seed, rate=rate, every_s=every_s, only=only)
    for odd in ledger.odd:
        near = [each for each in faults if odd.at - 30 < each.at < odd.at + 30]
        print(f"  {odd}\n    near: {[(f.what, f.target, round(f.at - odd.at, 1)) for f in near]}")
    return Outcome(
        "faults",
        f"{minutes:g} min of {rate:g} requests/s, half over HTTP and half over AMQP, while parts "
        f"are killed, suspended, restarted and cut off at random; seed {seed}",
        machine(*baseline.described(device)),
        tuple(_figures(ledger, faults)),
        time.monotonic() - began,
        now(),
    )


async def measure(
    seconds: float, seed: int, *, rate: float, every_s: float, only: str = ""
) -> tuple[Ledger, list[Done]]:
    rng = np.random.default_rng(seed)
    async with running(workers=2, budget_bytes=64 << 20) as stack:
        models = await asyncio.to_thread(register, stack.repository, _MODELS)
        broker = await stack.producer()
        try:
            load = Load(broker, stack.gateways, models, rate, rng.spawn(1)[0])
            await load.start()
            chaos = Chaos(stack, rng, every_s=every_s, only=only)
            calm, over = asyncio.Event(), asyncio.Event()
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run(over))
                await asyncio.sleep(_WARM_S)
                running_chaos = group.create_task(chaos.run(calm))
                await asyncio.sleep(seconds)
                calm.set()
                await running_chaos
                await _healed(load)
                over.set()
        finally:
            await broker.close()
    return load.ledger, chaos.done


async def _healed(load: Load) -> None:
    """Some seconds in which every request is answered right. Raises `TimeoutError`."""
    async with asyncio.timeout(_HEAL_S):
        while True:
            before = load.ledger.total(), load.ledger.total(Verdict.RIGHT)
            await asyncio.sleep(3.0)
            after = load.ledger.total(), load.ledger.total(Verdict.RIGHT)
            if after[0] - before[0] == after[1] - before[1] > 0:
                return


def _figures(ledger: Ledger, faults: Sequence[Done]) -> list[Figure]:
    kinds = Counter(fault.what for fault in faults)
    reached = {Verdict.SILENT: 0.0, Verdict.WRONG: 0.0}
    figures = [
        Figure(f"requests {verdict}", ledger.total(verdict), "", reached.get(verdict))
        for verdict in (Verdict.SILENT, Verdict.WRONG, Verdict.RIGHT, Verdict.TOLD, Verdict.CUT,
                        Verdict.REFUSED, Verdict.UNSURE)
    ]  # fmt: skip
    return [
        *figures,
        Figure("requests in all", ledger.total()),
        Figure("answers beyond the first, over AMQP", ledger.doubles),
        Figure("slowest end of a request", ledger.slowest_s, "s"),
        Figure("faults", len(faults)),
        *(Figure(f"… {what}", count) for what, count in sorted(kinds.items())),
        *(Figure(f"errors told: {code}", count) for code, count in ledger.codes.most_common(8)),
    ]
