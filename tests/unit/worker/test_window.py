"""How many messages a worker may hold, by what they hold."""

from __future__ import annotations

from services.worker.core.window import Window


def come(window: Window, *messages: int) -> None:
    for requests in messages:
        window.came(requests)


def test_a_window_of_single_requests_opens_at_once():
    """It begins small, for whatever comes may be packs."""
    window = Window(64)
    assert (window.messages, window.mean, window.change()) == (8, 1.0, None)
    window.came(1)
    assert (window.change(), window.messages, window.change()) == (64, 64, None)


def test_packs_close_it():
    """To about as many requests, and never to less than two messages: one runs, one waits."""
    window = Window(64)
    window.came(32)
    assert window.change() == 2
    come(window, *[64] * 100)
    assert window.change() is None


def test_it_follows_what_comes():
    """Not each message: only what makes a difference."""
    window = Window(64, mean=1.0)
    come(window, 1, 2, 1)
    assert window.change() is None
    come(window, *[16] * 40)
    assert 4 <= (window.change() or 0) <= 6
    come(window, *[1] * 60)
    assert (window.change() or 0) >= 48


def test_what_was_known_of_the_model_counts_for_a_new_subscription():
    """It need not be learnt again."""
    assert Window(64, mean=32.0).messages == 2
    assert Window(64, mean=1.0).messages == 64


def test_a_stateful_model_has_one_message():
    """One request at a time, however they come."""
    window = Window(1)
    window.came(20)
    assert (window.messages, window.change()) == (1, None)


def test_it_is_full_by_messages():
    """Two packs fill a window of two, however few of their requests are left."""
    window = Window(64, mean=32.0)
    window.came(20)
    window.opened(20)
    assert not window.full(20)
    window.came(20)
    window.opened(20)
    assert window.full(40)
    for _ in range(19):
        window.settled(False)
    assert window.full(21)
    window.settled(True)
    assert not window.full(20)
