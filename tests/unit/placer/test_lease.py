"""Who decides: acquiring, renewing, stepping down in time."""

from __future__ import annotations

from services.placer.lease import Lease
from shared.store.memory import MemoryState, MemoryStore


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def leases(count=2):
    clock = Clock()
    state = MemoryState(now=clock)
    made = [
        Lease(MemoryStore(state), f"p{n}", ttl_s=3.0, renew_s=0.5, clock=clock)
        for n in range(count)
    ]
    return clock, state, made


async def test_one_holds_it_and_the_other_stands_by():
    """And both know that the store answers."""
    _, _, (first, second) = leases()
    await first.renew()
    await second.renew()
    assert (first.valid, second.valid) == (True, False)
    assert first.known
    assert second.known
    assert second.lost.is_set()


async def test_it_steps_down_at_half_the_time_to_live():
    """By its own clock, without any answer; the other gets it only later."""
    clock, state, (first, second) = leases()
    await first.renew()
    state.reachable = False
    clock.now += 1.4
    await first.renew()
    assert first.valid
    clock.now += 0.2
    assert not first.valid  # before any event, whoever asks is told
    await first.renew()
    assert first.lost.is_set()
    state.reachable = True
    await second.renew()
    assert not second.valid
    clock.now += 1.5
    await second.renew()
    assert second.valid
    assert second.fence > first.fence


async def test_a_suspended_holder_begins_a_new_term():
    """The store may still have its name; what it knew is old nevertheless."""
    clock, _, (first, _) = leases()
    await first.renew()
    seen = []
    first.step_down, stepping = (lambda why: (seen.append(why), stepping(why))), first.step_down
    clock.now += 2.0
    await first.renew()
    assert seen == ["renewed too late"]
    assert first.valid


async def test_after_its_release_the_next_one_gets_it_at_once():
    """An orderly end costs nobody a time to live."""
    _, _, (first, second) = leases()
    await first.renew()
    await first.release()
    await second.renew()
    assert second.valid
    assert first.lost.is_set()


async def test_a_flushed_store_gives_it_again_with_a_higher_fence():
    """The term goes on: what this placer knows is what the store lost."""
    _, state, (first, _) = leases()
    await first.renew()
    before = first.fence
    state.flush()
    await first.renew()
    assert first.held.is_set()
    assert first.fence > before
