"""What is asked of the broker, whatever the driver does with cancellations."""

from __future__ import annotations

import asyncio

import aiormq.exceptions
import pytest

from shared.broker import session
from shared.broker.port import BrokerUnavailable
from shared.broker.session import Link, asked


async def answers_cancellation_with_an_error() -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise aiormq.exceptions.AMQPConnectionError("the driver's own") from None


async def test_a_cancellation_stays_one_whatever_the_driver_makes_of_it():
    """Whoever is cancelled ends, and does not try again."""
    asking = asyncio.create_task(asked(answers_cancellation_with_an_error()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_time_out_is_no_cancellation():
    """Neither our own, nor that of somebody further out who gave up."""
    with pytest.raises(BrokerUnavailable):
        await asked(answers_cancellation_with_an_error(), timeout_s=0.01)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asked(answers_cancellation_with_an_error())


async def test_an_error_after_a_cancellation_that_was_taken_back_is_an_error():
    """What was cancelled once and went on may ask the broker as before."""

    async def fails() -> None:
        raise aiormq.exceptions.AMQPConnectionError("refused")

    async def goes_on() -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        with pytest.raises(BrokerUnavailable):
            await asked(fails())

    going = asyncio.create_task(goes_on())
    await asyncio.sleep(0)
    going.cancel()
    await going


async def test_a_link_that_loses_a_cancellation_is_closed_all_the_same(monkeypatch):
    """It is cancelled again until it ends."""
    monkeypatch.setattr(session, "_CLOSE_TIMEOUT_S", -0.99)
    link = Link("amqp://127.0.0.1:1/", "test", prepare=lambda _: asyncio.sleep(0))
    lost: list[int] = []

    async def keeps_on() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost.append(1)
                if len(lost) == 3:
                    raise

    link._task = asyncio.create_task(keeps_on())
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await link.close()
    assert len(lost) == 3
