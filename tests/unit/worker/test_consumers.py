"""Subscriptions, as the core counts them."""

from __future__ import annotations

from services.worker.core.consumers import Subscription, Subscriptions
from services.worker.core.events import CloseConsumer, StartConsumer, StopConsumer
from services.worker.core.state import WorkerState
from shared.names import ModelId

M = ModelId("m/1")


def test_a_window_that_fills_up_is_news():
    """Each time, and only then."""
    subscription = Subscription(1, M, prefetch=2)
    assert [subscription.took() for _ in range(3)] == [False, True, False]
    subscription.held -= 2
    assert [subscription.took(), subscription.saturated] == [True, True]


def test_a_model_counts_its_subscriptions_until_they_are_closed():
    """One that was stopped counts as long as it holds something, beside its successor."""
    state = WorkerState()
    subscriptions = Subscriptions(state)
    (first,) = subscriptions.reconcile([M])
    assert first == StartConsumer(1, M, 2)
    subscriptions.all[1].took()
    subscriptions.started(1)
    assert subscriptions.reconcile([]) == [StopConsumer(1)]
    subscriptions.stopped(1)
    subscriptions.reconcile([M])
    assert (state.get(M).consumers, subscriptions.sweep()) == (2, [])
    subscriptions.all[1].held -= 1
    assert subscriptions.sweep() == [CloseConsumer(1)]
    assert state.get(M).consumers == 1
    subscriptions.validate()
