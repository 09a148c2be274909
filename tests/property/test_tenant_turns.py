"""Laws of device time between tenants, on one worker."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.core.dispatch import Dispatch
from services.worker.core.events import Fault, Item, RunBatch
from services.worker.core.profile import Measured
from shared.models import ModelSpec
from shared.names import ModelId, model_id

SHARES = st.sampled_from([0.25, 1.0, 2.0, 5.0])
SECONDS = st.sampled_from([0.001, 0.004, 0.02, 0.3])


def name(tenant: str, number: int) -> ModelId:
    return model_id(f"{tenant}-{number}", 1)


class Device:
    """Runs what it is given, one batch after the other; each model's batches take as long as said,
    times what `wavers` says by turns. All models are ready but those in `away`."""

    def __init__(
        self,
        takes: dict[ModelId, float],
        shares: dict[str, float],
        wavers: tuple[float, ...] = (1,),
    ) -> None:
        self.takes = takes
        self.wavers = wavers
        self.away: set[ModelId] = set()
        self.now = 0.0
        self.ran: list[tuple[ModelId, float]] = []
        models = {
            model: SimpleNamespace(
                id=model,
                measured=Measured(1, None),
                busy_s=0.0,
                suspect=False,
                tenant=model.partition("-")[0],
            )
            for model in takes
        }
        self.state = SimpleNamespace(
            lost_model=lambda _: None,
            quiesce=False,
            condemned=False,
            loading=list,
            is_ready=lambda model: model not in self.away,
            get=models.__getitem__,
            workspace_grew=lambda: None,
        )
        self.core = Dispatch(self.state, max_bytes_under_way=1 << 40)
        self.core.share_device(shares)
        self._items = 0
        self._under_way: list[RunBatch] = []

    def ask(self, model: ModelId, *, target_ms: float = 100.0) -> int:
        self._items += 1
        item = Item(item=self._items, model=model, subscription=1, arrived=self.now)
        self.core.add(item, ModelSpec(target_ms=target_ms))
        return self._items

    def run(self) -> ModelId | None:
        """The next batch, to its end; None when nothing can run."""
        self._under_way += [
            action for action in self.core.next_batches(self.now) if isinstance(action, RunBatch)
        ]
        if not self._under_way:
            return None
        batch = self._under_way.pop(0)
        seconds = self.takes[batch.model] * self.wavers[len(self.ran) % len(self.wavers)]
        self.now += seconds
        self.core.ran(batch.batch, seconds, 0, self.now)
        self.ran.append((batch.model, seconds))
        self.core.places()
        return batch.model

    def given(self, tenant: str, since: int = 0) -> float:
        """Device seconds."""
        return sum(s for model, s in self.ran[since:] if model.startswith(f"{tenant}-"))

    def longest(self, tenant: str) -> float:
        return max((s for model, s in self.ran if model.startswith(f"{tenant}-")), default=0.0)


@given(
    st.lists(SECONDS, min_size=1, max_size=50),
    st.lists(SECONDS, min_size=1, max_size=5),
    SHARES,
    SHARES,
    st.lists(st.sampled_from([0.5, 1.0, 1.5]), min_size=1, max_size=4),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_device_time_is_shared_by_weight_to_within_one_batch_of_each(many, few, a, b, wavers, data):
    """Over any stretch in which both are backlogged, however many models each has, and however
    wrong the estimates are: they are put right once measured, so that of what is queued ahead
    (10 ms at most) the error counts besides."""
    takes = {name("a", n): s for n, s in enumerate(many)}
    takes |= {name("b", n): s for n, s in enumerate(few)}
    device = Device(takes, {"a": a, "b": b}, tuple(wavers))
    for model in takes:
        for _ in range(150):  # more than will run of any
            device.ask(model)
    for _ in range(150):
        assert device.run() is not None
    for _ in range(5):
        first = data.draw(st.integers(0, 149))
        last = data.draw(st.integers(first, 150))
        stretch = device.ran[first:last]
        got = {
            tenant: sum(s for model, s in stretch if model.startswith(f"{tenant}-"))
            for tenant in "ab"
        }
        bound = device.longest("a") / a + device.longest("b") / b
        ahead = 0.010 * 2 / min(a, b)
        assert abs(got["a"] / a - got["b"] / b) <= bound + ahead + 1e-9


def test_fifty_models_get_no_more_than_one_at_equal_shares():
    """A tenant cannot buy time by registering more models."""
    takes = {name("a", n): 0.02 for n in range(50)} | {name("b", 0): 0.02}
    device = Device(takes, {})
    for model in takes:
        for _ in range(200):
            device.ask(model)
    for _ in range(200):
        device.run()
    assert abs(device.given("a") - device.given("b")) <= 2 * 0.02 + 1e-9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), SECONDS), max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_device_is_never_idle_while_anything_can_run(asked):
    """Work conservation, and everything that was asked is run in the end."""
    takes = {name(t, n): 0.01 for t in "abc" for n in range(4)}
    device = Device(takes, {"a": 5.0, "b": 0.25})
    left = list(asked)
    while left or device.core.models_waiting():
        if left:
            tenant, number, gap = left.pop()
            device.ask(name(tenant, number))
            device.now += gap
        assert device.run() is not None
    assert len(device.ran) == len(asked)


@given(st.integers(1, 200), SECONDS)
@settings(deadline=None)
def test_silence_earns_no_credit(batches, seconds):
    """Whoever was idle while others ran begins at their time, and then they take turns: all that
    stands between is what was queued ahead before, 10 ms."""
    a, b = name("a", 0), name("b", 0)
    device = Device({a: seconds, b: seconds}, {})
    for _ in range(batches + 20):
        device.ask(a)
    for _ in range(batches):
        device.run()
    since = len(device.ran)
    for _ in range(20):
        device.ask(b)
    for _ in range(20):
        device.run()
    apart = abs(device.given("a", since) - device.given("b", since))
    assert apart <= 2 * seconds + 0.010 + 1e-9


def test_what_cannot_run_earns_no_credit_either():
    """A tenant whose model is away does not take the device for itself once it is back; how much
    it was passed over is told, for whoever decides what is brought in."""
    a, b = name("a", 0), name("b", 0)
    device = Device({a: 0.02, b: 0.02}, {"b": 2.0})
    for model in (a, b):
        for _ in range(100):
            device.ask(model)
    device.away = {b}
    for _ in range(20):
        assert device.run() == a
    assert 0.3 < device.core.owed_s(b) / 2.0 <= 0.4
    device.away = set()
    since = len(device.ran)
    for _ in range(30):
        device.run()
    assert device.core.owed_s(b) == 0.0
    assert abs(device.given("a", since) - device.given("b", since) / 2) <= 0.02 + 0.01 + 1e-9


def test_within_a_tenant_the_most_urgent_is_next_and_none_takes_three_in_a_row():
    """As without tenants, each by itself."""
    takes = dict.fromkeys([name("a", 0), name("a", 1), name("b", 0)], 0.02)
    device = Device(takes, {})
    for _ in range(30):
        device.ask(name("a", 0), target_ms=1)
        device.ask(name("a", 1), target_ms=10_000)
        device.ask(name("b", 0), target_ms=100_000)
    for _ in range(30):
        device.run()
    own = [model for model, _ in device.ran if model.startswith("a-")]
    assert own[:6] == [name("a", 0), name("a", 0), name("a", 1)] * 2
    assert abs(len(own) - 15) <= 1


def test_what_a_batch_really_took_is_what_its_tenant_is_charged():
    """A first batch of which nothing is known is charged nothing as it begins, and all of it as it
    ends; one that could not run is charged nothing."""
    a, b = name("a", 0), name("b", 0)
    device = Device({a: 1.0, b: 0.1}, {})
    for _ in range(100):
        device.ask(a)
        device.ask(b)
    for _ in range(22):
        device.run()
    assert abs(device.given("b") - device.given("a")) <= 1.0 + 0.1 + 1e-9
    lost = 0
    while lost < 20:
        for batch in device.core.next_batches(device.now):
            if isinstance(batch, RunBatch) and batch.model == b:
                device.core.failed(batch.batch, Fault("not_found", "it is gone"), device.now)
                lost += 1
            elif isinstance(batch, RunBatch):
                device.core.ran(batch.batch, 1.0, 0, device.now)
                device.ran.append((a, 1.0))
    since = len(device.ran)
    for _ in range(22):
        device.run()
    assert device.given("b", since) - device.given("a", since) <= 1.0 + 0.1 + 1e-9
