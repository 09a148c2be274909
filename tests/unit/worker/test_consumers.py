"""Subscriptions, as the core counts them."""

from __future__ import annotations

from services.worker.core.consumers import Subscription
from shared.names import ModelId


def test_a_window_that_fills_up_is_news_now_and_then():
    """At once the first time; under load it fills up with every batch, and heartbeats tell."""
    subscription = Subscription(1, ModelId("m/1"), prefetch=2)
    assert [subscription.took(10.0), subscription.took(10.0)] == [False, True]
    news = []
    for at in (10.1, 10.2, 10.3, 10.4):
        subscription.held -= 1
        news.append(subscription.took(at))
    assert news == [False, False, True, False]
    assert subscription.saturated
