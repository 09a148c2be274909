"""Subscriptions, as the core counts them."""

from __future__ import annotations

from services.worker.core.consumers import Subscription
from shared.names import ModelId


def test_a_window_that_fills_up_is_news():
    """Each time, and only then."""
    subscription = Subscription(1, ModelId("m/1"), prefetch=2)
    assert [subscription.took() for _ in range(3)] == [False, True, False]
    subscription.held -= 2
    assert [subscription.took(), subscription.saturated] == [True, True]
