"""N4's worker part, and neighbours: what the handover from agent to engine costs, how much of a
bare loop's throughput reaches the executor, and whether a load is felt."""

from __future__ import annotations

import asyncio
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import baseline
from benchmarks.density import NAMES
from benchmarks.driver import Engine, engine, request
from benchmarks.models import Factory, Family, Registered, family, register
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.statistics import median, quantile
from shared.layout import Extent
from shared.models import Manifest
from shared.v2 import InferRequest

_UNDER_WAY: Final = 4
"""Batches handed over ahead: what the agent's dispatch keeps on the way at most."""
_NEW: Final = 8
"""Architectures that are loaded beside the busy neighbour."""


async def run(device: str, *, family_name: str = "minilm", rounds: int = 6) -> Outcome:
    began = time.monotonic()
    target = baseline.device_of(device)
    chosen = family(family_name, device)
    with tempfile.TemporaryDirectory(prefix="roost-engine-") as scratch:
        folder = Path(scratch)
        models = register(folder, Factory(chosen), 4, whole=1)
        newcomers = _newcomers(folder, chosen)
        identity = _identity(folder)
        assert models[0].layout is not None
        room = models[0].layout.weights_bytes * (len(models) + _NEW + 2) + (64 << 20)
        async with engine(device, room) as (driven, _):
            handed = await _handover(driven, identity, folder)
            await driven.load(models[0], warm=(1, 8, 32))
            shares = await _throughput(driven, models[0], chosen, target, rounds)
            felt = await _neighbour(driven, models, newcomers, chosen)
    figures = (
        Figure("batches per second over the bare loop's, batches of 8", shares[8], "x", 0.95,
               "at least"),
        Figure("… batches of 32", shares[32], "x", 0.95, "at least"),
        Figure("handover and back beyond the call itself: p50", handed["alone"] * 1e6, "µs", 100),
        Figure("… per batch, 8 under way", handed["many"] * 1e6, "µs"),
        Figure("neighbour's p99 while known architectures load, over quiet", felt["known"], "x",
               1.2),
        Figure("… while new architectures load", felt["new"], "x", 1.2),
        Figure("… while nothing but a bare copy of the same bytes is repeated outside the engine",
               felt["copied"], "x"),
        Figure("neighbour's p50 while known architectures load, over quiet", felt["known_p50"],
               "x"),
        Figure("… while new architectures load", felt["new_p50"], "x"),
        Figure("neighbour's p99, quiet", felt["quiet_p99"] * 1e3, "ms"),
        Figure("neighbour's slowest, quiet", felt["quiet_max"] * 1e3, "ms"),
        Figure("neighbour's slowest, known architectures", felt["known_max"] * 1e3, "ms"),
        Figure("neighbour's slowest, new architectures", felt["new_max"] * 1e3, "ms"),
        Figure("loads beside it, known", felt["known_loads"]),
        Figure("loads beside it, new", felt["new_loads"]),
    )  # fmt: skip
    what = f"{chosen.name}, one engine process behind the agent's runtime"
    ran_on = machine(baseline.describe(target), str(torch.__version__))
    return Outcome("engine", what, ran_on, figures, time.monotonic() - began, now())


# --- the handover -------------------------------------------------------------------------


class _Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _identity(folder: Path) -> Registered:
    path = str(folder / "identity.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        scripted: Any = torch.jit.script(_Identity())
        scripted.save(path)
    size = Path(path).stat().st_size
    manifest = Manifest(
        name="identity", version=1, digest="sha256:" + "0" * 64, size_bytes=size, created_at=0.0
    )
    return Registered(manifest, (Extent(path, 0, size),), None, path)


async def _handover(driven: Engine, model: Registered, folder: Path) -> dict[str, float]:
    """Seconds from the agent to the executor and back, beyond the call itself."""
    await driven.load(model)
    tensor = torch.zeros(1, 16)
    ask = request((tensor,), ("x",))
    module = baseline.load(str(folder / "identity.pt"), torch.device("cpu"))
    calls: list[float] = []
    with baseline.steady():
        for _ in range(2000):
            began = time.perf_counter()
            module(tensor)
            calls.append(time.perf_counter() - began)
    alone: list[float] = []
    for _ in range(3000):
        began = time.perf_counter()
        await driven.run(model, ask, 1)
        alone.append(time.perf_counter() - began)
    many = 3000

    async def stream() -> None:
        for _ in range(many // 8):
            await driven.run(model, ask, 1)

    began = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(8)))
    took = time.perf_counter() - began
    call = median(calls)
    return {"alone": median(alone) - call, "many": took / many - call}


# --- throughput ---------------------------------------------------------------------------


async def _throughput(
    driven: Engine, model: Registered, chosen: Family, target: torch.device, rounds: int
) -> dict[int, float]:
    """Of a bare loop's batches per second, by rows; the two take turns."""
    module = baseline.load(model.path, target)
    shares: dict[int, float] = {}
    for rows in (8, 32):
        inputs = chosen.inputs(rows)
        ask = request(inputs, NAMES)
        ratios = []
        for _ in range(rounds):
            bare = baseline.bare_loop(module, inputs, target, 2.0)
            ours = await _saturated(driven, model, ask, rows, 2.0)
            ratios.append(ours / bare)
        shares[rows] = median(ratios)
    return shares


async def _saturated(
    driven: Engine, model: Registered, ask: InferRequest, rows: int, seconds: float
) -> float:
    """Batches per second with a few always under way."""
    count, began = 0, time.perf_counter()

    async def stream() -> None:
        nonlocal count
        while time.perf_counter() - began < seconds:
            await driven.run(model, ask, rows)
            count += 1

    await asyncio.gather(*(stream() for _ in range(_UNDER_WAY)))
    return count / (time.perf_counter() - began)


# --- neighbours ---------------------------------------------------------------------------


def _newcomers(folder: Path, chosen: Family) -> list[Registered]:
    """One model each of architectures that the engine has never seen."""
    made = []
    for number in range(_NEW):
        other = replace(chosen, name=f"other-{number}", inner=chosen.inner + 8 * (number + 1))
        made += register(folder / other.name, Factory(other), 1, whole=0)
    return made


async def _neighbour(
    driven: Engine, models: list[Registered], newcomers: list[Registered], chosen: Family
) -> dict[str, float]:
    """A busy model's latencies: quiet, then while others come and go beside it, in turns."""
    busy, *others = models
    ask = request(chosen.inputs(1), NAMES)
    quiet: list[float] = []
    known: list[float] = []
    new: list[float] = []
    copied: list[float] = []
    loads = {"known": 0, "new": 0}

    assert models[0].layout is not None
    bare = baseline.BareCopy(models[0].layout.weights_bytes, torch.device("cpu"))

    async def copy_bare() -> None:
        await asyncio.to_thread(bare.seconds)
        await asyncio.sleep(0.002)

    async def swap_known() -> None:
        for model in others:
            await driven.load(model)
            await driven.evict(model)
            loads["known"] += 1

    waiting = list(newcomers)

    async def load_new() -> None:
        if waiting:
            model = waiting.pop()
            await driven.load(model, warm=(1,))
            await driven.evict(model)
            loads["new"] += 1
        await asyncio.sleep(0.3)

    await _beside(driven, busy, ask, 1.0, None)  # warms up
    for _ in range(4):
        quiet += await _beside(driven, busy, ask, 2.0, None)
        copied += await _beside(driven, busy, ask, 2.0, copy_bare)
        known += await _beside(driven, busy, ask, 2.0, swap_known)
        quiet += await _beside(driven, busy, ask, 2.0, None)
        new += await _beside(driven, busy, ask, 2.0, load_new)
    base = quantile(quiet, 0.99)
    return {
        "known": quantile(known, 0.99) / base,
        "new": quantile(new, 0.99) / base,
        "copied": quantile(copied, 0.99) / base,
        "known_p50": median(known) / median(quiet),
        "new_p50": median(new) / median(quiet),
        "quiet_p99": base,
        "quiet_max": max(quiet),
        "known_max": max(known),
        "new_max": max(new),
        "known_loads": loads["known"],
        "new_loads": loads["new"],
    }


async def _beside(
    driven: Engine,
    busy: Registered,
    ask: InferRequest,
    seconds: float,
    beside: Callable[[], Awaitable[None]] | None,
) -> list[float]:
    """Latencies of one request after the other, with `beside` done again and again."""
    over = False

    async def again() -> None:
        while beside is not None and not over:
            await beside()

    other = asyncio.create_task(again())
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        await driven.run(busy, ask, 1)
        latencies.append(time.perf_counter() - began)
    over = True
    await other
    return latencies
