"""Packs through a whole worker: each member is a request like any other."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from shared import packs
from shared.broker.amqp import AmqpBroker
from shared.broker.port import Message
from shared.names import (
    DEAD,
    HEADER_BATCH,
    HEADER_CODE,
    HEADER_DEADLINE,
    HEADER_LENGTH,
    HEADER_PACKS,
    ModelId,
    model_queue,
)
from shared.tensors import from_numpy
from shared.v2 import InferRequest, encode_request
from tests.gateway_rig import running
from tests.integration.test_worker import REPLIES, Stage, output, until, working


def member(name: str, x: float, **headers) -> Message:
    inputs = (from_numpy("x", np.array([[x, 0]], np.float32)),)
    body, length = encode_request(InferRequest(inputs=inputs, binary_default=True))
    return Message(
        body=body,
        headers={HEADER_LENGTH: length, **headers},
        reply_to=REPLIES,
        correlation_id=name,
    )


async def send(stage: Stage, model: ModelId, *members: Message) -> None:
    await stage.broker.publish("", model_queue(model), packs.pack(members))


async def test_each_member_is_answered_by_itself(tmp_path):
    """The right ones run in one batch, a wrong and a late one learn what is wrong; nothing is
    left in the queue."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        members = [member(str(n), n) for n in range(6)]
        wrong = Message(body=b"{", reply_to=REPLIES, correlation_id="wrong")
        await send(stage, model, *members, wrong, member("late", 1, **{HEADER_DEADLINE: 1}))
        for n in range(6):
            reply = await stage.reply(str(n))
            assert output(reply) == [[2 * n, 0]]
            assert reply.headers[HEADER_BATCH] == 6
        assert (await stage.reply("wrong")).headers[HEADER_CODE] == "invalid_argument"
        assert (await stage.reply("late")).headers[HEADER_CODE] == "deadline_exceeded"
        assert stage.engine.batches == [(model, 6)]
        (consumer,) = stage.worker_broker.consumers
        await until(lambda: not consumer.held)
        assert await stage.broker.depth(model_queue(model)) == 0


async def test_answers_come_in_packs_to_who_reads_them(tmp_path):
    """As many as ran together."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        stage.may_repeat = True
        await send(stage, model, *(member(str(n), n, **{HEADER_PACKS: True}) for n in range(6)))
        packed = await stage.reply(None)
        replies = packs.members(packed)
        assert [reply.correlation_id for reply in replies] == [str(n) for n in range(6)]
        assert [output(reply) for reply in replies] == [[[2 * n, 0]] for n in range(6)]


async def test_a_member_that_kills_engines_is_buried_alone(tmp_path):
    """The others are answered, whatever became of the engine under them."""
    async with working(tmp_path) as stage:
        model = stage.register("crash")
        await stage.bound(model)
        good = [member(str(n), n) for n in range(5)]
        await send(stage, model, *good, member("killer", 666))
        assert (await stage.reply("killer")).headers[HEADER_CODE] == "quarantined"
        for n in range(5):
            assert output(await stage.reply(str(n))) == [[2 * n, 0]]
        assert await stage.broker.depth(DEAD) == 1
        await until(lambda: not any(each.held for each in stage.worker_broker.consumers))
        assert await stage.broker.depth(model_queue(model)) == 0


async def test_what_a_leaving_worker_has_not_begun_is_for_another(tmp_path):
    """What ran is answered once; the rest of the pack lies in the queue again."""
    async with working(tmp_path, drain_grace_s=60.0) as stage:
        model = stage.register("slow")
        await stage.bound(model)
        stage.engine.gate.clear()
        deadline = int((time.time() + 60) * 1000)
        await send(
            stage, model, *(member(str(n), n, **{HEADER_DEADLINE: deadline}) for n in range(30))
        )
        await until(lambda: stage.model(model).held == 30)
        stage.stop.set()
        await until(lambda: not stage.models() or not stage.model(model).bound)
        stage.engine.gate.set()
        await stage.task
        queue = stage.exchange.queues[model_queue(model)]
        left = [
            single.correlation_id
            for entry in queue.ready
            for single in (
                packs.members(entry.message) if packs.is_pack(entry.message) else [entry.message]
            )
        ]
        assert left
        assert sorted([*left, *stage.replies], key=int) == [str(n) for n in range(30)]


async def test_rubbish_that_calls_itself_a_pack_is_one_dead_letter(tmp_path):
    """And the next message is served."""
    async with working(tmp_path) as stage:
        model = stage.register("echo")
        await stage.bound(model)
        broken = Message(body=b"\x00\x00\x00\xffno", content_type=packs.CONTENT_TYPE)
        await stage.broker.publish("", model_queue(model), broken)
        assert output(await stage.ask(model, [[1, 1]])) == [[2, 2]]
        await until(lambda: len(stage.exchange.queues[DEAD].ready) == 1)


@pytest.mark.parametrize("packing", [True, False])
async def test_a_gateway_packs_what_waits_together(tmp_path, amqp_url, packing):
    """Over RabbitMQ, and unless it is told not to; each client gets its own answer."""
    async with running(tmp_path, lambda name: AmqpBroker(amqp_url, name), packing=packing) as rig:
        bodies = [
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [n, 0, 0]}]}
            for n in range(64)
        ]
        answers = await asyncio.gather(*(rig.infer(body) for body in bodies))
        for n, answer in enumerate(answers):
            assert answer.json()["outputs"][0]["data"] == [n + 1.0, 1.0, 1.0]
        assert await rig.metric("roost_gateway_pack_requests_sum") == 64
        messages = await rig.metric("roost_gateway_pack_requests_count")
        assert messages < 64 if packing else messages == 64
