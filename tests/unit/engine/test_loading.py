from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.executor import FORMATS, ExecutorFormat  # noqa: E402
from services.worker.engine.programs import Skeleton  # noqa: E402
from services.worker.wire import (  # noqa: E402
    EvictModel,
    LoadFailed,
    ModelEvicted,
    ModelLoaded,
    WarmUp,
)
from shared.models import Padding  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine.engine_harness import command, spec  # noqa: E402
from tests.unit.engine.loader_harness import (  # noqa: E402
    BUDGET_BYTES,
    DEADLINE_S,
    Counted,
    LostDevice,
    Rig,
)

pytestmark = pytest.mark.torch

X = (spec("x", "FP32", -1, 4),)


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


def test_only_what_no_other_model_has_run_is_run(rig, files):
    """A second model with other sizes or more rows is measured for these, before it is loaded,
    and told what the first one knows of the rest."""
    options = {"inputs": (spec("ids", "INT64", -1),), "max_batch_size": 8}
    asks = [
        ({}, (WarmUp(1), WarmUp(2))),
        ({}, (WarmUp(1), WarmUp(8))),
        ({"padding": Padding(inputs={"ids": 0}, sizes=(2, 4))}, (WarmUp(1, 4), WarmUp(2, 4))),
        ({}, (WarmUp(2), WarmUp(8))),
    ]
    loaded, counts = [], []
    for n, (more, warm) in enumerate(asks):
        before = rig.dispatcher.ran
        file = files(n, models.Net)
        loaded.append(rig.load(f"a/{n + 1}", **file, **options, **more, warm=warm))
        counts.append(rig.dispatcher.ran - before)
        assert [(each.rows, each.size) for each in loaded[-1].cases] == [
            (each.rows, each.size) for each in warm
        ]
    assert counts == [4, 2, 4, 0]  # two runs each
    assert loaded[1].cases[0] == loaded[0].cases[0]
    assert loaded[3].cases == (loaded[0].cases[1], loaded[1].cases[1])


def test_what_failed_is_not_run_again(rig, files):
    """Zeros did not suit the program, nor will they suit it for another model."""
    options = {"inputs": (spec("x", "FP32", 5),), "max_batch_size": 4, "warm": (WarmUp(1),)}
    assert rig.load("a/1", **files(1), **options).cases == ()
    before = rig.dispatcher.ran
    assert rig.load("a/2", **files(2), **options).cases == ()
    assert rig.dispatcher.ran == before


def test_only_the_first_call_of_a_program_is_beside_the_batches(rig, files, monkeypatch):
    """It is slow, and nobody else runs the program yet; all others take their turn."""
    calls = []

    class Recorded:
        schema = ()

        def __init__(self, *_):
            pass

        def run(self, inputs):
            calls.append((inputs[0][1].shape[0], rig.dispatcher.calling))
            return inputs[0][1]

        def weights_bytes(self, granule):
            return 1 << 20

        def close(self):
            pass

    monkeypatch.setitem(FORMATS, "export", ExecutorFormat(lambda file: 1 << 20, Recorded))
    monkeypatch.setattr("services.worker.engine.loading.merge", lambda schema, inputs: inputs)
    options = {"inputs": X, "max_batch_size": 4, "warm": (WarmUp(1), WarmUp(4))}
    assert len(rig.load("e/1", files(0)["path"], format="export", **options).cases) == 2
    assert calls == [(1, False), (1, True), (1, True), (4, True), (4, True)]


def test_a_known_program_is_only_run_in_turn(rig, files, monkeypatch):
    """What was not measured yet of a program that is in use is run between the batches."""
    options = {"inputs": X, "max_batch_size": 4}
    calls = []
    run = Skeleton.run

    def recorded(self, arguments):
        calls.append(rig.dispatcher.calling)
        return run(self, arguments)

    monkeypatch.setattr(Skeleton, "run", recorded)
    rig.load("a/1", **files(1), **options, warm=(WarmUp(1),))
    assert calls == [False, True, True]
    rig.load("a/2", **files(2), **options, warm=(WarmUp(4),))
    assert calls[3:] == [True, True]


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


def test_a_loads_answer_is_final(slowly, monkeypatch):
    """What goes wrong in a command that waited for the load does not fail the load: it ends the
    engine, which cannot know what has become of its memory."""
    rig = Rig()
    with slowly(rig):
        monkeypatch.setattr(FORMATS["export"].load, "close", lambda self: 1 / 0)
        rig.loader.submit(EvictModel("slow/1"))
    assert isinstance(rig.event(), ModelLoaded)
    assert isinstance(rig.lost.get(timeout=DEADLINE_S), ZeroDivisionError)
    assert rig.quiet()


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


# --- holds --------------------------------------------------------------------------------


def test_a_hold_that_fails_takes_nothing_off_the_device(rig, files, tmp_path):
    """The model stays what it was, whatever comes after."""
    one = files(1)
    rig.load("a/1", **one)
    failed = rig.load("a/1", tmp_path / "gone.pt", layout=one["layout"], tier="host")
    assert (type(failed), failed.code) == (LoadFailed, "model_failed")
    rig.load("b/1", **files(2))
    assert rig.run("a/1").tolist() == [[2.0] * 4]
    assert rig.run("b/1").tolist() == [[3.0] * 4]
    rig.evict("a/1")
    assert (rig.memory.host_bytes, rig.load("a/1", **one).source) == (0, "disk")


def test_swaps_and_evictions_overtake_holds(rig, files):
    """They wait for one piece of a hold, and not for two files."""
    rig.load("b/1", **files(1), keep_host=True)
    rig.evict("b/1")
    rig.load("c/1", **files(2))
    with rig.busy():
        for n in range(2):
            file = files(12, models.Weights)
            rig.loader.submit(command(f"w/{n + 1}", **file, tier="host"))
        rig.loader.submit(command("b/1", **files(1), keep_host=True))
        rig.loader.submit(EvictModel("c/1"))
    events = [rig.event() for _ in range(4)]
    assert [each.model for each in events] == ["b/1", "c/1", "w/1", "w/2"]
    assert rig.run("b/1").tolist() == [[2.0] * 4]


def test_a_hold_that_somebody_waits_for_comes_first(rig, files):
    """A model that is wanted on the device need not wait for those that nobody wants."""
    with rig.busy():
        for n in range(3):
            rig.loader.submit(command(f"w/{n + 1}", **files(12, models.Weights), tier="host"))
        rig.loader.submit(command("w/3", **files(12, models.Weights), keep_host=True))
    events = [(each.model, each.tier) for each in (rig.event() for _ in range(4))]
    assert events.index(("w/3", "host")) == 0
    assert set(events[1:]) == {("w/3", "device"), ("w/1", "host"), ("w/2", "host")}


def test_a_model_may_leave_the_device_while_it_is_held(rig, files):
    """The one has nothing to do with the other."""
    file = files(12, models.Weights)
    rig.load("w/1", **file)
    with rig.busy():
        rig.loader.submit(command("w/1", **file, tier="host"))
        rig.loader.submit(EvictModel("w/1"))
    assert [type(rig.event()) for _ in range(2)] == [ModelEvicted, ModelLoaded]
    assert rig.memory.host_bytes == 12 << 20
    assert rig.load("w/1", **file).source == "host"


def test_a_hold_of_what_turns_out_unshareable_holds_nothing(rig, files, slowly):
    """Whether it is over by then or in the midst of it."""
    file = files(1, models.Tampers)
    with slowly(rig):
        rig.loader.submit(command("w/1", **file))
        assert rig.load("w/2", **file, tier="host").weights_bytes
    assert [rig.event().model for _ in range(2)] == ["slow/1", "w/1"]
    assert rig.load("w/3", **file, tier="host").weights_bytes == 0
    rig.evict("w/1")
    assert rig.memory.host_bytes == 0


def test_a_failure_is_recovered_from_once(files, tmp_path):
    """A collection and a look at the device cost every batch some time."""
    device = Counted()
    rig = Rig(device=device)
    gone = tmp_path / "gone.pt"
    for options in ({"path": gone, "layout": files(1)["layout"]}, {"path": gone}):
        device.reclaims = 0
        assert isinstance(rig.load("a/1", **options), LoadFailed)
        assert device.reclaims == 1
    rig.end()
