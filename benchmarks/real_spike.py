"""The spike (benchmarks/spike.py) on real models: sentences of 32 tokens through small BERTs.

So long that a request keeps a core busy for some ten milliseconds: the messages are then not what
the cores do most. All models are on the first worker when the second joins, so the first spike of
all meets a worker that has never loaded anything, and has to learn the architecture first.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from benchmarks import baseline
from benchmarks.density import NAMES
from benchmarks.driver import request
from benchmarks.models import Factory, Registered, family, register
from benchmarks.spiking import SETTINGS, Setting, Spiked, spike_all
from benchmarks.stack import running
from shared.v2 import encode_request

_TOKENS = 32
_BATCH = 4
_SPIKE = 1.3
"""Device-seconds per second that are asked of the spiked model: more than one worker has."""
_OTHERS = 0.15
"""Of all others together."""
_MODELS_MORE = 3


async def run(device: str, family_name: str, *, spiked: int, seed: int) -> list[Spiked]:
    """Rates follow from what one request takes on this machine now."""
    chosen = replace(family(family_name, device), tokens=_TOKENS, max_batch=_BATCH)
    target, budget = baseline.device_of(device), 2 << 30
    async with running(
        "spike",
        workers=1,
        budget_bytes=budget,
        table=False,
        device=device,
        settings=SETTINGS,
    ) as stack:
        made = await asyncio.to_thread(register, stack.data, Factory(chosen), spiked + _MODELS_MORE)
        module = baseline.load(made[0].path, target)
        alone, batched = (
            1 / baseline.bare_loop(module, chosen.inputs(rows), target, 2.0) / rows
            for rows in (1, _BATCH)
        )
        print(f"  one request alone {alone * 1e3:.0f} ms, of {_BATCH} {batched * 1e3:.0f} ms")
        setting = Setting(
            models=tuple(_name(each) for each in made),
            spiked=spiked,
            base=_SPIKE / batched / 10,
            others=_OTHERS / alone,
        )
        body = encode_request(request(chosen.inputs(1), NAMES))
        return await spike_all(stack, setting, body, seed, add_worker=True)


def _name(model: Registered) -> str:
    return model.manifest.name
