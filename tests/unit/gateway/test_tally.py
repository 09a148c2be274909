from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.core.tally import Ran, Tallies, Tally, statistics
from shared.names import ModelId

M, N = ModelId("m/1"), ModelId("n/1")


def test_batches_are_put_together_from_their_requests():
    """Each is its share of the batch; time on the device counts whole for each request, and once
    for the batch."""
    tallies = Tallies()
    for rows in (1, 3, 4):
        tallies.note(M, 0.5, Ran(rows, 8, 0.25, 100_000), 10.0)
    total = tallies.sum(M, [])
    assert (total.succeeded, total.rows, total.last_ms) == (3, 8, 10_000)
    assert total.compute_ns == 3 * 100_000_000
    assert total.queue_ns == 3 * 150_000_000
    assert total.batches[8].runs == pytest.approx(1)
    assert total.batches[8].ns == pytest.approx(100_000_000)


def test_failures_are_counted_apart():
    """With their time, and without a batch."""
    tallies = Tallies()
    tallies.note(M, 0.5, None, 10.0)
    total = tallies.sum(M, [])
    assert (total.failed, total.failed_ns, total.succeeded, total.batches) == (
        1,
        500_000_000,
        0,
        {},
    )


def test_gateways_add_up():
    """What another has told, decoded; what cannot be read is left out."""
    mine, others = Tallies(), Tallies()
    for tallies in (mine, others):
        tallies.note(M, 1.0, Ran(2, 2, 0.1, 1000), 10.0)
    others.note(M, 1.0, Ran(1, 1, 0.1, 1000), 20.0)
    told = others.changes()
    total = mine.sum(M, [told[M], b"\xff", b""])
    assert (total.succeeded, total.rows, total.last_ms) == (3, 5, 20_000)
    assert {rows: batches.runs for rows, batches in total.batches.items()} == {2: 2, 1: 1}
    assert mine.sum(M, []).succeeded == 1


def test_only_changes_are_told_and_again_when_they_were_not_heard():
    """A model that is not asked costs nothing."""
    tallies = Tallies()
    tallies.note(M, 1.0, None, 1.0)
    tallies.note(N, 1.0, None, 1.0)
    assert tallies.changes().keys() == {M, N}
    tallies.note(N, 1.0, None, 1.0)
    told = tallies.changes()
    assert told.keys() == {N}
    assert tallies.changes() == {}
    tallies.untold(told)
    assert tallies.changes().keys() == {N}
    tallies.untold([N])
    tallies.forget("n")
    assert tallies.changes() == {}
    assert tallies.sum(N, []) == Tally(batches={})


@given(st.lists(st.tuples(*[st.integers(-(2**70), 2**70)] * 3), max_size=20))
def test_replies_that_lie_break_nothing(told):
    """Rows and times come in a reply's headers, which any producer of replies writes."""
    tallies = Tallies()
    for rows, batch_rows, compute_us in told:
        ran = Ran(min(max(rows, 1), 2**31), batch_rows, 0.1, compute_us)
        tallies.note(M, 0.1, ran, 1.0)
    total = tallies.sum(M, tallies.changes().values())
    assert total.queue_ns >= 0
    entry = statistics("m", "1", total, [])
    msgspec.json.encode(entry)
    assert entry["execution_count"] <= 2 * len(told)
