"""What the placer makes of a message: error replies, deadlines, the message that goes on."""

from __future__ import annotations

import json
import time

import pytest

from services.placer.metrics import Metrics
from services.placer.replies import answer, check_deadline, deadline_ms, error_reply, forwarded
from shared import names, packs
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Message
from shared.errors import DeadlineExceeded, ModelNotFound


def at(value, **rest):
    return Message(body=b"", headers={names.HEADER_DEADLINE: value}, **rest)


def test_an_error_reply_says_what_and_whether_to_try_again():
    """Code, status and retryable in headers, the message in the body."""
    reply = error_reply(Message(body=b"", correlation_id="7"), ModelNotFound("no such model"))
    assert json.loads(reply.body) == {"error": "no such model"}
    assert reply.correlation_id == "7"
    assert reply.headers == {
        names.HEADER_CODE: "not_found",
        names.HEADER_STATUS: 404,
        names.HEADER_RETRYABLE: False,
    }


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        (1500, 1500), (1500.9, 1500), ("1500", 1500), (b"1500", 1500), (None, None), (True, None),
        ("soon", None), ("1" * 30, None), (float("nan"), None), (float("inf"), None), ("²", None),
    ],
)  # fmt: skip
def test_a_deadline_is_read_or_ignored(told, meant):
    """Whatever a producer puts there, nothing breaks."""
    assert deadline_ms(at(told)) == meant


def test_a_passed_deadline_is_an_error():
    """And one to come, or none, is not."""
    check_deadline(Message(body=b""))
    check_deadline(at(int(time.time() * 1000) + 1000))
    with pytest.raises(DeadlineExceeded):
        check_deadline(at(int(time.time() * 1000)))


def test_a_forwarded_message_keeps_its_properties_and_what_remains_of_its_time():
    """The time that it waited is not given back to it."""
    request = at(
        int(time.time() * 1000) + 5000,
        expiration_ms=30_000,
        message_id="mine",
        reply_to="roost.reply.x",
        correlation_id="7",
        priority=3,
    )
    sent = forwarded(request)
    assert 4000 < sent.expiration_ms <= 5001
    assert sent.headers[names.HEADER_CLIENT_MESSAGE_ID] == "mine"
    assert (sent.reply_to, sent.correlation_id, sent.priority) == ("roost.reply.x", "7", 3)
    assert forwarded(Message(body=b"", expiration_ms=700)).expiration_ms == 700
    assert forwarded(at(int(time.time() * 1000) - 5)).expiration_ms == 1


def member(number, **headers):
    return Message(body=b"", correlation_id=str(number), reply_to="roost.reply.t", headers=headers)


@pytest.mark.parametrize("reads_packs", [True, False])
async def test_each_member_of_a_pack_is_answered(reads_packs):
    """In one message, if the asker reads such."""
    broker = MemoryBroker(MemoryExchange(), "placer")
    await broker.start()
    for queue in (names.UNROUTED, "roost.reply.t"):
        await broker.declare_queue(queue)
    headers = {names.HEADER_PACKS: True} if reads_packs else {}
    packed = packs.pack([member(number, **headers) for number in range(3)])
    arrived = []
    consumer = await broker.consume(names.UNROUTED, arrived.append, prefetch=10)
    await broker.publish(names.INFER_EXCHANGE, "unknown", packed)
    await answer(broker, arrived[0], ModelNotFound("no such model"), Metrics())
    ready = [entry.message for entry in sorted(broker.server.queues["roost.reply.t"].ready)]
    assert len(ready) == (1 if reads_packs else 3)
    replies = packs.members(ready[0]) if reads_packs else ready
    assert [reply.correlation_id for reply in replies] == ["0", "1", "2"]
    assert {reply.headers[names.HEADER_CODE] for reply in replies} == {"not_found"}
    assert not consumer.held


async def test_what_only_calls_itself_a_pack_becomes_a_dead_letter():
    """Nobody in it can be answered."""
    broker = MemoryBroker(MemoryExchange(), "placer")
    await broker.start()
    arrived = []
    await broker.consume(names.UNROUTED, arrived.append, prefetch=10)
    broken = Message(body=b"no", content_type=packs.CONTENT_TYPE, reply_to="roost.reply.t")
    await broker.publish(names.INFER_EXCHANGE, "unknown", broken)
    await answer(broker, arrived[0], ModelNotFound("no such model"), Metrics())
    (dead,) = broker.server.queues[names.DEAD].ready
    assert "malformed pack" in dead.message.headers[names.HEADER_DEAD_REASON]
