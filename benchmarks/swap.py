"""N5: from the host's memory to a first right answer, against the bare copy of the bytes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks import baseline
from benchmarks.density import NAMES
from benchmarks.driver import engine, request
from benchmarks.models import Factory, family, register
from benchmarks.outcome import Figure, Outcome, machine, now
from benchmarks.statistics import median, quantile

_MODELS = 5
_PLAIN = 5


async def run(device: str, *, family_name: str = "bert-base", rounds: int = 100) -> Outcome:
    """Five models of one architecture in the host tier, room for two on the device."""
    began = time.monotonic()
    target = baseline.device_of(device)
    chosen = family(family_name, device)
    inputs = chosen.inputs(1)
    ask = request(inputs, NAMES)
    swaps: list[float] = []
    calls: list[float] = []
    copies: list[float] = []
    plain: list[float] = []
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="roost-swap-") as scratch:
        models = register(Path(scratch), Factory(chosen), _MODELS, whole=_MODELS)
        assert models[0].layout is not None
        nbytes = models[0].layout.weights_bytes
        expected = []
        for model in models:
            module = baseline.load(model.path, target)
            with baseline.steady():
                expected.append(module(*(each.to(target) for each in inputs)).cpu())
        del module
        bare = baseline.BareCopy(nbytes, target)
        room = int(nbytes * 2.2) + (64 << 20)
        async with engine(device, room, nbytes * (_MODELS + 1)) as (driven, _):
            for model in models:
                await driven.load(model, tier="host", keep_host=True)
            await driven.load(models[0], keep_host=True, warm=(1,))
            resident = 0
            for number in range(rounds + _MODELS):  # the first few only warm up
                turn = (number + 1) % _MODELS
                await driven.evict(models[resident])
                copies.append(bare.seconds())
                start = time.perf_counter()
                loaded = await driven.load(models[turn], keep_host=True)
                answer = await driven.answer(models[turn], ask, 1)
                first = time.perf_counter() - start
                assert loaded.source == "host"
                wrong += not torch.equal(answer, expected[turn])
                start = time.perf_counter()
                await driven.answer(models[turn], ask, 1)
                warm = time.perf_counter() - start
                swaps.append(first)
                calls.append(warm)
                resident = turn
                if number % (rounds // _PLAIN) == 0:
                    plain.append(baseline.load_and_two_calls(models[turn].path, inputs, target))
    swaps, calls, copies = swaps[_MODELS:], calls[_MODELS:], copies[_MODELS:]
    copy, call = median(copies), median(calls)
    beyond = [max(swap - call, 0.0) for swap in swaps]
    figures = (
        Figure("swap-in beyond a warm call, over the bare copy: p50", median(beyond) / copy, "x",
               1.25),
        Figure("… p99", quantile(beyond, 0.99) / copy, "x", 2.0),
        Figure("load + two first calls beyond two warm ones, over swap-in beyond a warm one",
               (median(plain) - 2 * call) / median(beyond), "x", 10.0, "at least"),
        Figure("answers that differ from torch", wrong, "", 0),
        Figure("bare copy p50", copy * 1e3, "ms"),
        Figure("bare copy p99, in the same rounds, over its p50", quantile(copies, 0.99) / copy,
               "x"),
        Figure("warm call p50", call * 1e3, "ms"),
        Figure("swap-in + first answer p50", median(swaps) * 1e3, "ms"),
        Figure("torch.jit.load + two first calls p50", median(plain) * 1e3, "ms"),
        Figure("… over swap-in + first answer, calls included", median(plain) / median(swaps), "x"),
        Figure("bytes of one model", nbytes / 1e6, "MB"),
    )  # fmt: skip
    what = f"{chosen.name} from the host tier to its first answer, {rounds} times"
    ran_on = machine(baseline.describe(target), str(torch.__version__))
    return Outcome("swap", what, ran_on, figures, time.monotonic() - began, now())
