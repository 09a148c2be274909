"""The simulated broker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.names import model_id
from sim.queues import Broker, Consumer

MODEL = model_id("m", 1)


class Desk:
    """A broker with one queue, and who was given what."""

    def __init__(self, expired=()) -> None:
        self.given: list[tuple[int, int]] = []
        self.broker = Broker([MODEL], lambda request: request in expired)
        self.queue = self.broker.queues[0]

    def consumer(self, number: int, prefetch: int) -> Consumer:
        consumer = self.broker.consumer(number, MODEL, prefetch, self._give)
        self.broker.begin(consumer)
        return consumer

    def publish(self, *requests: int) -> None:
        for request in requests:
            self.broker.publish(self.queue, request)

    def _give(self, consumer: Consumer, request: int) -> None:
        self.given.append((consumer.number, request))


def test_consumers_are_served_in_turn_up_to_their_prefetch():
    desk = Desk()
    desk.consumer(1, prefetch=2)
    desk.consumer(2, prefetch=1)
    desk.publish(0, 1, 2, 3)
    assert desk.given == [(1, 0), (2, 1), (1, 2)]
    assert desk.broker.depths()[MODEL] == 1


def test_what_waits_goes_to_who_acknowledges():
    desk = Desk()
    one = desk.consumer(1, prefetch=1)
    desk.publish(0, 1)
    desk.broker.acknowledge(one, [0])
    assert desk.given == [(1, 0), (1, 1)]


def test_what_comes_back_goes_to_its_old_place():
    desk = Desk()
    one = desk.consumer(1, prefetch=2)
    desk.publish(0, 1, 2)
    desk.broker.close(one)
    desk.consumer(2, prefetch=3)
    assert desk.given[2:] == [(2, 0), (2, 1), (2, 2)]


def test_what_has_expired_is_not_delivered():
    desk = Desk(expired={0})
    desk.publish(0, 1)
    desk.consumer(1, prefetch=2)
    assert desk.given == [(1, 1)]


def test_a_consumer_that_was_cancelled_before_it_began_gets_nothing():
    desk = Desk()
    consumer = desk.broker.consumer(1, MODEL, 1, desk._give)
    desk.broker.cancel(consumer)
    desk.broker.begin(consumer)
    desk.publish(0)
    assert desk.given == []
    assert not desk.queue.consumers


@given(
    st.lists(
        st.tuples(st.sampled_from(["publish", "begin", "ack", "back", "cancel", "close"]),
                  st.integers(0, 5)),
        max_size=60,
    )
)  # fmt: skip
def test_nothing_is_lost_or_had_twice(steps):
    """Whatever consumers do, each request is in the queue, with one consumer, or acknowledged;
    and nothing waits while somebody could take it."""
    desk = Desk()
    consumers: list[Consumer] = []
    published, acknowledged = 0, set()
    for what, number in steps:
        if what == "publish":
            desk.publish(published)
            published += 1
        elif what == "begin":
            consumers.append(desk.consumer(len(consumers), prefetch=1 + number))
        elif consumers:
            consumer = consumers[number % len(consumers)]
            held = sorted(consumer.unacked)[:1]
            if what == "ack":
                acknowledged.update(held)
                desk.broker.acknowledge(consumer, held)
            elif what == "back":
                desk.broker.requeue(consumer, held)
            elif what == "cancel":
                desk.broker.cancel(consumer)
            else:
                desk.broker.close(consumer)
        places = list(desk.queue.ready) + [r for c in consumers for r in c.unacked]
        assert sorted([*places, *acknowledged]) == list(range(published))
        assert list(desk.queue.ready) == sorted(desk.queue.ready)
        able = any(c.on and len(c.unacked) < c.prefetch for c in consumers)
        assert not (able and desk.queue.ready)
