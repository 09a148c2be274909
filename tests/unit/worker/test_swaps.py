"""More is wanted than the device holds: what is asked comes in from the host's memory."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.events import Assigned, BatchRan, LoadFailed, ModelLoaded
from shared.names import ModelId, model_id
from tests.unit.worker.swap_world import UNIT, SwapWorld

A, B, C = (model_id(name, 1) for name in "abc")


def equal(count: int, size: int = 10) -> dict[str, int]:
    return {f"m{n}": size for n in range(count)}


def crowd(count: int = 8, *, device: int = 20, host: int = 80, **world) -> SwapWorld:
    """So many models of ten units each, all wanted."""
    found = SwapWorld(equal(count), device=device, host=host, **world)
    found.want(*equal(count))
    return found


def reports(world: SwapWorld) -> dict[ModelId, object]:
    return {report.model: report for report in world.core.reports()}


def test_what_is_held_in_the_host_is_consumed():
    """Two on the device, six in the host's memory, all eight bound and ready."""
    world = crowd()
    seen = world.core.reports()
    assert all(report.bound and report.phase == "ready" for report in seen)
    assert [report.tier for report in seen] == ["device"] * 2 + ["host"] * 6
    assert len(world.in_host) == 8


def test_what_is_asked_comes_in_for_what_is_idle_the_longest():
    """And what it replaces stays in the host's memory."""
    world = crowd()
    for name in ("m1", "m0", "m5"):
        world.arrive(name)
        world.run(world.now + 1)
    assert world.log[2:] == ["-m1/1", "+m5/1"]
    assert [report.tier for report in world.core.reports()][:2] == ["device", "host"]
    assert set(world.done.values()) == {"answered"}


def test_the_most_urgent_comes_first():
    """By the due time of what waits, not by who came first."""
    world = crowd(4, device=10, host=40, max_loading=1)
    world.arrive("m0")  # it runs as the others come
    world.arrive("m1", deadline=world.now + 9.0)
    world.arrive("m2", deadline=world.now + 0.05)
    world.arrive("m3", deadline=world.now + 0.07)
    world.run(world.now + 1)
    assert world.runs == [model_id(name, 1) for name in ("m0", "m2", "m3", "m1")]
    assert set(world.done.values()) == {"answered"}


def test_several_are_on_their_way_at_once():
    """So that the copies follow each other; never more than `max_loading`."""
    world = crowd(16, device=80, host=160)
    for n in range(8, 16):
        world.arrive(f"m{n}")
    assert len(world.core.state.loading()) == 4
    world.run(world.now + 1)
    assert len(world.done) == 8


def test_what_has_just_come_in_runs_before_it_leaves():
    """However urgent others are: each swap serves a batch."""
    world = crowd(6, device=10, host=60)
    for round_ in range(20):
        for n in range(6):
            world.arrive(f"m{n}", deadline=world.now + 5.0 - 0.1 * ((n * round_) % 5))
        world.run(world.now + 0.01)
    world.run(world.now + 10)
    assert set(world.done.values()) == {"answered"}
    assert sum(line.startswith("+") for line in world.log) <= len(world.runs) + 1


def test_a_model_that_always_runs_has_to_leave_for_what_is_due_before():
    """It gets no further batches, leaves as the last one ends, and comes back."""
    world = crowd(2, device=10, host=20)
    for _ in range(100):
        world.arrive("m0", 4)
        world.run(world.now + 0.004)
    (asked,), at = world.arrive("m1"), world.now
    for _ in range(100):
        world.arrive("m0", 4)
        world.run(world.now + 0.004)
    assert world.done[asked] == "answered"
    assert world.answered_at[asked] - at < 0.1 + 0.05, "by its target, and what runs and is copied"
    world.run(world.now + 10)
    assert set(world.done.values()) == {"answered"}


def test_nothing_leaves_for_something_less_urgent():
    """What waits for a model on the device is due first: it runs first."""
    world = crowd(2, device=10, host=20, batch_s=0.1)
    world.arrive("m0", 9)
    world.arrive("m1")
    world.run(world.now + 5)
    assert world.runs == [model_id("m0", 1)] * 3 + [model_id("m1", 1)]


def test_beyond_both_tiers_is_refused_with_numbers():
    """Whatever is admitted is served; the last one is told what was free."""
    world = crowd(11)
    refused = world.core.reports()[10]
    assert (refused.phase, refused.bound) == ("failed", False)
    assert refused.error == (
        f"no room on the device and in the host's memory: needs {10 * UNIT:,} bytes, 0 are free"
    )
    for n in range(10):
        world.arrive(f"m{n}", 3)
    world.run(world.now + 10)
    assert list(world.done.values()) == ["answered"] * 30


def test_both_tiers_full_serve_what_they_hold_together():
    """What left the device without a copy is read again from the disk."""
    world = crowd(10)
    for _ in range(3):
        for n in range(10):
            world.arrive(f"m{n}", 2)
        world.run(world.now + 5)
    assert list(world.done.values()) == ["answered"] * 60
    assert len(world.on_device | world.in_host) == 10


def test_a_model_larger_than_the_device_is_refused():
    """Whatever the host's memory holds."""
    world = SwapWorld({"a": 10, "big": 30}, device=20, host=100)
    world.want("a", "big")
    assert "larger than the whole device budget" in str(world.core.state.get("big/1").error)
    assert world.core.state.get(A).served


def test_what_keeps_a_state_stays():
    """Others take turns beside it; and it is not admitted where they could not."""
    world = SwapWorld({"s": 10} | equal(4), device=20, host=50, stateful=["s"])
    world.want("s", *equal(4))
    for n in (3, 2, 1, 0):
        world.arrive(f"m{n}", 2)
        world.run(world.now + 1)
    assert "-s/1" not in world.log
    assert list(world.done.values()) == ["answered"] * 8
    world = SwapWorld(equal(4) | {"s": 11}, device=20, host=50, stateful=["s"])
    world.want(*equal(4), "s")
    assert "beside what never leaves it" in str(world.core.state.get("s/1").error)


def test_what_keeps_a_state_makes_others_leave():
    """It serves from the device alone: they can wait in the host's memory."""
    world = SwapWorld(equal(3) | {"s": 10}, device=20, host=50, stateful=["s"])
    world.want(*equal(3))
    world.arrive("m1")
    world.run(world.now + 1)
    world.want(*equal(3), "s")
    assert world.log[-2:] == ["-m0/1", "+s/1"]
    assert world.core.state.is_ready("s/1")


def test_programs_that_cannot_be_told_from_their_weights_are_not_held():
    """So many are served as the device holds, whatever the host's memory has free."""
    world = SwapWorld(equal(4), device=20, host=60, whole=equal(4))
    world.want(*equal(4))
    assert not world.core.state.host.used_bytes()
    assert set(world.consumers) == {"m0/1", "m1/1"}
    assert world.core.state.get("m2/1").error == (
        "no room on the device for what cannot wait in the host's memory: "
        f"needs {10 * UNIT:,} bytes, 0 are free"
    )


def test_what_has_no_copy_comes_from_the_disk_when_it_is_asked_for():
    """And not before, once it had to leave for others: it would leave again at the next swap."""
    world = SwapWorld({"w": 4, "a": 6, "b": 9}, device=10, host=30, whole=["w"], apart=["w"])
    world.want("w", "a", "b")
    world.log.clear()
    for n in range(6):
        world.arrive("ab"[n % 2])
        world.run(world.now + 1)
    assert "+w/1" not in world.log
    world.arrive("w")
    world.run(world.now + 1)
    assert list(world.done.values()) == ["answered"] * 7
    assert not any(m.startswith("w") for m in world.in_host)


def test_what_turns_out_whole_takes_its_like_with_it():
    """What they shared they have each for itself: the device's sum says so at once."""
    world = SwapWorld(equal(3), device=30, host=40, shared=8, whole=["m2"])
    world.want("m0", "m1")
    assert world.core.state.used_bytes() == 12 * UNIT
    world.want("m0", "m1", "m2")
    assert world.core.state.used_bytes() == 30 * UNIT


@given(
    residents=st.integers(2, 3),
    newcomers=st.integers(1, 3),
    batch_s=st.sampled_from([0.002, 0.01, 0.05]),
    load=st.sampled_from([0.3, 1.0]),
    per=st.sampled_from([1, 4, 8]),
    deep=st.sampled_from([8, 16]),
    size=st.sampled_from([10, 20]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_nobody_waits_for_those_that_never_rest(
    residents, newcomers, batch_s, load, per, deep, size, seed
):
    """As long as each of the residents is asked without a pause, newcomers are answered: they
    are due before what comes later; also one in whose place two must leave."""
    names = [f"m{n}" for n in range(residents)]
    others = [f"n{n}" for n in range(newcomers)]
    sizes = dict.fromkeys(names, 10) | dict.fromkeys(others, size)
    world = SwapWorld(sizes, device=10 * residents, host=500, batch_s=batch_s)
    jitter = Random(seed)
    world.want(*names, *others)

    def busy(until: float) -> None:
        while world.now < until and not all(item in world.done for item in asked):
            for name in names:
                if len(world.core.dispatch.waiting(model_id(name, 1))) < deep:
                    world.arrive(name, per)
            world.run(world.now + batch_s * load * jitter.uniform(0.75, 1.25), check=False)

    asked = [0]
    busy(world.now + 50 * batch_s)
    asked, at = [item for name in others for item in world.arrive(name)], world.now
    assert len(asked) == newcomers
    # By its target; behind what each of the others is due before it; and what it costs to come.
    bound = 0.2 + newcomers * (0.05 + 4 * (residents + newcomers) * deep * batch_s)
    busy(at + bound)
    assert all(item in world.done for item in asked), "it starves"


@given(
    newcomers=st.integers(1, 3),
    spare=st.sampled_from([0, 1, 6]),
    batch_s=st.sampled_from([0.001, 0.01, 0.03]),
    copy_s=st.sampled_from([0.0005, 0.002]),
    per=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_what_is_newly_wanted_is_served_whatever_is_asked_of_others(
    newcomers, spare, batch_s, copy_s, per, seed
):
    """It gets the next load that ends: though others are swapped in without a pause, and where
    the host's memory is scarce are read again and again."""
    old, new = [f"m{n}" for n in range(20)], [f"n{n}" for n in range(newcomers)]
    device, host = 60, 10 * (14 + newcomers + spare)  # 0: each has one place, here or there
    world = SwapWorld(
        dict.fromkeys([*old, *new], 10), device=device, host=host, batch_s=batch_s, copy_s=copy_s
    )
    world.want(*old)
    jitter = Random(seed)

    def busy(until: float) -> None:
        while world.now < until:
            for name in jitter.sample(old, 10):
                if len(world.core.dispatch.waiting(model_id(name, 1))) < 4:
                    world.arrive(name, per)
            world.run(world.now + copy_s * 20, check=False)

    busy(world.now + 1.0)
    wanted = tuple(model_id(name, 1) for name in [*old, *new])
    world.tell(Assigned(wanted, 1, world.core.generation + 1))
    ended = world.loads_ended
    while not all(model_id(name, 1) in world.consumers for name in new):
        busy(world.now + copy_s * 20)
        assert world.loads_ended - ended <= 4 * (world.core.state.max_loading + newcomers)


def test_what_has_no_copy_stays_longer_than_what_has_one():
    """It leaves once it was unused for as many times longer as the disk is slower: else each swap
    would read what the last one threw away."""
    world = crowd(5, device=30, host=30)
    for n in [0, 1, 2, 3, 4] * 3:
        world.arrive(f"m{n}")
        world.run(world.now + 1)
    alone = world.on_device - world.in_host
    others = sorted(name.partition("/")[0] for name in world.sizes.keys() - alone)
    assert (len(alone), len(others)) == (2, 3)

    def ask(rounds: int) -> None:
        for name in others * rounds:
            world.arrive(name)
            world.run(world.now + 1)

    reads = world.reads
    ask(rounds=1)
    assert world.reads == reads
    assert alone <= world.on_device
    ask(rounds=10)
    assert not alone & world.on_device


def test_a_copy_that_cannot_be_made_costs_nobody_his_model():
    """It is served from the disk, and asked for a copy again later."""
    world = crowd(3, device=20, host=10)
    state = world.core.state
    model = state.get("m2/1")
    model.copy = "none"
    state.host.remove(model.id)
    world.in_host.discard(model.id)
    load = state.load(model, world.now, tier="host", keep=True)
    world.tell(LoadFailed(load.model, "model_failed", "cannot pin"))
    assert model.id in world.consumers
    assert (model.error, model.in_host, model.stage) == (None, False, "absent")
    world.arrive("m2")
    world.run(world.now + 1)
    assert list(world.done.values()) == ["answered"]


def test_a_swap_that_the_device_has_no_room_for_takes_one_more_place():
    """Its items are not given back, and wait for no pause."""
    world = crowd(4, device=20, host=40)
    told = world.core.handle
    refused = []

    def handle(facts, now):
        facts = [refuse(fact) for fact in facts]
        return told(facts, now)

    def refuse(fact):
        if isinstance(fact, ModelLoaded) and not refused:
            refused.append(fact.model)
            world.on_device.discard(fact.model)
            return LoadFailed(fact.model, "resource_exhausted", "in pieces")
        return fact

    world.core.handle = handle
    asked = next(m for m in world.core.state.models if m not in world.on_device)
    began = world.now
    (item,) = world.arrive(asked.partition("/")[0])
    world.run(world.now + 1)
    assert refused == [asked]
    assert world.done == {item: "answered"}
    assert world.answered_at[item] - began < 0.1
    assert world.core.state.get(asked).error is None


def test_copies_of_what_nobody_wants_go_first():
    """First those of what is on the device as well, then the least recently used."""
    world = SwapWorld(equal(5), device=20, host=30)
    world.want("m0", "m1", "m2")
    world.arrive("m2")
    world.run(world.now + 1)
    world.want()
    assert world.in_host == {model_id(name, 1) for name in ("m0", "m1", "m2")}
    assert world.on_device == {model_id(name, 1) for name in ("m1", "m2")}
    world.want("m3")  # m1 leaves the device for it; of m1 and m2 only m2 is there still
    assert world.in_host == {model_id(name, 1) for name in ("m0", "m1", "m3")}
    world.want("m3", "m4")
    assert world.in_host == {model_id(name, 1) for name in ("m1", "m3", "m4")}


def test_a_copy_brings_back_what_was_unbound():
    """A model that is wanted again is consumed at once, and comes in without being asked."""
    world = SwapWorld({"a": 20, "b": 20}, device=20, host=40)
    world.want("a")
    world.want("b")
    assert world.log == ["+a/1", "-a/1", "+b/1"]
    world.want()
    world.want("a")
    assert world.log[3:] == ["-b/1", "+a/1"]
    assert world.core.reports()[0].bound


def test_a_shared_part_is_counted_once_in_each_tier():
    """Ten models of ten units, eight in common, fit where three would stand."""
    world = SwapWorld(equal(10), device=28, host=0, shared=8)
    world.want(*equal(10))
    assert world.core.state.used_bytes() == 28 * UNIT
    assert len(world.on_device) == 10
    assert world.core.state.device.shared_bytes() == 9 * 8 * UNIT
    world = SwapWorld(equal(10), device=12, host=28, shared=8)
    world.want(*equal(10))
    for n in range(10):
        world.arrive(f"m{n}")
    world.run(world.now + 5)
    assert list(world.done.values()) == ["answered"] * 10


def test_wherever_a_model_is_it_prefetches_two_batches():
    """It is bound for longer than it stays where it is: once it is hot, one runs and one waits."""
    world = crowd()
    assert [s.prefetch for s in world.core.subscriptions.all.values()] == [8] * 8


def test_without_a_host_tier_nothing_wanted_leaves():
    """What does not fit beside the wanted ones is refused."""
    world = crowd(3, host=0)
    assert [report.bound for report in world.core.reports()] == [True, True, False]
    world.arrive("m0")
    world.run(world.now + 1)
    assert world.log == ["+m0/1", "+m1/1"]


def test_after_an_engine_is_lost_what_is_asked_for_is_loaded_first():
    """Both tiers are gone with it; what was on its way is suspect, and comes alone."""
    world = crowd()
    for name in ("m5", "m7", "m6"):
        world.arrive(name)
    world.engine_dies()
    assert not world.core.state.host.used_bytes()
    assert {report.tier for report in world.core.reports()} == {"disk"}
    world.log.clear()
    world.engine_starts()
    assert len(world.core.state.loading()) == 1
    world.run(world.now + 5)
    assert world.log[0] == "+m5/1"
    assert list(world.done.values()) == ["given back"] * 3, "whoever is faster takes them"
    assert len(world.consumers) == 8
    for n in range(8):
        world.arrive(f"m{n}")
    world.run(world.now + 5)
    assert list(world.done.values())[3:] == ["answered"] * 8
    assert not any(model.suspect for model in world.core.state.models.values())


def test_what_was_measured_larger_than_the_device_is_refused_when_it_is_asked():
    """Its items go back to the queue, and it is unbound."""
    world = crowd()
    model = world.core.state.get("m7/1")
    model.measured.weights_bytes = 21 * UNIT
    model.measured.shares = ()
    world.core.state.claims.take(model)
    world.arrive("m7")
    assert model.id not in world.consumers, "in the same step"
    world.run(world.now + 1)
    assert list(world.done.values()) == ["given back"]
    assert world.core.reports()[7].phase == "failed"
    assert "larger than the whole device budget" in str(model.error)


def test_a_device_that_is_over_its_budget_swaps_out():
    """What is measured larger as it runs makes idle ones leave, not the placer."""
    world = crowd()
    world.arrive("m0")
    (batch,) = [fact.batch for *_, fact in world.events if isinstance(fact, BatchRan)]
    world.events.clear()
    world.tell(BatchRan(batch, (), 0.004, 3 * UNIT))
    world.run(world.now + 1)
    assert world.log[2:] == ["-m1/1"]
    assert all(report.error is None and report.bound for report in world.core.reports())


@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=10),
    device=st.integers(8, 30),
    host=st.integers(0, 80),
    shared=st.sampled_from([0, 0, 1]),
    stateful=st.sampled_from([[], [], ["m1"]]),
    whole=st.sampled_from([[], [], [], ["m0", "m1", "m2"]]),
    batch_s=st.sampled_from([0.001, 0.01, 0.1]),
    copy_s=st.sampled_from([0.0001, 0.002]),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(1, 9) | st.just(0),
            st.sampled_from([0.0, 0.001, 0.02, 0.3]),
            st.sampled_from([None, None, 0.05, 2.0]),
        ),
        max_size=60,
    ),
)
@settings(max_examples=200, deadline=None)
def test_nothing_starves_and_nothing_goes_to_and_fro(
    sizes, device, host, shared, stateful, whole, batch_s, copy_s, arrivals
):
    """Whatever is asked of whatever is bound: every item is answered, or refused when its
    deadline has passed; and no model is swapped in without a batch to run. When the engine dies
    (no items) what waits goes back to its queue, and all is served again."""
    world = SwapWorld(
        {f"m{n}": size for n, size in enumerate(sizes)},
        device=device,
        host=host,
        shared=shared,
        stateful=stateful,
        whole=whole,
        batch_s=batch_s,
        copy_s=copy_s,
    )
    world.want(*(f"m{n}" for n in range(len(sizes))))
    bound = set(world.consumers)
    assert all(model in bound or world.core.state.get(model).error for model in world.sizes)
    before = len(world.log)
    asked: list[int] = []
    deaths = 0
    for n, count, pause, deadline in arrivals:
        if not count and not deaths:
            deaths += 1
            world.engine_dies()
            world.run(world.now + pause)
            world.engine_starts()
        elif count and model_id(f"m{n}", 1) in world.consumers:
            late = {} if deadline is None else {"deadline": world.now + deadline}
            asked += world.arrive(f"m{n}", count, **late)
        world.run(world.now + pause)
    world.run(world.now + 60)
    assert world.done.keys() == set(asked)
    assert deaths or "given back" not in world.done.values()
    if not any(deadline for *_, deadline in arrivals) and not deaths:
        assert set(world.done.values()) <= {"answered"}
        if not whole and host >= sum(sizes):  # else some come from the disk, asked or not
            swaps = sum(line.startswith("+") for line in world.log[before:])
            assert swaps <= len(world.runs)
    assert deaths or set(world.consumers) == bound
    assert all(m in world.consumers or world.core.state.get(m).error for m in world.sizes)
    again = [item for n in range(len(sizes)) for item in world.arrive(f"m{n}")]
    world.run(world.now + 60)
    assert [world.done[item] for item in again] == ["answered"] * len(world.consumers)


def waits_beside_a_flood(tenants: dict[str, str]) -> float:
    """Seconds until the one request of a model that is not on the device is answered, which comes
    when those for four others have waited for half a second, and wait for another second."""
    world = crowd(5, device=20, host=50, tenants=tenants)
    for n in range(4):
        world.arrive(f"m{n}", 500)
    world.run(world.now + 0.5, check=False)
    assert not world.on_device & {"m4/1"}
    [asked] = world.arrive("m4")
    began = world.now
    world.run(world.now + 5, check=False)
    assert set(world.done.values()) == {"answered"}
    assert len(world.done) == 2001
    return world.answered_at[asked] - began


def test_a_tenants_model_comes_in_beside_anothers_flood():
    """Once the other one had the device for as long as bringing it in takes, however long what that
    one asks for has been due. In one tenant it waits for all that was due before."""
    flood = {f"m{n}": "a" for n in range(4)}
    assert waits_beside_a_flood(flood | {"m4": "b"}) < 0.1
    assert waits_beside_a_flood({}) > 0.5


@given(st.integers(2, 5), st.integers(2, 5), st.sampled_from([0.001, 0.004, 0.02]))
@settings(max_examples=15, deadline=None)
def test_tenants_that_swap_against_each_other_lose_little_to_it(a, b, batch_s):
    """However many models of each want a device that holds two: all is answered, within twice the
    time that the same takes as one tenant's."""

    def takes(tenants: dict[str, str]) -> float:
        world = crowd(a + b, device=20, host=200, batch_s=batch_s, tenants=tenants)
        began = world.now
        for n in range(a + b):
            world.arrive(f"m{n}", 200)
        world.run(world.now + 60, check=False)
        assert set(world.done.values()) == {"answered"}
        assert len(world.done) == 200 * (a + b)
        return max(world.answered_at.values()) - began

    apart = takes({f"m{n}": "a" if n < a else "b" for n in range(a + b)})
    assert apart <= 2 * takes({})
