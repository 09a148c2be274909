"""What runs together, and in which order."""

from __future__ import annotations

from services.worker.core.batch import ModelQueue
from services.worker.core.events import Item
from services.worker.core.turns import Turns
from shared.models import ModelSpec
from shared.names import ModelId

A, B = ModelId("a/1"), ModelId("b/1")
BIG = 1 << 30


def item(number: int, *, rows: int = 1, at: float = 0.0, deadline=None, kind=(), nbytes=1) -> Item:
    return Item(
        item=number,
        model=A,
        subscription=1,
        rows=rows,
        kind=kind,
        nbytes=nbytes,
        arrived=at,
        deadline=deadline,
    )


def queue_of(*items: Item, **spec) -> ModelQueue:
    queue = ModelQueue(ModelSpec(**({"max_batch_size": 8} | spec)))
    for each in items:
        queue.add(each)
    return queue


def formed(queue: ModelQueue, *, now=0.0, ahead=0.0, per_row=0.0, max_bytes=BIG) -> list[int]:
    entries = queue.form(now, ahead, lambda rows: per_row * rows, max_bytes)
    return [entry.item.item for entry in entries]


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
    assert queue_of(item(1, at=1.0)).waits_until(1.0) == 1.0
    patient = queue_of(item(1, at=1.0), max_queue_delay_us=5000)
    assert patient.waits_until(1.0) == 1.005
    for number in range(2, 9):
        patient.add(item(number, at=1.001))
    assert patient.waits_until(1.001) == 1.001


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
    assert queue.limit == 4
    for _ in range(64):
        queue.ran_well(4)
    assert queue.limit == 8


def test_no_model_takes_more_than_two_batches_in_a_row():
    """While others wait; alone it may go on."""
    turns, order = Turns(), []
    for _ in range(6):
        model = turns.choose([(1.0, A), (2.0, B)])
        assert model is not None
        turns.ran(model)
        order.append(model)
    assert order == [A, A, B, A, A, B]
    assert turns.choose([(5.0, B)]) == B
    assert turns.choose([]) is None
