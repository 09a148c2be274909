"""The table of requests that await a reply."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.gateway.core.pending import Pending, Stray


def test_a_reply_finds_its_waiter_once():
    """The first reply gets the waiter, a second one is double."""
    pending: Pending[str] = Pending()
    pending.add("a", "waiter of a")
    assert pending.resolve("a") == "waiter of a"
    assert pending.resolve("a") is Stray.DOUBLE


@pytest.mark.parametrize("end", ["cancel", "expire"])
def test_a_reply_after_the_caller_left_is_late(end):
    """Hung up or out of time: the waiter is handed back once, and the reply is late."""
    pending: Pending[str] = Pending()
    pending.add("a", "waiter of a")
    assert getattr(pending, end)("a") == "waiter of a"
    assert getattr(pending, end)("a") is None
    assert pending.resolve("a") is Stray.LATE


def test_a_cancelled_caller_hurts_nobody_else():
    """One entry ends before its reply; its neighbours get theirs."""
    pending: Pending[str] = Pending()
    for name in "abc":
        pending.add(name, f"waiter of {name}")
    pending.cancel("b")
    assert pending.resolve("a") == "waiter of a"
    assert pending.resolve("c") == "waiter of c"


@pytest.mark.parametrize("correlation_id", [None, "", "of an earlier gateway"])
def test_a_reply_to_nobody_is_unknown(correlation_id):
    """Replies of before a restart, or without an id, belong to nobody."""
    assert Pending[str]().resolve(correlation_id) is Stray.UNKNOWN


def test_an_id_is_used_once():
    """Using a correlation id again would hand one caller another's answer."""
    pending: Pending[str] = Pending()
    pending.add("a", "first")
    with pytest.raises(ValueError, match="used before"):
        pending.add("a", "second")
    pending.resolve("a")
    with pytest.raises(ValueError, match="used before"):
        pending.add("a", "third")


def test_what_ended_long_ago_is_forgotten():
    """The memory of ended requests is bounded, the oldest going first."""
    pending: Pending[int] = Pending(memory=2)
    for number in range(3):
        pending.add(str(number), number)
        pending.resolve(str(number))
    assert pending.resolve("0") is Stray.UNKNOWN
    assert pending.resolve("2") is Stray.DOUBLE


class PendingMachine(RuleBasedStateMachine):
    """Any order of adds and ends keeps the table's laws and gives each waiter out once."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: Pending[str] = Pending(memory=3)
        self.waiting: set[str] = set()
        self.serial = 0

    @rule()
    def add(self) -> None:
        self.serial += 1
        self.pending.add(str(self.serial), str(self.serial))
        self.waiting.add(str(self.serial))

    @rule(back=st.integers(0, 6), how=st.sampled_from(["resolve", "cancel", "expire"]))
    def end(self, back: int, how: str) -> None:
        name = str(self.serial - back)
        got = getattr(self.pending, how)(name)
        if name in self.waiting:
            assert got == name
            self.waiting.remove(name)
        else:
            assert got is None or isinstance(got, Stray)

    @invariant()
    def laws(self) -> None:
        self.pending.validate()
        assert len(self.pending) == len(self.waiting)
        assert sorted(self.pending.waiting()) == sorted(self.waiting)


TestPendingMachine = PendingMachine.TestCase
TestPendingMachine.settings = settings(max_examples=50, deadline=None)
