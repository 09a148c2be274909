from __future__ import annotations

import pytest

from services.worker.engine.orders import Orders
from services.worker.wire import EvictModel
from tests.unit.engine.engine_harness import command


def load(model, tier="device"):
    return command(model, "m.pt", tier=tier)


@pytest.fixture
def orders():
    return Orders()


def drained(orders):
    """What begins now, of what waited."""
    begun = []
    while (again := orders.next()) is not None:
        if orders.admit(again):
            begun.append(again)
    return begun


def begin(orders, *commands):
    for each in commands:
        assert orders.admit(each)
        orders.begin(each)


def test_other_models_do_not_wait(orders):
    """A load under way keeps only commands about its own model."""
    begin(orders, load("a/1"))
    assert orders.admit(load("b/1"))
    assert orders.admit(EvictModel("b/1"))
    assert not orders.admit(EvictModel("a/1"))


def test_commands_about_one_model_keep_their_order(orders):
    """However often they have to wait again."""
    begin(orders, load("a/1"))
    first, second, third = EvictModel("a/1"), load("a/1"), EvictModel("a/1", "host")
    for each in (first, second, third):
        assert not orders.admit(each)
    orders.end("a/1")
    assert orders.next() == first
    assert orders.admit(first)
    assert orders.next() == second
    begin(orders, second)
    assert drained(orders) == []
    orders.end("a/1")
    assert drained(orders) == [third]
    assert orders.idle


def test_what_waits_again_stays_before_what_came_later(orders):
    """Also when a load ends while the rest is still to be asked."""
    begin(orders, load("a/1"), load("b/1"))
    late = [EvictModel("b/1"), EvictModel("a/1"), load("a/1")]
    for each in late:
        assert not orders.admit(each)
    orders.end("a/1")
    assert orders.next() == late[0]
    assert not orders.admit(late[0])  # b is still under way
    orders.end("b/1")
    assert drained(orders) == late


def test_a_load_waits_for_evictions_that_came_before_it(orders):
    """They make the room for it."""
    begin(orders, load("a/1"))
    assert not orders.admit(EvictModel("a/1"))
    assert not orders.admit(load("b/1"))
    assert orders.admit(EvictModel("c/1"))
    orders.end("a/1")
    assert drained(orders) == [EvictModel("a/1"), load("b/1")]


def test_a_hold_keeps_no_eviction_from_the_device_waiting(orders):
    """The tiers have nothing to do with each other there; everything else about it waits."""
    begin(orders, load("a/1", "host"))
    assert orders.admit(EvictModel("a/1"))
    assert not orders.admit(EvictModel("a/1", "host"))
    assert not orders.idle
