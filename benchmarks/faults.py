"""N8: what becomes of requests while every part is killed, suspended, restarted or cut off.

On real processes, under load, at random moments drawn from a seed. Each request's answer is known;
docs/guarantees.md says what is promised, and this counts whether it holds. `rolling` restarts every
part in order instead, one by one, and no request may fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from benchmarks import baseline
from benchmarks.chaos import Chaos, Done
from benchmarks.faultkinds import LONGEST_S, kinds_of
from benchmarks.faultload import Load
from benchmarks.faultstack import FaultStack, running
from benchmarks.faulttable import table
from benchmarks.known import register
from benchmarks.ledger import Ledger, Verdict
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.ways import Amqp, Grpc, Http, Jobs, Way

_MODELS: Final = 12
_BUDGET_BYTES: Final = 64 << 20
_WARM_S: Final = 10.0
_TELL_S: Final = 60.0
_HEAL_S: Final = 60.0
"""Afterwards everything must be well again within that."""
_WELL_S: Final = 3.0
_EACH_LONGEST_S: Final = 4.0
"""Of a fault, where each is done once: longer than the leases live."""
_ROLLING: Final = ("placer-2", "placer", "gateway-2", "gateway", "worker-0", "worker-1")


class Report(msgspec.Struct):
    """What a run found; written as JSON where it is to be kept."""

    seed: int
    rate: float
    ledger: Ledger
    faults: list[Done]
    failed: list[str]
    """Faults that could not be done, or were not borne as they must be, and why."""
    missing: dict[str, str]
    """Kinds of faults that could not be done here, and why."""
    again: Counter[str]
    """Rolling: what patient clients asked once more while each part was restarted."""


async def run(
    device: str,
    *,
    minutes: float = 5.0,
    seed: int = 0,
    rate: float = 100.0,
    every_s: float = 6.0,
    only: str = "",
    rolling: bool = False,
    keep: str = "",
) -> Outcome:
    """`every_s`: seconds from one fault to the next, on average. `only`: faults whose name begins
    so. `keep`: a folder in which logs and report stay. `device` is only told."""
    began = time.monotonic()
    folder = Path(keep) if keep else None
    if rolling:
        report = await roll(minutes * 60, seed, rate=rate, keep=folder)
        done = "every part is restarted in order, one after the other, round after round"
    else:
        report = await torture(
            minutes * 60, seed, rate=rate, every_s=every_s, only=only, keep=folder
        )
        done = "parts are killed, suspended, restarted, cut off and deprived at random"
    for reason in [f"{what} could not be done: {why}" for what, why in report.missing.items()]:
        print(reason)
    print(table(report.ledger, report.faults))
    _tell(report)
    return Outcome(
        "rolling" if rolling else "faults",
        f"{minutes:g} min of {rate:g} requests/s over HTTP, AMQP and gRPC and as jobs, while "
        f"{done}; seed {seed}",
        machine(*baseline.described(device)),
        tuple(_figures(report, nothing_fails=rolling)),
        time.monotonic() - began,
        now(),
    )


async def torture(
    seconds: float,
    seed: int,
    *,
    rate: float,
    every_s: float,
    only: str = "",
    each: bool = False,
    keep: Path | None = None,
) -> Report:
    """Faults at random for so long; `each`: every kind once instead, `every_s` apart."""
    rng = np.random.default_rng(seed)
    async with _loaded(seed, rng, rate, keep) as (stack, report):
        kinds, report.missing = kinds_of(stack, rng, _EACH_LONGEST_S if each else LONGEST_S)
        chaos = Chaos(kinds, rng, every_s=every_s, only=only)
        report.faults, report.failed = chaos.done, chaos.failed
        if each:
            await chaos.each(every_s)
        else:
            calm = asyncio.Event()
            asyncio.get_running_loop().call_later(seconds, calm.set)
            await chaos.run(calm)
        await _healed(report)
    return report


async def roll(seconds: float, seed: int, *, rate: float, keep: Path | None = None) -> Report:
    """Restarts the services in order, one after the other, each once the one before is ready, and
    then the store and the broker; rounds of that until the time is over, at least one."""
    rng = np.random.default_rng(seed)
    async with _loaded(seed, rng, rate, keep, patient=True) as (stack, report):
        until = time.monotonic() + seconds
        while True:
            for name in (*_ROLLING, "redis", "rabbitmq"):
                at, before = time.time(), report.ledger.again
                await _restarted(stack, name)
                report.faults.append(Done(at, time.time() - at, "restart", name))
                await _healed(report)
                report.again[name] += report.ledger.again - before
            if time.monotonic() >= until:
                break
    return report


async def _restarted(stack: FaultStack, name: str) -> None:
    if name in {"redis", "rabbitmq"}:
        node = stack.redis if name == "redis" else stack.rabbit
        await asyncio.to_thread(node.stop)
        await asyncio.to_thread(node.start)
    else:
        await stack.restart(name)
        await stack.ready(name)


@contextlib.asynccontextmanager
async def _loaded(
    seed: int,
    rng: np.random.Generator,
    rate: float,
    keep: Path | None,
    *,
    patient: bool = False,
) -> AsyncIterator[tuple[FaultStack, Report]]:
    """A stack under load; on leaving, all that was asked has ended."""
    ledger = Ledger()
    report = Report(seed, rate, ledger, [], [], {}, Counter())
    async with running(rng.spawn(1)[0], budget_bytes=_BUDGET_BYTES, keep=keep) as stack:
        models = await asyncio.to_thread(register, stack.repository, _MODELS)
        broker = await stack.producer()
        http = Http(stack.gateways, ledger, patient=patient)
        ways: list[Way] = [
            http,
            Amqp(broker, ledger, patient=patient),
            Grpc(stack.gateways_grpc, ledger, patient=patient),
            Jobs(http),
        ]
        load = Load(ways, models, rate, rng.spawn(1)[0], ledger)
        over = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(load.run(over))
                telling = group.create_task(_keep_telling(report))
                await asyncio.sleep(_WARM_S)
                try:
                    yield stack, report
                finally:
                    over.set()
                    telling.cancel()
        finally:
            if keep is not None:
                (keep / "report.json").write_bytes(_written(report))
            await broker.close()


async def _keep_telling(report: Report) -> None:
    while True:
        await asyncio.sleep(_TELL_S)
        _tell(report)


def _tell(report: Report) -> None:
    ledger, counts = report.ledger, Counter[str]()
    for (_, verdict), count in ledger.of.items():
        counts[verdict] += count
    print(f"{now()}: {len(report.faults)} faults, {ledger.total()} requests: {dict(counts)}")
    for missed in ledger.odd:
        near = [
            f"{fault.what} of {fault.target} {fault.at - missed.asked:+.1f} s"
            for fault in report.faults
            if missed.asked - 10 < fault.at + fault.seconds and fault.at < missed.ended
        ]
        print(f"  {missed}\n    near: {near}")
    for failed in report.failed:
        print(f"  {failed}")


async def _healed(report: Report) -> None:
    """Returns after some seconds in which every request is answered right, and at once, or notes
    that there were none."""
    ledger = report.ledger
    try:
        async with asyncio.timeout(_HEAL_S):
            while True:
                before = ledger.total(), ledger.total(Verdict.RIGHT), ledger.again
                await asyncio.sleep(_WELL_S)
                asked, right = (
                    ledger.total() - before[0],
                    ledger.total(Verdict.RIGHT) - before[1],
                )
                if asked == right > 0 and ledger.again == before[2]:
                    return
    except TimeoutError:
        report.failed.append(f"{now()}: not well again after {_HEAL_S:g} s")


def _figures(report: Report, *, nothing_fails: bool) -> list[Figure]:
    ledger, faults = report.ledger, report.faults
    kinds = Counter(fault.what for fault in faults)
    never = set(Verdict) - {Verdict.RIGHT} if nothing_fails else {Verdict.SILENT, Verdict.WRONG}
    ways = sorted({way for way, _ in ledger.of})
    reached = dict.fromkeys(never, 0.0)
    return [
        *(
            Figure(f"requests {verdict}", ledger.total(verdict), "", reached.get(verdict))
            for verdict in (Verdict.SILENT, Verdict.WRONG, Verdict.RIGHT, Verdict.TOLD, Verdict.CUT,
                            Verdict.REFUSED, Verdict.UNSURE)
        ),
        Figure("faults not borne as they must be", len(report.failed), "", 0.0),
        Figure("requests in all", ledger.total()),
        *(Figure(f"… over {way}", ledger.total(way=way)) for way in ways),
        Figure("answers beyond the first, over AMQP", ledger.doubles),
        Figure("answers over AMQP long after the deadline", ledger.late),
        Figure("asked once more by patient clients", ledger.again),
        Figure("slowest end of a request", ledger.slowest_s, "s"),
        Figure("faults", len(faults)),
        *(Figure(f"… {what}", count) for what, count in sorted(kinds.items())),
        *(Figure(f"… while {name} was restarted", n) for name, n in report.again.items()),
        *(Figure(f"errors told: {code}", count) for code, count in ledger.codes.most_common(8)),
    ]  # fmt: skip


def _written(report: Report) -> bytes:
    ledger = report.ledger
    told = {
        "seed": report.seed,
        "rate": report.rate,
        "counts": {f"{way} {verdict}": n for (way, verdict), n in sorted(ledger.of.items())},
        "doubles": ledger.doubles,
        "again": ledger.again,
        "late": ledger.late,
        "slowest_s": ledger.slowest_s,
        "codes": dict(ledger.codes),
        "faults": report.faults,
        "failed": report.failed,
        "missing": report.missing,
        "again_by_part": report.again,
        "odd": ledger.odd,
        "missed": ledger.missed,
    }
    return msgspec.json.format(msgspec.json.encode(told), indent=1)
