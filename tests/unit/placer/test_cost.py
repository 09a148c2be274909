"""What a tick may cost, with bounds wide enough for a machine that is busy with others."""

from __future__ import annotations

import msgspec

from benchmarks.placer import Fleet, idle_bytes
from services.placer.core.plan import plan
from services.placer.explain import explain


def test_a_tick_of_a_middling_fleet_is_a_matter_of_milliseconds():
    """1,000 models on 100 workers that all report anew: about 8 ms, whole."""
    fleet = Fleet(1_000, 100)
    fleet.change(200, most=4)
    ticks = [sum(fleet.tick()[0].values()) for _ in range(6)]
    assert min(ticks) < 0.1


def test_the_reflex_of_a_small_fleet_takes_about_a_millisecond():
    """View and choice, at 100 models."""
    fleet = Fleet(100, 4)
    fleet.tick()
    assert min(fleet.reflex(number) for number in range(5)) < 0.01


def test_an_idle_active_model_costs_less_than_two_kilobytes():
    """All that the placer keeps of it; its manifest is the catalogue's."""
    assert idle_bytes(1_000) < 2048


def test_however_much_changes_at_once_one_planning_decides_only_so_much():
    """The rest is due at the next, the unserved first and nobody for ever; once nothing is left
    over, planning again right after applying changes nothing."""
    fleet = Fleet(200, 20)
    knowledge = fleet.knowledge
    knowledge.policy = msgspec.structs.replace(knowledge.policy, work_per_tick=30)
    fleet.tick()
    fleet.spike(200, held=16)
    fleet.time += 0.2
    knowledge.see(fleet.reports(), {}, fleet.time)
    waited, ticks = set(), 0
    while True:
        decided = plan(knowledge.view(), knowledge.policy)
        assert len(decided.bind) + len(decided.unbind) <= 30
        waited |= decided.pace.put_off.keys()
        knowledge.commit(decided)
        knowledge.remember(decided)
        ticks += 1
        assert ticks < 100, "it comes to an end"
        if not decided.pace.put_off:
            break
    assert ticks > 5
    assert waited
    assert not plan(knowledge.view(), knowledge.policy).changes


def test_who_was_put_off_is_told_so():
    """`explain` says that its turn comes, and how long it has waited."""
    fleet = Fleet(100, 10)
    knowledge = fleet.knowledge
    knowledge.policy = msgspec.structs.replace(knowledge.policy, work_per_tick=5)
    fleet.tick()
    fleet.spike(100, held=16)
    fleet.tick()
    put_off = knowledge.last_plan.pace.put_off
    assert put_off
    model = next(iter(put_off))
    manifest = knowledge.active[model].manifest
    assert manifest is not None
    assert "its turn comes" in explain(knowledge, manifest)["why"]


def test_only_what_is_new_in_a_report_costs():
    """Workers that report the same again leave their views as they are."""
    fleet = Fleet(100, 4)
    fleet.tick()
    fleet.tick()
    before = fleet.knowledge.view().workers
    fleet.tick()
    after = fleet.knowledge.view().workers
    assert all(after[worker] is before[worker] for worker in before)
