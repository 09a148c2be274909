from __future__ import annotations

import queue
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.dispatch import DeviceLost  # noqa: E402
from services.worker.engine.executor import FORMATS, ExecutorFormat  # noqa: E402
from services.worker.engine.loading import Loader  # noqa: E402
from services.worker.engine.memory import open_device  # noqa: E402
from services.worker.engine.outputs import named  # noqa: E402
from services.worker.wire import (  # noqa: E402
    EvictModel,
    LoadFailed,
    MemoryMeasured,
    ModelEvicted,
    ModelLoaded,
    WarmUp,
)
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine.engine_harness import command, spec  # noqa: E402

pytestmark = pytest.mark.torch

BUDGET_BYTES = 64 << 20
DEADLINE_S = 30.0
X = (spec("x", "FP32", -1, 4),)


class Dispatcher:
    """Runs on the spot what it is given."""

    def __init__(self):
        self.residents = {}
        self.memory_moves = threading.Event()

    def call(self, function):
        return function()

    def outputs_of(self, executor, manifest, inputs, rows):
        return named(executor.run(inputs), manifest.outputs)


class LostDevice:
    """A CPU that is found dead when it is asked."""

    def __init__(self):
        self._cpu = open_device("cpu", 0)

    def __getattr__(self, name):
        return getattr(self._cpu, name)

    def healthy(self):
        return False


class Rig:
    """A loader with its two threads, and what it says."""

    def __init__(self, device=None, **options):
        self.dispatcher = Dispatcher()
        self.memory = MemoryMeasured(0)
        self.lost = queue.SimpleQueue()
        self._events = queue.SimpleQueue()
        device = device or open_device("cpu", 0)
        self.loader = Loader(device, BUDGET_BYTES, self.dispatcher, self._events.put, **options)
        self._threads = [
            threading.Thread(target=self._run, args=(target,), daemon=True)
            for target in (self.loader.serve, self.loader.serve_graphs)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, target):
        try:
            target()
        except DeviceLost as lost:
            self.lost.put(lost)

    def event(self):
        while True:
            event = self._events.get(timeout=DEADLINE_S)
            if not isinstance(event, MemoryMeasured):
                return event
            self.memory = event

    def do(self, order):
        self.loader.submit(order)
        return self.event()

    def load(self, *arguments, **options):
        return self.do(command(*arguments, **options))

    def evict(self, model, tier="device"):
        assert self.do(EvictModel(model, tier)) == ModelEvicted(model, tier)

    def run(self, model, x=None):
        executor = self.dispatcher.residents[model].executor
        with torch.inference_mode():
            return executor.run([("x", torch.ones(1, 4) if x is None else x)])

    def end(self):
        self.loader.finish()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in self._threads)


@pytest.fixture
def rig():
    rig = Rig(host_bytes=BUDGET_BYTES)
    yield rig
    rig.end()


@pytest.fixture
def files(tmp_path):
    """Files of one architecture: `n` is added to what comes in."""

    def make(n: int, module=models.Adds):
        path = models.save(module(n), tmp_path / f"{module.__name__}{n}.pt")
        return {"path": path, "layout": models.layout_of(path)}

    return make


@pytest.fixture
def slowly(monkeypatch, files):
    """A format whose loads take until they are let go."""
    gate = threading.Event()

    class Slow:
        schema = ()

        def __init__(self, *_):
            assert gate.wait(DEADLINE_S)

        def weights_bytes(self, granule):
            return 1 << 20

        def close(self):
            pass

    monkeypatch.setitem(FORMATS, "export", ExecutorFormat(lambda file: 1 << 20, Slow))

    @contextmanager
    def loading(rig, model="slow/1"):
        rig.loader.submit(command(model, files(0)["path"], format="export"))
        try:
            yield
        finally:
            gate.set()

    return loading


# --- architectures ------------------------------------------------------------------------


def test_models_of_one_architecture_answer_for_themselves(rig, files):
    """The second is a copy: no program of its own, and its own weights."""
    first, second = rig.load("a/1", **files(1)), rig.load("a/2", **files(2))
    assert (first.architecture, second.architecture) == ("new", "known")
    for _ in range(2):
        assert rig.run("a/1").tolist() == [[2.0] * 4]
        assert rig.run("a/2").tolist() == [[3.0] * 4]


def test_one_architecture_is_parsed_once_however_many_ask(rig, files, slowly):
    """Loads of it that come while it is parsed wait, and are copies then."""
    with slowly(rig):
        for n in range(5):
            rig.loader.submit(command(f"a/{n + 1}", **files(n)))
    assert [rig.event().model for _ in range(6)] == ["slow/1", *(f"a/{n + 1}" for n in range(5))]
    residents = rig.dispatcher.residents
    assert len({id(residents[f"a/{n + 1}"].executor._skeleton) for n in range(5)}) == 1
    assert [rig.run(f"a/{n + 1}")[0, 0].item() for n in range(5)] == [1, 2, 3, 4, 5]


def test_a_known_architecture_waits_for_no_parse(rig, files, slowly):
    """A copy is answered while another model is being loaded, and so is an eviction."""
    rig.load("a/1", **files(1))
    with slowly(rig):
        assert rig.load("a/2", **files(2)).architecture == "known"
        rig.evict("a/1")
    assert rig.event().model == "slow/1"


def test_the_first_of_an_architecture_is_measured_for_all(rig, files):
    """What a batch takes does not depend on the weights, so a copy needs no warm-up."""
    options = {"inputs": X, "max_batch_size": 4, "warm": (WarmUp(1), WarmUp(4))}
    first = rig.load("a/1", **files(1), **options)
    second = rig.load("a/2", **files(2), **options)
    assert [case.rows for case in first.cases] == [1, 4]
    assert second.cases == first.cases


def test_an_architecture_is_measured_when_first_asked(rig, files):
    """A model that came without warm-ups leaves them to the next one."""
    rig.load("a/1", **files(1))
    second = rig.load("a/2", **files(2), inputs=X, warm=(WarmUp(1),))
    assert (second.architecture, len(second.cases)) == ("known", 1)


def test_a_failed_load_leaves_the_architecture_to_the_next(rig, files, slowly, tmp_path):
    """A file that is gone costs its own model one answer, and those who waited nothing."""
    gone, there = files(1), files(2)
    with slowly(rig):
        rig.loader.submit(command("a/1", tmp_path / "gone.pt", layout=gone["layout"]))
        rig.loader.submit(command("a/2", **there))
    assert rig.event().model == "slow/1"
    failed, loaded = rig.event(), rig.event()
    assert isinstance(failed, LoadFailed)
    assert failed.code == "model_failed"
    assert isinstance(loaded, ModelLoaded), loaded
    assert rig.run("a/2").tolist() == [[3.0] * 4]


@pytest.mark.parametrize("module", [models.Counts, models.Tampers])
def test_what_writes_its_weights_has_a_module_of_its_own(rig, files, module):
    """State of one model never shows in another, and the graph is asked only once."""
    first, second = rig.load("w/1", **files(1, module)), rig.load("w/2", **files(2, module))
    assert (first.architecture, second.architecture) == ("new", "none") or (
        first.architecture == second.architecture == "none"
    )
    before = rig.run("w/2").tolist()
    for _ in range(3):
        rig.run("w/1")
    assert rig.run("w/2").tolist() != before  # it did write
    rig.evict("w/2")
    assert isinstance(rig.load("w/2", **files(2, module)), ModelLoaded)
    assert rig.run("w/2").tolist() == before


def test_a_stateful_model_is_never_shared(rig, files):
    """Whatever its graph says, what a manifest calls stateful is loaded by itself."""
    assert rig.load("a/1", **files(1), stateful=True).architecture == "none"
    assert rig.run("a/1").tolist() == [[2.0] * 4]


def test_skeletons_that_nobody_needs_are_let_go(rig, files):
    """A few stay warm, the rest is given back."""
    for n in range(8):
        file = files(n, models.make_adds(f"Adds{n}"))
        rig.load(f"m/{n + 1}", **file)
        rig.evict(f"m/{n + 1}")
    again = [rig.load(f"m/{n + 1}", **files(n, models.make_adds(f"Adds{n}"))) for n in (7, 0)]
    assert [each.architecture for each in again] == ["known", "new"]


# --- order --------------------------------------------------------------------------------


def test_a_model_under_way_is_evicted_when_it_has_come(rig, slowly):
    """What concerns one model is done in its own order."""
    with slowly(rig):
        rig.loader.submit(EvictModel("slow/1"))
    assert isinstance(rig.event(), ModelLoaded)
    assert rig.event() == ModelEvicted("slow/1")
    assert not rig.dispatcher.residents


def test_a_load_waits_for_the_room_that_was_made_for_it(rig, files, slowly):
    """An eviction that has to wait is still done before a load that was ordered after it."""
    rig.load("a/1", **files(1))
    with slowly(rig):
        rig.loader.submit(EvictModel("slow/1"))
        rig.loader.submit(command("a/2", **files(2)))
    assert [type(rig.event()) for _ in range(3)] == [ModelLoaded, ModelEvicted, ModelLoaded]


def test_what_is_under_way_is_finished(files, slowly):
    """The end waits for loads that came before it."""
    rig = Rig()
    with slowly(rig):
        rig.loader.finish()
    assert isinstance(rig.event(), ModelLoaded)
    rig.end()


def test_a_load_that_is_repeated_is_answered_again(rig, files):
    """A command may be sent twice."""
    assert rig.load("a/1", **files(1)) == rig.load("a/1", **files(1))


# --- tiers --------------------------------------------------------------------------------


def test_a_held_model_comes_from_the_hosts_memory(rig, files):
    """It needs its file no more; the answer says where the weights came from."""
    held = rig.load("a/1", **files(1), tier="host")
    assert (held.tier, held.weights_bytes) == ("host", 512)
    assert rig.memory.host_bytes == 512
    loaded = rig.load("a/1", **files(1), keep_host=True)
    assert (loaded.tier, loaded.source) == ("device", "host")
    assert rig.run("a/1").tolist() == [[2.0] * 4]
    rig.evict("a/1")
    assert rig.load("a/1", **files(1), keep_host=True).source == "host"
    rig.evict("a/1", "host")
    assert rig.run("a/1").tolist() == [[2.0] * 4]
    assert rig.memory.host_bytes == 0


def test_a_model_with_its_own_module_holds_nothing(rig, files):
    """It comes from the disk each time, and says so."""
    held = rig.load("w/1", path=files(1)["path"], tier="host")
    assert isinstance(held, ModelLoaded)
    assert (held.tier, held.weights_bytes, rig.memory.host_bytes) == ("host", 0, 0)
    assert rig.load("w/1", path=files(1)["path"], keep_host=True).source == "disk"
    rig.evict("w/1", "host")


def test_the_bytes_that_are_reserved_and_empty_are_told(rig, files):
    """So whoever measures the device from outside can tell models from room for them."""
    rig.load("a/1", **files(1))
    taken = rig.memory.spare_bytes
    rig.evict("a/1")
    assert rig.memory.spare_bytes == taken + 512


# --- room ---------------------------------------------------------------------------------


def test_modules_and_blocks_share_one_budget(rig, files):
    """What is loaded whole takes room from what is not, and gives it back."""
    forty = files(40, models.Weights)
    assert rig.load("whole/1", path=forty["path"]).architecture == "none"
    refused = rig.load("placed/1", **forty)
    assert (type(refused), refused.code) == (LoadFailed, "resource_exhausted")
    rig.evict("whole/1")
    assert isinstance(rig.load("placed/1", **forty), ModelLoaded)
    refused = rig.load("whole/1", path=forty["path"])
    assert (type(refused), refused.code) == (LoadFailed, "resource_exhausted")
    free = BUDGET_BYTES - (40 << 20)
    assert refused.message.endswith(f"{free:,} are free")
    rig.evict("placed/1")
    assert isinstance(rig.load("whole/1", path=forty["path"]), ModelLoaded)


def test_room_for_batches_is_not_reserved_for_weights(rig, files):
    """The workspace that was measured stays free, also after the model that needed it is gone
    and another of its architecture comes."""
    rig.load("a/1", **files(1))
    rig.dispatcher.residents["a/1"].workspace_bytes = 30 << 20
    forty = files(40, models.Weights)
    assert rig.load("m/1", **forty).code == "resource_exhausted"
    rig.evict("a/1")
    assert isinstance(rig.load("m/1", **forty), ModelLoaded)
    assert rig.load("a/2", **files(2)).code == "resource_exhausted"
    rig.evict("m/1")
    assert isinstance(rig.load("a/2", **files(2)), ModelLoaded)


def test_a_load_that_fails_takes_nothing(rig, files, tmp_path):
    """Neither room nor a place among the residents."""
    file = files(40, models.Weights)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(Path(file["path"]).read_bytes()[: 20 << 20])
    assert isinstance(rig.load("m/1", **file), ModelLoaded)
    rig.evict("m/1")
    for _ in range(3):
        failed = rig.load("m/2", cut, layout=file["layout"])
        assert (type(failed), failed.code) == (LoadFailed, "model_failed")
        assert "cut short" in failed.message
    assert not rig.dispatcher.residents
    assert isinstance(rig.load("m/1", **file), ModelLoaded)


def test_a_layout_that_is_not_true_costs_only_time(rig, files):
    """A file that is not what its layout says is loaded as it is."""
    loaded = rig.load("m/1", files(1)["path"], layout=files(40, models.Weights)["layout"])
    assert isinstance(loaded, ModelLoaded)
    assert rig.run("m/1").tolist() == [[2.0] * 4]


def test_a_manifest_that_does_not_suit_fails_before_anything_is_copied(rig, files):
    """The program is asked first."""
    rig.load("a/1", **files(1))
    listed = (spec("x", "FP32", -1), spec("y", "FP32", -1))
    failed = rig.load("a/2", **files(2), inputs=listed)
    assert failed.code == "model_failed"
    assert failed.message.startswith("the manifest does not suit the file")


def test_equal_weights_are_kept_once_where_that_is_wanted(files):
    """With sharing, the same file under two names takes its bytes once."""
    file = files(40, models.Weights)
    for share in (True, False):
        rig = Rig(share=share)
        assert isinstance(rig.load("m/1", **file), ModelLoaded)
        assert isinstance(rig.load("m/2", **file), ModelLoaded if share else LoadFailed)
        rig.end()


def test_a_device_that_is_lost_in_a_load_is_told(files, tmp_path):
    """Nothing can run any more: the thread says so instead of answering."""
    rig = Rig(device=LostDevice())
    rig.loader.submit(command("m/1", tmp_path / "gone.pt"))
    assert "cannot read" in str(rig.lost.get(timeout=DEADLINE_S))
