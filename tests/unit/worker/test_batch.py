"""What runs together, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.worker.core.batch import Formed, ModelQueue
from services.worker.core.events import Item
from services.worker.core.turns import Turns
from shared.models import ModelSpec, Padding, TensorSpec
from shared.names import ModelId

A, B = ModelId("a/1"), ModelId("b/1")
BIG = 1 << 30


def item(
    number: int,
    *,
    rows: int = 1,
    at: float = 0.0,
    deadline=None,
    kind=(),
    nbytes=1,
    priority: int = 0,
    length: int = 0,
) -> Item:
    return Item(
        item=number,
        model=A,
        subscription=1,
        rows=rows,
        kind=kind,
        nbytes=nbytes,
        arrived=at,
        deadline=deadline,
        priority=priority,
        length=length,
    )


def queue_of(*items: Item, **spec) -> ModelQueue:
    queue = ModelQueue(ModelSpec(**({"max_batch_size": 8} | spec)))
    for each in items:
        queue.add(each)
    return queue


def formed(queue: ModelQueue, *, now=0.0, ahead=0.0, per_row=0.0, max_bytes=BIG) -> list[int]:
    found = queue.form(now, ahead, lambda rows, size: per_row * rows * max(size, 1), max_bytes)
    return numbers(found)


def numbers(found: Formed) -> list[int]:
    assert found.rows == sum(entry.item.rows for entry in found.entries)
    assert found.nbytes == sum(entry.nbytes(found.size) for entry in found.entries)
    return [entry.item.item for entry in found.entries]


def free(rows: int, size: int) -> float:
    """Nothing was measured."""
    return 0.0


def test_a_batch_takes_what_fits_in_rows():
    """Items beyond max_batch_size wait; a smaller one behind them may still fit."""
    assert formed(queue_of(item(1, rows=5), item(2, rows=4), item(3, rows=3))) == [1, 3]


def test_only_one_kind_runs_together():
    """Other trailing shapes wait for the next batch."""
    one, other = (("x", "FP32", (4,)),), (("x", "FP32", (8,)),)
    assert formed(queue_of(item(1, kind=one), item(2, kind=other), item(3, kind=one))) == [1, 3]


def test_the_most_urgent_is_the_head():
    """A near deadline goes before an earlier arrival; a far one is not overtaken for ever."""
    far = item(1, at=0.0, deadline=60.0)
    near = item(2, at=0.0, deadline=0.05)
    later = item(3, at=0.02)
    assert formed(queue_of(far, later, near, max_batch_size=0)) == [2]
    assert formed(queue_of(later, far)) == [1, 3]


def test_nobody_is_made_late():
    """An item that would push the head, or itself, past the deadline waits."""
    queue = queue_of(item(1, deadline=0.035), item(2), item(3), item(4))
    assert formed(queue, per_row=0.01) == [1, 2, 3]
    assert formed(queue, per_row=0.01, ahead=0.01) == [1, 2]


def test_a_head_that_is_late_anyway_keeps_no_batch_small():
    """The batch is then as large as can be, for the sake of the others."""
    assert formed(queue_of(item(1, deadline=0.005), item(2), item(3)), per_row=0.01) == [1, 2, 3]


def test_models_that_do_not_batch_run_one_by_one():
    """max_batch_size 0, and stateful models."""
    assert formed(queue_of(item(1), item(2), max_batch_size=0)) == [1]
    assert formed(queue_of(item(1), item(2), max_batch_size=0, stateful=True)) == [1]


def test_a_batch_stays_within_its_bytes():
    """But the head runs, however large."""
    assert formed(queue_of(item(1, nbytes=90), item(2, nbytes=20)), max_bytes=100) == [1]
    assert formed(queue_of(item(1, nbytes=90)), max_bytes=10) == [1]


def test_waiting_for_company_is_for_who_asks_and_ends_when_full():
    """Without max_queue_delay_us nothing waits while the device is free."""
    assert queue_of(item(1, at=1.0)).waits_until(1.0, free) == 1.0
    patient = queue_of(item(1, at=1.0), max_queue_delay_us=5000)
    assert patient.waits_until(1.0, free) == 1.005
    for number in range(2, 9):
        assert patient.waits_until(1.001, free) == 1.005
        patient.add(item(number, at=1.001))
    assert patient.waits_until(1.001, free) == 1.001


def test_only_company_that_could_come_along_ends_the_waiting():
    """Items of another kind do not make a batch of this one any larger."""
    one, other = (("x", "FP32", (4,)),), (("x", "FP32", (8,)),)
    patient = queue_of(item(1, kind=one, rows=4), max_queue_delay_us=5000)
    patient.add(item(2, kind=other, rows=4))
    assert patient.waits_until(0.0, free) == 0.005
    patient.add(item(3, kind=one, rows=4))
    assert patient.waits_until(0.0, free) == 0.0


def test_waiting_for_company_makes_nobody_late():
    """What a batch takes is kept free before the first deadline."""
    patient = queue_of(item(1, deadline=0.010), max_queue_delay_us=50_000)
    assert patient.waits_until(0.0, lambda rows, size: 0.004) == 0.006


def test_waiting_is_counted_from_the_oldest():
    """Also when it is not the most urgent: nothing is delayed longer than was asked for."""
    patient = queue_of(item(1, at=1.0), max_queue_delay_us=5000)
    patient.add(item(2, at=1.004, priority=1))
    assert patient.waits_until(1.004, free) == 1.005


def test_a_preferred_size_goes_at_once_and_alone():
    """As Triton has it: the largest for which enough waits; what is left over waits on."""
    queue = queue_of(
        *(item(number) for number in range(1, 8)),
        preferred_batch_size=(2, 4),
        max_queue_delay_us=5000,
    )
    assert queue.waits_until(0.0, free) == 0.0
    assert formed(queue) == [1, 2, 3, 4]
    queue.remove(queue.entries()[:4])
    assert formed(queue) == [5, 6]
    queue.remove(queue.entries()[:2])
    assert queue.waits_until(0.0, free) == 0.005
    assert formed(queue) == [7]


def test_preferred_sizes_delay_nothing_by_themselves():
    """Where no delay is asked for, what is there runs: also more than one, also no such size."""
    queue = queue_of(item(1), item(2), item(3), preferred_batch_size=(4, 8))
    assert queue.waits_until(0.0, free) == 0.0
    assert formed(queue) == [1, 2, 3]
    assert queue.form(0.0, 0.0, free, BIG).full is False


def test_an_item_larger_than_every_preferred_size_runs():
    """The sizes are a wish; `max_batch_size` is the limit."""
    queue = queue_of(item(1, rows=6), item(2, rows=2), preferred_batch_size=(2, 4))
    assert formed(queue) == [1, 2]


def test_what_expired_is_taken_out():
    """And nothing else."""
    queue = queue_of(item(1, deadline=1.0), item(2, deadline=2.0), item(3))
    assert queue.next_expiry() == 1.0
    assert queue.expire(0.9) == []
    assert [entry.item.item for entry in queue.expire(1.0)] == [1]
    assert queue.next_expiry() == 2.0
    assert len(queue) == 2


def test_memory_shrinks_batches_and_time_grows_them_again():
    """Half of what failed; after many good batches at the limit, double."""
    queue = queue_of()
    queue.out_of_memory(8)
    assert queue.limit() == 4
    queue.out_of_memory(4)
    for _ in range(64):
        queue.ran_well(2)
    assert queue.limit() == 4
    for _ in range(64):
        queue.ran_well(4)
    assert queue.limit() == 8


def test_memory_shrinks_batches_of_that_size_and_of_greater_ones():
    """Shorter requests take less: theirs stay as large as they were."""
    queue = padded_queue()
    queue.out_of_memory(8, 32)
    assert [queue.limit(size) for size in (16, 32, 64)] == [8, 4, 4]
    queue.out_of_memory(4, 64)
    assert [queue.limit(size) for size in (16, 32, 64)] == [8, 4, 2]
    for _ in range(64):
        queue.ran_well(4, 32)
    assert [queue.limit(size) for size in (16, 32, 64)] == [8, 8, 2]


def test_a_level_is_worth_ten_target_times():
    """So urgent requests overtake, but what has waited so much longer comes first."""
    queue = queue_of(item(1, at=0.0), item(2, at=0.9, priority=1), max_batch_size=0)
    assert formed(queue) == [2]
    queue = queue_of(item(1, at=0.0), item(2, at=1.1, priority=1), max_batch_size=0)
    assert formed(queue) == [1]
    queue = queue_of(item(1, at=0.0, priority=-1), item(2, at=0.9), max_batch_size=0)
    assert formed(queue) == [2]


# --- padding ------------------------------------------------------------------------------


def padded_queue(*items: Item, **spec) -> ModelQueue:
    return queue_of(
        *items,
        **{
            "inputs": (TensorSpec("x", "INT64", (-1,)),),
            "padding": Padding(inputs={"x": 0}, sizes=(16, 32, 64)),
        }
        | spec,
    )


def test_requests_of_different_lengths_run_together():
    """At the least size that holds them all."""
    queue = padded_queue(item(1, length=20), item(2, length=32), item(3, length=17))
    found = queue.form(0.0, 0.0, free, BIG)
    assert (numbers(found), found.size) == ([1, 2, 3], 32)


def test_the_head_is_not_slowed_down_by_longer_ones():
    """Those make their own batch, at their own turn."""
    queue = padded_queue(item(1, length=10), item(2, length=60), item(3, length=11))
    found = queue.form(0.0, 0.0, free, BIG)
    assert (numbers(found), found.size) == ([1, 3], 16)


def test_shorter_ones_take_what_rows_are_free():
    """Of the same size first, then the nearest: that fills up least."""
    queue = padded_queue(
        *(item(1, length=60), item(2, length=5), item(3, length=20)),
        *(item(4, length=50), item(5, length=20)),
        max_batch_size=4,
    )
    found = queue.form(0.0, 0.0, free, BIG)
    assert (numbers(found), found.size) == ([1, 4, 3, 5], 64)


def test_shorter_ones_ride_only_where_that_saves_time():
    """At the longer size against a batch of their own, by what was measured."""
    items = (item(1, length=60), item(2, length=5), item(3, length=6))

    def by_elements(rows: int, size: int) -> float:
        return 0.001 * rows * size

    def by_batches(rows: int, size: int) -> float:
        return 0.010 + 0.0001 * rows

    assert numbers(padded_queue(*items).form(0.0, 0.0, by_elements, BIG)) == [1]
    assert numbers(padded_queue(*items).form(0.0, 0.0, by_batches, BIG)) == [1, 2, 3]


def test_longer_than_the_greatest_size_runs_as_it_is():
    """With nothing beside it but what is exactly as long."""
    queue = padded_queue(
        *(item(1, length=100), item(2, length=64), item(3, length=101), item(4, length=100))
    )
    found = queue.form(0.0, 0.0, free, BIG)
    assert (numbers(found), found.size) == ([1, 4], 100)


def test_what_is_filled_up_counts_in_bytes():
    """It takes that much of the engine's inbox."""
    queue = padded_queue(item(1, length=4, nbytes=40), item(2, length=16, nbytes=160))
    assert queue.form(0.0, 0.0, free, BIG).nbytes == 320
    assert formed(queue, max_bytes=300) == [1]


# --- turns --------------------------------------------------------------------------------


def test_no_model_takes_more_than_two_batches_in_a_row():
    """While others wait; alone it may go on."""
    turns, order = Turns(), []
    for _ in range(6):
        model = turns.choose([(1.0, A), (2.0, B)], always)
        assert model is not None
        turns.ran(model)
        order.append(model)
    assert order == [A, A, B, A, A, B]
    assert turns.choose([(5.0, B)], always) == B
    assert turns.choose([], always) is None


def test_a_model_that_may_not_run_takes_no_turn():
    """Not ready, or waiting for company."""
    turns = Turns()
    assert turns.choose([(1.0, A), (2.0, B)], lambda model: model == B) == B
    assert turns.choose([(1.0, A), (2.0, B)], lambda model: False) is None
    for _ in range(3):
        turns.ran(A)
    assert turns.choose([(1.0, A), (2.0, B)], lambda model: model == A) == A


def always(model: ModelId) -> bool:
    return True


@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    gone=st.sets(st.integers(0, 11)),
    back=st.booleans(),
    alone=st.booleans(),
    spec=st.sampled_from(
        [{}, {"max_batch_size": 0}, {"preferred_batch_size": (4,)}, {"max_batch_size": 20}]
    ),
)
def test_a_full_batch_is_known_beforehand_to_be_possible(rows, gone, back, alone, spec):
    """Of a queue that says that nothing full can be made, nothing full is made; and when it may,
    of equal items without deadlines, it is."""
    queue = queue_of(*(item(n, rows=count) for n, count in enumerate(rows)), **spec)
    entries = queue.entries()
    out = [entry for n, entry in enumerate(entries) if n in gone][: len(entries) - 1]
    queue.remove(out)
    if back:
        for entry in out:
            entry.alone = alone
        queue.put_back(out)
    full = queue.form(0.0, 0.0, free, BIG).full
    assert queue.may_fill() or not full
    if set(rows) == {1} and not (back and alone):
        assert queue.may_fill() == full
