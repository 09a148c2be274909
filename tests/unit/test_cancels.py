from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from shared import cancels
from shared.cancels import Cancelled, CancelledRequests, encode


def test_a_note_names_requests():
    """Those and no others; None, which a message may have for an id, is never one."""
    told = CancelledRequests()
    assert told.note(encode([Cancelled("a", 10), Cancelled("b", 20)]), 5) == ("a", "b")
    assert "a" in told
    assert "c" not in told
    assert None not in told


def test_what_has_expired_goes_first_when_there_are_many(monkeypatch):
    """And then the oldest: a flood of notes costs bounded memory."""
    monkeypatch.setattr(cancels, "_MAX_KEPT", 4)
    told = CancelledRequests()
    told.note(encode([Cancelled("old", 10), Cancelled("long", 1000)]), 5)
    told.note(encode([Cancelled("x", 1000)]), 20)
    assert ("old" in told, "long" in told, "x" in told) == (False, True, True)
    told.note(encode([Cancelled(str(n), 1000) for n in range(4)]), 20)
    assert len(told) == 4
    assert "long" not in told


def test_a_flood_of_notes_is_looked_through_now_and_then(monkeypatch):
    """Not at each note, which would hold up the worker's event loop: what has expired may stay
    a while, but not more and more of it."""
    monkeypatch.setattr(cancels, "_MAX_KEPT", 100)
    told = CancelledRequests()
    sizes = []
    for now in range(200):
        told.note(encode([Cancelled(str(now), now + 1)]), now)
        sizes.append(len(told))
    assert max(sizes) == 11
    assert sizes.count(1) < 200 / 10


@given(st.binary(max_size=50))
@example(b"\x91\x92\xa1\xff\x01")  # its id is no UTF-8
def test_what_is_no_note_says_nothing(data):
    """Whatever the bytes are."""
    told = CancelledRequests()
    assert len(told.note(data, 0)) >= len(told)
