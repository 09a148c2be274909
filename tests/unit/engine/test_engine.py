from __future__ import annotations

import importlib.util
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from services.worker.wire import (  # noqa: E402
    BatchRan,
    EngineFailed,
    EvictModel,
    LoadFailed,
    ModelLoaded,
    Release,
    Stop,
    WarmUp,
)
from shared.tensors import Tensor, from_numpy  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine.engine_harness import ROOT, EngineProcess, command, spec  # noqa: E402

pytestmark = pytest.mark.torch

BUDGET_BYTES = 100 << 20
OUTBOX_BYTES = 1 << 16


@pytest.fixture(scope="module")
def engine():
    """One engine for the whole file: importing torch takes seconds."""
    with EngineProcess(budget_bytes=BUDGET_BYTES, outbox_bytes=OUTBOX_BYTES) as engine:
        started = engine.started()
        assert started.device_kind == "cpu"
        assert started.base_bytes > 50 << 20
        assert started.capacity_bytes > started.base_bytes
        assert started.torch_version == torch.__version__
        yield engine


@pytest.fixture
def loaded(engine, tmp_path):
    """Loads a module under the name of its class, and takes it off again after the test."""
    names = []

    def load(module, **options) -> str:
        name = f"{type(module).__name__}/1"
        event = engine.load(name, models.save(module, tmp_path / "model.pt"), **options)
        assert isinstance(event, ModelLoaded), event
        names.append(name)
        return name

    yield load
    for name in names:
        engine.evict(name)


def rows(count: int, width=4) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


# --- answers ------------------------------------------------------------------------------


def test_a_batch_is_answered_with_what_the_model_computes(engine, loaded):
    """Inputs go in by the name of the argument, outputs come back under `OUTPUT__<n>`."""
    name = loaded(models.Linear())
    outputs = engine.run(name, {"x": rows(2)}, rows=2)
    np.testing.assert_allclose(outputs["OUTPUT__0"], [[13.0] * 3, [45.0] * 3])


def test_the_keys_of_a_dict_name_the_outputs(engine, loaded):
    """Without a manifest's names, a model that returns a dict names its outputs itself."""
    outputs = engine.run(loaded(models.DictOutput()), {"x": rows(2)})
    assert sorted(outputs) == ["doubled", "sum"]
    np.testing.assert_allclose(outputs["sum"], [6.0, 22.0])


def test_the_manifest_chooses_among_a_dict(engine, loaded):
    """Keys that the manifest does not list are not sent."""
    name = loaded(models.DictOutput(), outputs=(spec("sum", "FP32", -1),))
    assert list(engine.run(name, {"x": rows(2)})) == ["sum"]


def test_a_named_tuple_names_its_outputs(engine, loaded):
    """The fields of a named tuple serve as names like a dict's keys."""
    outputs = engine.run(loaded(models.NamedOutput()), {"x": rows(1)})
    assert sorted(outputs) == ["first", "second"]


def test_two_outputs_take_the_manifests_names_in_order(engine, loaded):
    """A tuple's values bear the manifest's names; a transposed one arrives row-major."""
    name = loaded(
        models.TwoOutputs(), outputs=(spec("sum", "FP32", -1, 4), spec("difference", "FP32", 4, -1))
    )
    outputs = engine.run(name, {"b": np.ones((2, 4), np.float32), "a": rows(2)})
    np.testing.assert_allclose(outputs["sum"], rows(2) + 1)
    np.testing.assert_allclose(outputs["difference"], (rows(2) - 1).T)


def test_inputs_may_be_counted_instead_of_named(engine, loaded):
    """Triton's `INPUT__0`, `INPUT__1` are the arguments in order."""
    outputs = engine.run(
        loaded(models.TwoOutputs()), {"in__1": np.ones((1, 4), np.float32), "in__0": rows(1)}
    )
    np.testing.assert_allclose(outputs["OUTPUT__1"], (rows(1) - 1).T)


def test_inputs_under_the_manifests_own_names_follow_its_order(engine, loaded):
    """Names of neither kind are told by their place in the manifest."""
    inputs = (spec("left", "FP32", -1, 4), spec("right", "FP32", -1, 4))
    name = loaded(models.TwoOutputs(), inputs=inputs)
    outputs = engine.run(name, {"right": np.ones((1, 4), np.float32), "left": rows(1)})
    np.testing.assert_allclose(outputs["OUTPUT__0"], rows(1) + 1)


def test_scalar_arguments_come_from_one_element_tensors(engine, loaded):
    """An int, float or bool argument takes the one element of its input, or its default."""
    name = loaded(models.Counter(), stateful=True)
    assert engine.run(name, {"step": [3]})["OUTPUT__0"] == [3.0]
    outputs = engine.run(
        name, {"step": np.array([[2]]), "scale": np.float32([0.5]), "negate": [True]}
    )
    assert outputs["OUTPUT__0"] == [-2.5]


def test_rows_that_share_a_scalar_may_share_a_batch(engine, loaded):
    """Several requests' equal scalars are one scalar; different ones cannot run as one call."""
    name = loaded(models.Counter(), stateful=True)
    assert engine.run(name, {"step": [4, 4]})["OUTPUT__0"] == [4.0]
    failed = engine.refused(name, {"step": [4, 5]})
    assert (failed.code, failed.message) == (
        "invalid_argument",
        "input 'step' takes one value, not 2",
    )


@pytest.mark.parametrize("stateful", [True, False])
def test_a_model_keeps_what_it_was_given(engine, loaded, stateful):
    """What a model keeps of its inputs does not change when the inbox is written again, were it
    only for the sake of the others, whose bytes it would see: so also without a word of it."""
    name = loaded(models.Keeper(), stateful=stateful)
    engine.run(name, {"x": np.float32([1, 2])})
    outputs = engine.run(name, {"x": np.float32([3, 4])})
    np.testing.assert_allclose(outputs["OUTPUT__0"], [1, 2])


def test_texts_go_in_and_out(engine, loaded):
    """BYTES becomes a list of strings, or one string, and a list of strings becomes BYTES."""
    name = loaded(models.Texts())
    texts = np.array(["grün", ""], dtype=object)
    outputs = engine.run(name, {"texts": texts, "prefix": np.array(["> "], dtype=object)})
    assert outputs["OUTPUT__0"].tolist() == ["> GRüN".encode(), b"> "]
    failed = engine.refused(name, {"texts": np.array([b"\xff"], dtype=object)})
    assert failed.message == "input 'texts' takes UTF-8 text"


def test_an_optional_tensor_may_be_left_out(engine, loaded):
    """`Optional[Tensor]` is None when no request names it."""
    name = loaded(models.MaybeMask())
    np.testing.assert_allclose(engine.run(name, {"x": rows(1)})["OUTPUT__0"], rows(1))
    masked = engine.run(name, {"x": rows(1), "mask": rows(1)})
    np.testing.assert_allclose(masked["OUTPUT__0"], rows(1) ** 2)


def test_numbers_come_back_as_tensors_without_dimensions(engine, loaded):
    """int, float and bool results become INT64, FP64 and BOOL; None is no output."""
    outputs = engine.run(loaded(models.Scalars()), {"x": rows(1)})
    assert [outputs[f"OUTPUT__{n}"].shape for n in range(3)] == [()] * 3
    assert [outputs[f"OUTPUT__{n}"].item() for n in range(3)] == [4, 6.0, True]
    assert len(outputs) == 3


@pytest.mark.parametrize(
    "tensor",
    [
        *(
            from_numpy("x", np.array([[0, 1], [2, 100]]), datatype)
            for datatype in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32",
                             "UINT64", "FP16", "FP32", "FP64")
        ),
        from_numpy("x", np.array([0.5, -2.0, 1e30], np.float32), "BF16"),
        from_numpy("x", np.array([True, False, True])),
        from_numpy("x", np.zeros((0, 3), np.float32)),
        from_numpy("x", np.array(5, np.int64)),
    ],
    ids=lambda tensor: f"{tensor.datatype}{list(tensor.shape)}",
)  # fmt: skip
def test_every_datatype_survives_the_round_trip(engine, loaded, tensor):
    """What the model hands through arrives bit for bit as it was sent."""
    name = loaded(models.Identity())
    engine.submit(name, {"x": tensor})
    event = engine.answer()
    assert isinstance(event, BatchRan), event
    (output,) = engine.outputs(event).values()
    assert (output.datatype, output.shape) == (tensor.datatype, tensor.shape)
    assert output.data == bytes(tensor.data)


def test_any_byte_is_a_bool(engine, loaded):
    """Bytes other than 0 and 1 are true, and come back as 1."""
    name = loaded(models.Identity())
    engine.submit(name, {"x": Tensor("x", "BOOL", (3,), b"\x00\x02\xff")})
    (output,) = engine.outputs(engine.answer()).values()
    assert output.data == b"\x00\x01\x01"


def test_silero_vad_runs_as_it_is_shipped(engine):
    """A third party's scripted file with state and an int argument needs nothing but its bytes."""
    found = importlib.util.find_spec("silero_vad")
    if found is None:
        pytest.skip("silero-vad is not installed")
    path = Path(found.origin).parent / "data" / "silero_vad.jit"
    event = engine.load("vad/1", path, stateful=True)
    assert isinstance(event, ModelLoaded), event
    assert event.inputs == ()
    assert 2_000_000 < event.weights_bytes < 3_000_000
    chunk = np.sin(np.arange(512, dtype=np.float32))[None]
    outputs = engine.run("vad/1", {"x": chunk, "sr": [16000]})
    assert outputs["OUTPUT__0"].shape == (1, 1)
    assert 0 <= outputs["OUTPUT__0"].item() <= 1
    failed = engine.refused("vad/1", {"x": chunk[:, :100], "sr": [16000]})
    assert failed.code == "model_failed"
    assert "too short" in failed.message
    engine.evict("vad/1")


# --- refusals -----------------------------------------------------------------------------


def test_the_models_own_error_is_told_without_its_source(engine, loaded):
    """The caller sees the exception and not the program."""
    name = loaded(models.Raising())
    failed = engine.refused(name, {"x": np.float32([1])})
    assert failed.code == "model_failed"
    assert failed.message == "builtins.ValueError: positive sums are not for me"
    engine.run(name, {"x": np.float32([-1])})


def test_a_shape_that_the_model_cannot_take_is_the_models_error(engine, loaded):
    """torch's words about a wrong shape come through in one line."""
    failed = engine.refused(loaded(models.Linear()), {"x": rows(2, 5)})
    assert failed.code == "model_failed"
    assert failed.message == "RuntimeError: mat1 and mat2 shapes cannot be multiplied (2x5 and 4x3)"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"a": [1.0]}, "input 'b' is missing; the model takes a (tensor), b (tensor)"),
        ({"a": [1.0], "c": [1.0]}, "no input 'c'; the model takes a (tensor), b (tensor)"),
        ({"a": [1.0], "b": np.array(["x"])}, "input 'b' takes no BYTES"),
        ({"x__0": [1.0], "x__7": [1.0]}, "no input 'x__7'; the model takes"),
    ],
)
def test_wrong_inputs_are_refused_by_name(engine, loaded, inputs, message):
    """Unknown and missing inputs are the caller's fault, and the answer names what is expected."""
    failed = engine.refused(loaded(models.TwoOutputs()), inputs)
    assert failed.code == "invalid_argument"
    assert failed.message.startswith(message)


def test_a_batch_that_loses_its_rows_is_refused(engine, loaded):
    """Outputs of a batching model are split by their first dimension, so they must keep it."""
    name = loaded(models.ForgetsRows(), max_batch_size=8)
    failed = engine.refused(name, {"x": rows(3)}, rows=3)
    assert failed.code == "model_failed"
    assert failed.message == (
        "output 'OUTPUT__0' does not keep the batch dimension: it has shape [4] for 3 rows"
    )


def test_a_model_that_does_not_batch_may_return_any_shape(engine, loaded):
    """Without batching nothing is split, and no dimension is looked at."""
    assert engine.run(loaded(models.ForgetsRows()), {"x": rows(3)})["OUTPUT__0"].shape == (4,)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (models.Nested, "output 'OUTPUT__1' is a list; a model returns a tensor, or a tuple"),
        (models.Complex, "output 'OUTPUT__0' is complex64 (strided), which no reply can carry"),
    ],
)
def test_what_no_reply_can_carry_is_the_models_failure(engine, loaded, module, message):
    """Nested results and datatypes without a name in the protocol are told clearly."""
    failed = engine.refused(loaded(module()), {"x": rows(1)})
    assert failed.code == "model_failed"
    assert failed.message.startswith(message)


def test_fewer_outputs_than_the_manifest_lists_are_told(engine, loaded):
    """A manifest that promises more than the file returns is named as the reason."""
    listed = (spec("y", "FP32", -1), spec("z", "FP32", -1))
    failed = engine.refused(loaded(models.Identity(), outputs=listed), {"x": rows(1)})
    assert failed.code == "model_failed"
    assert "returned 1 outputs (OUTPUT__0), the manifest lists y, z" in failed.message


def test_outputs_beyond_the_outbox_are_refused(engine, loaded):
    """What could never be handed over fails at once instead of waiting for room."""
    failed = engine.refused(loaded(models.Grows()), {"count": [OUTBOX_BYTES]})
    assert failed.code == "too_large"
    assert "262,144 bytes" in failed.message


def test_memory_that_runs_out_costs_one_batch(engine, loaded):
    """An allocation that fails is told as such, and the next batch runs."""
    name = loaded(models.Grows())
    failed = engine.refused(name, {"count": [1 << 50]})
    assert failed.code == "resource_exhausted"
    assert failed.message.startswith("out of device memory: ")
    assert engine.run(name, {"count": [3]})["OUTPUT__0"].tolist() == [1, 1, 1]


def test_a_model_that_is_not_loaded_is_not_found(engine):
    """A batch for an absent model is answered, not dropped."""
    failed = engine.refused("absent/3", {"x": rows(1)})
    assert (failed.code, failed.message) == (
        "not_found",
        "absent/3 is not loaded on this worker",
    )


# --- the outbox ---------------------------------------------------------------------------


def test_a_full_outbox_waits_for_release(engine, loaded):
    """A batch whose outputs find no room is answered once earlier ones are given back."""
    name = loaded(models.Grows())
    count = OUTBOX_BYTES // 4 - 64
    engine.submit(name, {"count": [count]})
    engine.submit(name, {"count": [count]})
    first = engine.answer()
    assert engine.used_bytes() > 0  # the reader still listens; the second batch waits
    engine.send(Release((first.batch,)))
    second = engine.answer()
    assert second.batch == first.batch + 1
    assert second.compute_s < 1
    engine.outputs(second)


def test_batches_are_answered_in_order(engine, loaded):
    """Answers come in the order of the batches, whichever model they are for."""
    quick, slow = loaded(models.Identity()), loaded(models.Linear())
    batches = [engine.submit((quick, slow)[n % 2], {"x": rows(1)}) for n in range(20)]
    answers = [engine.answer() for _ in batches]
    assert [each.batch for each in answers] == batches
    engine.send(Release(tuple(batches)))


# --- loading ------------------------------------------------------------------------------


def test_warm_up_measures_time_and_workspace(engine, tmp_path):
    """With known inputs each batch size is run before the model is called loaded."""
    path = models.save(models.Linear(), tmp_path / "m.pt")
    inputs = (spec("x", "FP32", -1, 4),)
    warm = (WarmUp(1), WarmUp(4096))
    event = engine.load("warm/1", path, warm, inputs=inputs, max_batch_size=4096)
    assert isinstance(event, ModelLoaded), event
    one, many = event.cases
    assert (one.rows, many.rows) == (1, 4096)
    assert many.workspace_bytes > 512 << 10  # 4096 times 16 rows of 3 floats are 786 KB
    assert 0 < one.seconds < event.load_seconds
    assert event.inputs == inputs
    assert event.weights_bytes == 128  # 12 and 3 floats, each in a storage of whole 64 bytes
    engine.evict("warm/1")


def test_the_peak_of_a_batch_is_measured_once(engine, loaded):
    """The first batch tells what it took beyond the weights; one of no greater inputs does not
    cost a measurement again."""
    name = loaded(models.Grows())
    events = []
    for _ in range(2):
        engine.submit(name, {"count": [10_000_000], "give": [False]})
        events.append(engine.answer())
        engine.outputs(events[-1])
    assert 37 << 20 < events[0].workspace_bytes < 44 << 20
    assert events[1].workspace_bytes == 0
    assert events[0].compute_s > 0


def test_a_failed_warm_up_does_not_fail_the_load(engine, tmp_path):
    """Zeros may not suit a model: it is loaded, and not measured."""
    path = models.save(models.Linear(), tmp_path / "m.pt")
    event = engine.load("cold/1", path, (WarmUp(1),), inputs=(spec("x", "FP32", -1, 5),))
    assert isinstance(event, ModelLoaded), event
    assert event.cases == ()
    assert "warm-up of cold/1 with 1 rows failed: RuntimeError: mat1" in engine.errors()
    engine.evict("cold/1")


def test_a_stateful_model_is_not_warmed_up(engine, tmp_path):
    """Zeros would be part of its state."""
    path = models.save(models.Counter(), tmp_path / "m.pt")
    event = engine.load(
        "count/1", path, (WarmUp(1),), inputs=(spec("step", "INT64", 1),), stateful=True
    )
    assert event.cases == ()
    engine.evict("count/1")


def test_scalars_that_the_manifest_leaves_out_are_reported(engine, tmp_path):
    """The file's schema adds what it knows for certain; a tensor's datatype it does not know."""
    path = models.save(models.Counter(), tmp_path / "m.pt")
    event = engine.load("count/1", path)
    assert [(each.name, each.datatype, each.optional) for each in event.inputs] == [
        ("step", "INT64", False),
        ("scale", "FP64", True),
        ("negate", "BOOL", True),
    ]
    engine.evict("count/1")


@pytest.mark.parametrize("stateful", [False, True])
def test_what_does_not_fit_the_budget_is_refused_with_numbers(engine, tmp_path, stateful):
    """Before anything is loaded, whether the weights are placed or the file is loaded whole."""
    files = []
    for n in range(2):
        path = models.save(models.Weights(60, 100.0 * n), tmp_path / f"{n}.pt")
        files.append({"path": path, "layout": models.layout_of(path), "stateful": stateful})
    assert isinstance(engine.load("big/1", **files[0]), ModelLoaded)
    before = engine.used_bytes()
    refused = engine.load("big/2", **files[1])
    assert isinstance(refused, LoadFailed)
    assert refused.code == "resource_exhausted"
    assert refused.message.startswith("no room ")
    assert f"needs {60 << 20:,} bytes" in refused.message
    if stateful:
        assert f"{BUDGET_BYTES - (60 << 20):,} are free" in refused.message
    assert engine.used_bytes() - before < 8 << 20
    engine.evict("big/1")
    assert isinstance(engine.load("big/2", **files[1]), ModelLoaded)
    engine.evict("big/2")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"nonsense", "not a zip archive, so not TorchScript"), (None, "cannot read ")],
)
def test_a_file_that_is_no_model_is_refused(engine, tmp_path, content, message):
    """A damaged or missing file costs one answer."""
    path = tmp_path / "m.pt"
    if content is not None:
        path.write_bytes(content)
    refused = engine.load("broken/1", path)
    assert refused.code == "model_failed"
    assert refused.message.startswith(message)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (models.NoForward, "the module has no forward method"),
        (models.Dictionary, "forward's argument 'x' is of type Dict[str, Tensor], which no"),
    ],
)
def test_a_module_that_no_request_can_call_is_refused(engine, tmp_path, module, message):
    """What could never answer is told at the load and not at each request."""
    refused = engine.load("uncallable/1", models.save(module(), tmp_path / "m.pt"))
    assert refused.code == "model_failed"
    assert refused.message.startswith(message)


def test_a_manifest_that_lists_too_much_is_refused(engine, tmp_path):
    """Inputs that forward does not take could only ever fail."""
    path = models.save(models.Identity(), tmp_path / "m.pt")
    listed = (spec("x", "FP32", -1), spec("y", "FP32", -1))
    refused = engine.load("listed/1", path, inputs=listed)
    assert refused.code == "model_failed"
    assert refused.message == (
        "the manifest does not suit the file: no input 'y'; the model takes x (tensor, optional)"
    )


def test_loading_and_evicting_twice_changes_nothing(engine, tmp_path):
    """Both are answered as the first time, so a command may be repeated."""
    path = models.save(models.Linear(), tmp_path / "m.pt")
    assert engine.load("twice/1", path) == engine.load("twice/1", path)
    engine.evict("twice/1")
    engine.evict("twice/1")
    assert engine.refused("twice/1", {"x": rows(1)}).code == "not_found"


def test_eviction_gives_the_bytes_back(engine, tmp_path):
    """After many loads and evictions the process is as small as after the first."""
    path = models.save(models.Weights(40), tmp_path / "big.pt")

    def cycle() -> int:
        event = engine.load("churn/1", path)
        assert isinstance(event, ModelLoaded), event
        assert event.weights_bytes == 40 << 20
        engine.run("churn/1", {"x": rows(1)})
        assert engine.used_bytes() > evicted + (36 << 20)
        engine.evict("churn/1")
        return engine.used_bytes()

    evicted = 0
    evicted = cycle()
    sizes = [cycle() for _ in range(30)]
    assert max(sizes) - evicted < 2 << 20


# --- swapping -----------------------------------------------------------------------------

IDS = np.arange(40).reshape(4, 10)


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Files of one architecture, with what torch itself answers."""
    folder = tmp_path_factory.mktemp("nets")

    def make(seed: int, width=32):
        path = models.save(models.Net(seed, width), folder / f"{seed}-{width}.pt")
        options = {"path": path, "layout": models.layout_of(path)}
        return options, models.answer(path, torch.from_numpy(IDS)).numpy()

    return make


@pytest.fixture
def swapper():
    """An engine with room for many in the host's memory and for few on the device."""
    with EngineProcess(budget_bytes=48 << 20, host_bytes=64 << 20) as engine:
        engine.started()
        yield engine


def test_every_swap_is_bit_equal_to_torch(swapper, nets):
    """Whatever way a model's weights came, its answer is that of a plain load."""
    made = {f"net/{n + 1}": nets(n) for n in range(4)}
    for name, (file, _) in made.items():
        assert isinstance(swapper.hold(name, **file), ModelLoaded)
    seen = set()
    for round_ in range(3):
        for name, (file, expected) in made.items():
            event = swapper.load(name, **file, keep_host=round_ == 1)
            seen.add((event.architecture, event.source))
            for other in made:  # all that are there, one after the other
                if other <= name:
                    got = swapper.run(other, {"ids": IDS})["OUTPUT__0"]
                    assert got.tobytes() == made[other][1].tobytes()
            assert expected.any()
        for name in made:
            swapper.evict(name)
        if round_ == 1:
            swapper.evict("net/1", "host")
    assert seen == {("new", "host"), ("known", "host"), ("known", "disk")}


def test_what_the_host_cannot_hold_is_refused_with_numbers(swapper, tmp_path):
    """The agent decides who has to go; the engine only says that there is no room."""
    file = {}
    for n in range(2):
        path = models.save(models.Weights(40, 100.0 * n), tmp_path / f"{n}.pt")
        file[n] = {"path": path, "layout": models.layout_of(path)}
    assert isinstance(swapper.hold("m/1", **file[0]), ModelLoaded)
    refused = swapper.hold("m/2", **file[1])
    assert (type(refused), refused.code) == (LoadFailed, "resource_exhausted")
    assert f"{40 << 20:,}" in refused.message
    assert swapper.memory.host_bytes == 40 << 20
    swapper.evict("m/1", "host")
    assert isinstance(swapper.hold("m/2", **file[1]), ModelLoaded)
    assert isinstance(swapper.load("m/2", **file[1], keep_host=True), ModelLoaded)
    swapper.evict("m/2")
    assert swapper.memory.host_bytes == 40 << 20


def test_batches_run_while_models_come_and_go(swapper, nets):
    """A busy model's answers are right whatever is loaded, swapped and evicted beside it."""
    (busy, expected), *others = (nets(n) for n in range(4))
    other_kind, _ = nets(9, width=16)
    swapper.load("busy/1", **busy)
    for turn in range(5):
        batches = [swapper.submit("busy/1", {"ids": IDS}) for _ in range(20)]
        for n, (file, _) in enumerate(others):
            swapper.send(command(f"net/{n + 1}", **file, tier="device" if turn % 2 else "host"))
        swapper.send(command("kind/1", **other_kind))
        swapper.send(EvictModel("kind/1"))
        for batch in batches:
            event = swapper.answer()
            assert event.batch == batch
            (output,) = swapper.outputs(event).values()
            assert output.data == expected.tobytes()
        loads = [swapper.event() for _ in range(len(others) + 2)]
        assert not any(isinstance(each, LoadFailed) for each in loads)
        for n in range(len(others)):
            swapper.evict(f"net/{n + 1}", "device" if turn % 2 else "host")


def test_what_is_measured_is_what_models_take(swapper, nets, tmp_path):
    """The engine's own measure, less what it reserves, is the sum of the weights: within a few
    per cent, whatever has come and gone."""
    before = swapper.used_bytes() - swapper.memory.spare_bytes
    total = 0
    for n in range(4):
        path = models.save(models.Weights(10, 100.0 * n), tmp_path / f"{n}.pt")
        file = {"path": path, "layout": models.layout_of(path)}
        swapper.hold(f"m/{n + 1}", **file)
        total += swapper.load(f"m/{n + 1}", **file, keep_host=True).weights_bytes
        swapper.run(f"m/{n + 1}", {"x": rows(1)})
    swapper.evict("m/2")
    total -= 10 << 20
    measured = swapper.used_bytes() - swapper.memory.spare_bytes - before
    assert abs(measured - total) < 0.1 * total


def test_the_system_gets_what_models_have_left(swapper, tmp_path):
    """A while after the last eviction, of both tiers, the process itself is as small as before:
    nothing stays reserved."""
    before = swapper.resident_bytes()
    for n in range(3):
        path = models.save(models.Weights(12, 100.0 * n), tmp_path / f"{n}.pt")
        file = {"path": path, "layout": models.layout_of(path)}
        assert isinstance(swapper.load(f"m/{n + 1}", **file, keep_host=True), ModelLoaded)
    assert swapper.resident_bytes() > before + (2 * 36 << 20)
    for n in range(3):
        swapper.evict(f"m/{n + 1}")
        swapper.evict(f"m/{n + 1}", "host")
    memory = swapper.settled()
    assert (memory.spare_bytes, memory.host_bytes, memory.host_spare_bytes) == (0, 0, 0)
    assert swapper.resident_bytes() < before + (12 << 20)


def test_swaps_leave_nothing_behind(swapper, nets):
    """After hundreds of loads and evictions, of one architecture and of many, the process is as
    small as after the first."""
    several = [nets(n, width)[0] for n in range(2) for width in (8, 16, 24, 32, 40, 48, 56)]

    def cycle() -> int:
        for n, file in enumerate(several):
            event = swapper.load(f"net/{n + 1}", **file, keep_host=True)
            assert isinstance(event, ModelLoaded), event
            swapper.run(f"net/{n + 1}", {"ids": IDS})
        for n, _ in enumerate(several):
            swapper.evict(f"net/{n + 1}")
            swapper.evict(f"net/{n + 1}", "host")
        return swapper.used_bytes() - swapper.memory.spare_bytes

    cycle()
    first, *sizes = [cycle() for _ in range(30)]
    assert max(sizes) - first < 4 << 20


# --- endings ------------------------------------------------------------------------------


@pytest.fixture
def young_engine():
    """An engine of the test's own, to be ended by it."""
    with EngineProcess() as engine:
        engine.started()
        yield engine


def test_stop_ends_the_engine_after_what_is_under_way(young_engine, tmp_path):
    """Loads and batches that came before `Stop` are answered; then the engine ends well."""
    path = models.save(models.Identity(), tmp_path / "m.pt")
    young_engine.load("last/1", path)
    for _ in range(3):
        young_engine.submit("last/1", {"x": rows(1)})
    young_engine.send(Stop())
    answers = [young_engine.answer() for _ in range(3)]
    assert all(isinstance(each, BatchRan) for each in answers)
    assert young_engine.exit_code() == 0


def test_the_engine_ends_with_its_agent_and_not_with_a_signal(young_engine):
    """A signal to the whole group takes no batch away; the end of the socket ends the engine."""
    young_engine.kill(signal.SIGTERM)
    young_engine.kill(signal.SIGINT)
    assert young_engine.used_bytes() > 0
    young_engine.sock.close()
    young_engine.batch_sock.close()
    assert young_engine.exit_code() == 0


def test_the_engine_does_not_outlive_a_killed_agent():
    """An agent that is killed, and can say nothing, takes its engine with it."""
    script = (
        "import os; from tests.unit.engine.engine_harness import EngineProcess;"
        "engine = EngineProcess(); engine.started(); print(engine.process.pid, flush=True);"
        "os.read(0, 1)"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    with agent:
        engine = os.pidfd_open(int(agent.stdout.readline()))
        agent.kill()
        ended, _, _ = select.select([engine], [], [], 10)
        os.close(engine)
    assert ended


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00hi"])
@pytest.mark.parametrize("which", ["sock", "batch_sock"])
def test_a_corrupted_frame_ends_the_engine(young_engine, which, garbage):
    """After bytes that are no command nothing can be understood: the exit code says so."""
    getattr(young_engine, which).sendall(garbage)
    assert young_engine.exit_code() == 71
    assert "no command" in young_engine.errors()


@pytest.mark.parametrize("device", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_told(device):
    """The engine says why it cannot begin, and ends."""
    with EngineProcess(device=device) as engine:
        failed = engine.event()
        assert isinstance(failed, EngineFailed)
        assert failed.message
        assert engine.exit_code() == 70


def test_the_engine_needs_no_environment(engine):
    """It runs with a path and nothing else, so no credential can reach a model's code."""
    environ = Path(f"/proc/{engine.process.pid}/environ").read_bytes().split(b"\0")
    assert {each.split(b"=")[0] for each in environ if each} == {b"PATH", b"LANG", b"TMPDIR"}
    assert os.environ.get("PATH")
