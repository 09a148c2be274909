"""N1: how many models one process holds on a device, drawn at random out of those registered."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import baseline
from benchmarks.driver import Engine, Failed, engine, request, settle
from benchmarks.models import Factory, Registered, family, register
from benchmarks.outcome import Figure, Outcome, machine, now

NAMES = ("input_ids", "attention_mask")


async def run(
    device: str,
    *,
    budget_bytes: int = 0,
    family_name: str = "",
    models: int = 60,
    registered: int = 100,
    fine_tunes: int = 300,
    seed: int = 0,
) -> Outcome:
    """`budget_bytes=0`: three per cent more than the raw weights of `models`."""
    began = time.monotonic()
    chosen = family(family_name or ("minilm" if device == "cpu" else "bert-base"), device)
    factory = Factory(chosen)
    with tempfile.TemporaryDirectory(prefix="roost-density-") as scratch:
        folder = Path(scratch)
        print(f"registering {registered} {chosen.name} and {fine_tunes} with one backbone …")
        pool = register(folder, factory, registered)
        frozen = register(folder, factory, fine_tunes, frozen=True)
        drawn = random.Random(seed).sample(pool, len(pool))
        raw = _raw(pool[0])
        budget = budget_bytes or int(raw * models * 1.03)
        base = await _base(device, budget)
        usable = budget - base
        alone = await _fill(device, usable, drawn)
        shared = await _fill(device, usable, frozen)
    raw_alone = raw * alone.count
    figures = (
        Figure("models held, nothing shared", alone.count, "", models, "at least"),
        Figure("memory over their raw weights", alone.taken / raw_alone, "", 1.03),
        Figure("fine-tunes of one frozen backbone held", shared.count, "", fine_tunes, "at least"),
        Figure("answers that differ from torch", alone.wrong + shared.wrong, "", 0),
        Figure("raw weights of one model", raw / 1e6, "MB"),
        Figure("budget", budget / 1e9, "GB"),
        Figure("… of which the process takes without any model", base / 1e9, "GB"),
        Figure("taken by the models, nothing shared", alone.taken / 1e9, "GB"),
        Figure("… and by our own sum", alone.believed / 1e9, "GB"),
        Figure("taken by the fine-tunes of one backbone", shared.taken / 1e9, "GB"),
    )
    what = f"{chosen.name} in two bytes a weight, one process, drawn out of {registered}"
    ran_on = machine(*baseline.described(device))
    return Outcome("density", what, ran_on, figures, time.monotonic() - began, now())


class _Filled:
    def __init__(self) -> None:
        self.count = self.wrong = self.taken = self.believed = 0


async def _base(device: str, budget: int) -> int:
    """What the process takes of the device before any model; on a CPU the budget stands for the
    device's memory, in which no interpreter lies."""
    if device == "cpu":
        return 0
    async with engine(device, budget) as (_, started):
        return started.base_bytes


async def _fill(device: str, budget: int, models: list[Registered]) -> _Filled:
    """Loads until one is refused, asks every one, and measures what they take."""
    filled = _Filled()
    async with engine(device, budget) as (driven, started):
        held: list[Registered] = []
        for model in models:
            try:
                loaded = await driven.load(model, warm=() if held else (1,))
            except Failed:
                break
            held.append(model)
            filled.believed += loaded.weights_bytes
        filled.count = len(held)
        for model in held:
            filled.wrong += await _differs(driven, model, device)
        memory = await settle(driven, 1.0)
        filled.taken = memory.used_bytes - started.base_bytes
    return filled


async def _differs(driven: Engine, model: Registered, device: str) -> bool:
    """Whether the engine's answer is not, bit for bit, that of a plain load; asked of those
    whose whole file was kept, of the others only that they answer."""
    inputs = (torch.arange(1000, 1016).reshape(1, -1), torch.ones(1, 16, dtype=torch.int64))
    answer = await driven.answer(model, request(inputs, NAMES), 1)
    if not model.path:
        return not bool(torch.isfinite(answer).all())
    target = baseline.device_of(device)
    module = baseline.load(model.path, target)
    with baseline.steady():
        expected = module(*(each.to(target) for each in inputs)).cpu()
    return not torch.equal(answer, expected)


def _raw(model: Registered) -> int:
    assert model.layout is not None
    return sum(block.nbytes for block in model.layout.blocks)
