"""Laws of order: urgency, priority, and that nobody is overtaken for ever."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.batch import LEVEL_TARGETS
from services.worker.core.dispatch import Dispatch
from services.worker.core.events import Item, RunBatch
from services.worker.core.profile import Measured
from shared.models import ModelSpec, Padding, TensorSpec
from shared.names import model_id

MODELS = [model_id(f"m{n}", 1) for n in range(3)]
TARGETS = dict(zip(MODELS, [10.0, 100.0, 1000.0], strict=True))
PADDING = Padding(inputs={"x": 0}, sizes=(8, 16, 64))


def device() -> SimpleNamespace:
    """Every model is ready."""
    models = {
        name: SimpleNamespace(
            id=name, measured=Measured(1, None), busy_s=0.0, suspect=False, tenant=""
        )
        for name in MODELS
    }
    return SimpleNamespace(
        quiesce=False,
        condemned=False,
        loading=list,
        is_ready=models.__contains__,
        get=models.__getitem__,
        workspace_grew=lambda: None,
    )


def dispatch() -> Dispatch:
    return Dispatch(device(), max_bytes_under_way=1 << 40)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 2),  # model
        st.integers(-9, 9),  # priority
        st.sampled_from([0.0, 0.001, 0.01, 0.3]),  # seconds since the one before
        st.integers(1, 4),  # rows
        st.integers(0, 80),  # length
    ),
    min_size=1,
    max_size=60,
)


def served(
    asked: list[tuple[int, int, float, int, int]], batch_s: float, **spec: object
) -> tuple[dict[int, Item], list[tuple[float, RunBatch]]]:
    """Lets them arrive in time at a device that takes `batch_s` for any batch."""
    core = dispatch()
    specs = {name: ModelSpec(target_ms=TARGETS[name], **spec) for name in MODELS}
    items: dict[int, Item] = {}
    at = 0.0
    for number, (model, priority, gap, rows, length) in enumerate(asked, start=1):
        at += gap
        items[number] = Item(
            item=number,
            model=MODELS[model],
            subscription=1,
            rows=rows if "max_batch_size" in spec else 1,
            arrived=at,
            priority=priority,
            length=length if "padding" in spec else 0,
        )
    order: list[tuple[float, RunBatch]] = []
    coming, now = list(items.values()), 0.0
    while coming or core.models_waiting():
        while coming and coming[0].arrived <= now:
            item = coming.pop(0)
            core.add(item, specs[item.model])
        runs = [action for action in core.next_batches(now) if isinstance(action, RunBatch)]
        if not runs:
            assert not core.models_waiting(), "the device is free, and something waits"
            now = coming[0].arrived
            continue
        for run in runs:
            order.append((now, run))
            now += batch_s
            core.ran(run.batch, 0.0, 0, now)  # nothing is measured: nothing is queued ahead
        core.places()
    return items, order


def due(item: Item) -> float:
    target = TARGETS[item.model] / 1e3
    return item.arrived + target * (1 - LEVEL_TARGETS * item.priority)


@given(arrivals, st.sampled_from([0.0, 0.02, 0.4]))
def test_within_a_model_only_what_is_more_urgent_goes_first(asked, batch_s):
    """So one of a lower level is overtaken only by what came so many target times later."""
    items, order = served(asked, batch_s)
    began = {number: now for now, run in order for number in run.items}
    assert began.keys() == items.keys()
    for one in items.values():
        for other in items.values():
            overtakes = began[other.item] < began[one.item] and other.arrived >= one.arrived
            if one.model == other.model and overtakes:
                levels = other.priority - one.priority
                allowed = LEVEL_TARGETS * levels * TARGETS[one.model] / 1e3
                assert other.arrived - one.arrived <= allowed + 1e-9


@given(arrivals, st.sampled_from([0.0, 0.02, 0.4]))
def test_across_models_a_more_urgent_one_is_passed_over_only_for_fairness(asked, batch_s):
    """Where its model has just had two batches."""
    items, order = served(asked, batch_s)
    waiting = dict(items)
    for index, (now, run) in enumerate(order):
        (chosen,) = run.items
        for other in waiting.values():
            if other.arrived <= now and due(other) < due(items[chosen]):
                assert [each.model for _, each in order[max(index - 2, 0) : index]] == [
                    other.model
                ] * 2
        del waiting[chosen]


@given(st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None)
def test_a_stream_of_higher_levels_keeps_nobody_waiting_for_ever(lower, higher):
    """The bound: ten target times for each level between them."""
    lower, higher = sorted((lower, higher))
    stream = [(0, higher, 0.01, 1, 0)] * 1100
    _, order = served([(0, higher, 0.0, 1, 0), (0, lower, 0.0, 1, 0), *stream], 0.01)
    began = next(now for now, run in order if 2 in run.items)
    assert began <= LEVEL_TARGETS * (higher - lower) * 0.010 + 0.05


@given(arrivals, st.sampled_from([0.0, 0.02]), st.sampled_from([(), (2, 4), (8,)]))
def test_a_padded_batch_holds_what_is_in_it(asked, batch_s, preferred):
    """At a declared size unless all are exactly as long, within its rows, each item once."""
    inputs = (TensorSpec("x", "INT64", (-1,)),)
    items, order = served(
        asked,
        batch_s,
        max_batch_size=8,
        preferred_batch_size=preferred,
        inputs=inputs,
        padding=PADDING,
    )
    seen: list[int] = []
    for _, run in order:
        lengths = [items[number].length for number in run.items]
        assert run.size == PADDING.holding(max(lengths))
        assert run.size in PADDING.sizes or set(lengths) == {run.size}
        assert run.rows == sum(items[number].rows for number in run.items) <= 8
        assert {items[number].model for number in run.items} == {run.model}
        seen += run.items
    assert sorted(seen) == sorted(items)
