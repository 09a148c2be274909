"""A hostile producer costs one message, and nobody's connection."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator

import pytest

from shared import names
from shared.broker.amqp import AmqpBroker
from shared.broker.consumer import MAX_RAW_PROPERTIES
from shared.broker.port import Delivery, Message
from tests.hostile import HOSTILE, RawPublisher

QUEUE = "roost.model.bert.1"


@pytest.fixture
async def broker(amqp_url: str) -> AsyncIterator[AmqpBroker]:
    opened = AmqpBroker(amqp_url, "test")
    await opened.start()
    await opened.declare_queue(QUEUE)
    yield opened
    await opened.close()


class Inbox(asyncio.Queue[Delivery]):
    async def next(self) -> Delivery:
        return await asyncio.wait_for(self.get(), 15)


def send(url: str, properties: bytes, routing_key: bytes = QUEUE.encode(), **more: bytes) -> None:
    with RawPublisher(url) as publisher:
        publisher.publish(properties, routing_key=routing_key, **more)


@pytest.mark.parametrize("waiting", [True, False], ids=["before", "while consuming"])
@pytest.mark.parametrize("case", HOSTILE)
async def test_hostile_properties(
    broker: AmqpBroker, amqp_url: str, case: str, waiting: bool
) -> None:
    """The message arrives as malformed, goes to DEAD with reason and raw properties, where it
    can be read; the connection stays, and the next message arrives."""
    inbox, dead = Inbox(), Inbox()
    session = broker._consuming.session
    if waiting:
        await asyncio.to_thread(send, amqp_url, HOSTILE[case])
    await broker.consume(QUEUE, inbox.put_nowait, prefetch=1)
    if not waiting:
        await asyncio.to_thread(send, amqp_url, HOSTILE[case])
    await broker.publish("", QUEUE, Message(body=b"good", correlation_id="c"))
    evil = await inbox.next()
    assert evil.malformed
    assert evil.message.body == b"evil"
    raw = str(evil.message.headers[names.HEADER_RAW_PROPERTIES])
    assert base64.b64decode(raw) == HOSTILE[case][:MAX_RAW_PROPERTIES]
    await evil.dead_letter(evil.malformed)
    good = await inbox.next()
    assert (good.message.body, good.malformed) == (b"good", None)
    await good.ack()
    await broker.consume(names.DEAD, dead.put_nowait, prefetch=1)
    letter = await dead.next()
    assert (letter.message.body, letter.malformed) == (b"evil", None)
    assert letter.message.headers[names.HEADER_DEAD_REASON] == evil.malformed
    assert letter.message.headers[names.HEADER_RAW_PROPERTIES] == raw
    await letter.ack()
    assert broker._consuming.session is session
    assert await broker.depth(QUEUE) == 0


async def test_routing_key_that_is_not_text(broker: AmqpBroker, amqp_url: str) -> None:
    """It falls through to UNROUTED like any unknown one, and is shown escaped."""
    inbox, dead = Inbox(), Inbox()
    session = broker._consuming.session
    await broker.consume(names.UNROUTED, inbox.put_nowait, prefetch=1)
    await asyncio.to_thread(
        send, amqp_url, b"\0\0", b"bert\xff", exchange=names.INFER_EXCHANGE.encode()
    )
    evil = await inbox.next()
    assert evil.malformed
    assert evil.routing_key == "bert\\xff"
    await evil.dead_letter(evil.malformed)
    await broker.consume(names.DEAD, dead.put_nowait, prefetch=1)
    letter = await dead.next()
    assert letter.message.headers[names.HEADER_DEAD_ROUTING_KEY] == "bert\\xff"
    assert broker._consuming.session is session


async def test_headers_that_leave_no_room_for_ours(broker: AmqpBroker) -> None:
    """A decodable message whose headers are as large as allowed is dead-lettered without them."""
    inbox, dead = Inbox(), Inbox()
    await broker.consume(QUEUE, inbox.put_nowait, prefetch=1)
    await broker.publish("", QUEUE, Message(body=b"x", headers={"k": "v" * 16_250}))
    await (await inbox.next()).dead_letter("because")
    await broker.consume(names.DEAD, dead.put_nowait, prefetch=1)
    letter = (await dead.next()).message
    assert (letter.body, letter.headers.get("k")) == (b"x", None)
    assert letter.headers[names.HEADER_DEAD_REASON] == "because"
