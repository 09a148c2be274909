"""Which requests go together: laws that hold whatever comes, and when."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.gateway.core.packer import Packer

LIMIT, MAX_BYTES = 4, 100
LANES = st.sampled_from("ab")


class Gateway(RuleBasedStateMachine):
    """Callers come and go, publishes end. Every request must go out once, or be withdrawn."""

    def __init__(self):
        super().__init__()
        self.packer = Packer(MAX_BYTES)
        self.number = 0
        self.waiting = {}
        self.under_way = []

    def out(self, lane, together):
        if not together:
            return
        sizes = [self.waiting.pop(each)[1] for each in together]
        assert len(together) <= LIMIT
        assert len(together) == 1 or sum(sizes) <= MAX_BYTES
        self.under_way.append(lane)

    @rule(lane=LANES, nbytes=st.integers(0, 150), limit=st.sampled_from((1, LIMIT)))
    def comes(self, lane, nbytes, limit):
        self.number += 1
        self.waiting[self.number] = (lane, nbytes)
        idle = lane not in self.under_way
        together = self.packer.offer(lane, self.number, nbytes, limit)
        if idle or limit == 1 or nbytes > MAX_BYTES:
            assert together == [self.number], "nothing is gained by waiting"
        self.out(lane, together)

    @rule(data=st.data())
    def goes_away(self, data):
        if self.waiting:
            request = data.draw(st.sampled_from(sorted(self.waiting)))
            lane, _ = self.waiting.pop(request)
            assert self.packer.withdraw(lane, request)
            assert not self.packer.withdraw(lane, request)

    @rule(data=st.data())
    def ends(self, data):
        if self.under_way:
            lane = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
            waited = any(each[0] == lane for each in self.waiting.values())
            together = self.packer.ended(lane)
            assert bool(together) == waited
            self.out(lane, together)

    @rule(lane=LANES)
    def is_slow(self, lane):
        waits = [each for each, (of, _) in self.waiting.items() if of == lane]
        together = self.packer.hurry(lane)
        assert together == waits, "all that waits, in the order in which it came"
        self.out(lane, together)

    @invariant()
    def laws(self):
        self.packer.validate()
        assert len(self.packer) == len(self.waiting)

    def teardown(self):
        """Once all publishes have ended nothing waits, and nothing is remembered."""
        while self.under_way:
            lane = self.under_way.pop()
            self.out(lane, self.packer.ended(lane))
        assert not self.waiting
        assert repr(self.packer) == "Packer(0 waiting, 0 lanes)"


TestGateway = Gateway.TestCase


def test_a_full_pack_does_not_wait():
    """Though a publish of its lane is under way: waiting could not make it any fuller."""
    packer = Packer(MAX_BYTES)
    assert packer.offer("a", 0, 1, 3) == [0]
    assert packer.offer("a", 1, 1, 3) == []
    assert packer.offer("a", 2, 1, 3) == []
    assert packer.offer("a", 3, 1, 3) == [1, 2, 3]
    assert packer.offer("a", 4, 99, 3) == []
    assert packer.offer("a", 5, 2, 3) == [4], "the next one's bytes do not fit beside it"
    assert packer.ended("a") == [5]
