"""What producers on AMQP get of a model that is unloaded: the placer keeps it from them."""

from __future__ import annotations

import asyncio

from shared import names
from shared.repository import Repository
from shared.store.memory import MemoryStore
from shared.store.port import TOPIC_REGISTRY
from tests.placer_rig import memory_rig, until


async def test_producers_are_told_until_the_model_is_loaded_again(tmp_path):
    """Its queue goes, requests get `not_found` and why, and afterwards all is as before."""
    async with memory_rig(tmp_path) as rig:
        model = rig.register("bert")
        worker = await rig.start_worker("w1")
        await rig.start_placer()
        assert (await rig.ask("bert")).headers[names.HEADER_CODE] == "ok"
        repository = Repository(str(rig.root))
        hints = MemoryStore(rig.state)
        await asyncio.to_thread(repository.unload, "bert")
        await hints.hint(TOPIC_REGISTRY)
        await until(lambda: model not in worker.bound)
        for key in ("bert", model):
            refused = await rig.ask(key)
            assert refused.headers[names.HEADER_CODE] == "not_found"
            assert b"unloaded" in refused.body
        await asyncio.to_thread(repository.load, "bert")
        await hints.hint(TOPIC_REGISTRY)

        async def answered():
            return (await rig.ask("bert")).headers[names.HEADER_CODE] == "ok"

        async with asyncio.timeout(10):
            while not await answered():
                await asyncio.sleep(0.01)
