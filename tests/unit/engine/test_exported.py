from __future__ import annotations

import re
import shutil
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.exported import ExportedExecutor, estimate  # noqa: E402
from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.memory import CpuDevice  # noqa: E402
from services.worker.wire import LoadFailed, ModelLoaded, WarmUp  # noqa: E402
from tests.unit.engine import pt2_models as models  # noqa: E402
from tests.unit.engine.engine_harness import EngineProcess, spec  # noqa: E402
from tests.unit.engine.pt2_models import CPU, export, manifest, scattered  # noqa: E402

pytestmark = pytest.mark.torch

ROWS = torch.export.Dim("rows", max=64)
X = torch.arange(64.0).reshape(4, 16) / 64


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """Rows from 1 to 64."""
    path = tmp_path_factory.mktemp("linear") / "model.pt2"
    return export(models.Linear(), X, path=path, dynamic_shapes={"x": {0: ROWS}})


def load(path, **spec) -> ExportedExecutor:
    return ExportedExecutor(scattered(path), manifest(**spec), CPU)


def run(executor, **inputs):
    with torch.inference_mode():
        return executor.run(list(inputs.items()))


def test_the_answer_is_bit_equal_to_the_modules_own(tmp_path):
    """Tied weights, buffers, constants, keywords and a dict: the same numbers as in training's
    process."""
    module = models.Everything().eval()
    mask = torch.ones(4, 16)
    path = export(
        module, X, path=tmp_path / "e.pt2", kwargs={"mask": mask, "scale": 5, "bias": None},
        dynamic_shapes={"x": {0: ROWS}, "mask": {0: ROWS}, "scale": None, "bias": None},
    )  # fmt: skip
    executor = load(path)
    for rows in (1, 2, 7, 64):
        x, mask = torch.randn(rows, 16), torch.randn(rows, 16)
        with torch.inference_mode():
            expected = module(x, mask=mask, scale=5)
        answer = run(executor, mask=mask, x=x)
        assert list(answer) == ["y", "sum"]
        for key, value in expected.items():
            assert torch.equal(answer[key], value)


def test_arguments_have_the_names_of_forward(linear, tmp_path):
    """What was a number or None when it was exported is not asked for."""
    assert [argument.name for argument in load(linear).schema] == ["x"]
    path = export(
        models.Everything(), X, path=tmp_path / "e.pt2", kwargs={"mask": torch.ones(4, 16)}
    )
    assert [(each.name, each.kind) for each in load(path).schema] == [
        ("x", "tensor"), ("mask", "tensor"),
    ]  # fmt: skip
    with pytest.raises(Failed, match="no input 'z'; the model takes x"):
        run(load(linear), z=X)
    assert torch.equal(run(load(linear), INPUT__0=X), run(load(linear), x=X))


def test_a_file_in_several_pieces_is_one_file(linear):
    """Tensors that many models have are kept once, so a file may lie in many."""
    whole = load(linear)
    executor = ExportedExecutor(scattered(linear, pieces=7), manifest(), CPU)
    assert torch.equal(run(executor, x=X), run(whole, x=X))


def test_an_input_that_does_not_suit_is_refused(linear, tmp_path):
    """By datatype, dimensions, fixed and bounded sizes; never a wrong answer."""
    executor = load(linear, max_batch_size=64)
    for bad, told in (
        (X.double(), "FP64 [4, 16]"), (X[0], "FP32 [16]"), (X[:, :8], "FP32 [4, 8]"),
        (torch.ones(65, 16), "FP32 [65, 16]"),
    ):  # fmt: skip
        match = re.escape(f"input 'x' takes FP32 [0…64, 16], not {told}")
        with pytest.raises(Failed, match=match) as caught:
            run(executor, x=bad)
        assert caught.value.code == "invalid_argument"
    with pytest.raises(Failed, match="takes no BYTES"):
        run(executor, x=[b"text"])
    path = export(
        models.Adds(),
        X,
        X,
        path=tmp_path / "a.pt2",
        dynamic_shapes={"x": {0: ROWS}, "y": {0: ROWS}},
    )
    with pytest.raises(Failed, match="do not suit the program") as caught:
        run(load(path), x=X, y=X[:3])
    assert caught.value.code == "invalid_argument"


@pytest.mark.parametrize(
    ("dynamic", "told"), [(None, "4 rows"), ({0: ROWS}, "0…64 rows"),
                          ({0: torch.export.Dim("n", min=4, max=128)}, "4…128 rows")]
)  # fmt: skip
def test_a_manifest_cannot_promise_batches_that_the_program_does_not_take(tmp_path, dynamic, told):
    """Found when it is loaded, and not by the first batch that is too large or too small."""
    path = export(models.Linear(), X, path=tmp_path / "m.pt2", dynamic_shapes={"x": dynamic})
    with pytest.raises(Failed, match=f"made for {told}, the manifest's max_batch_size is 100"):
        load(path, max_batch_size=100)
    assert run(load(path), x=X).shape == (4, 3)


def test_a_manifest_must_describe_the_programs_inputs(linear):
    """Datatype, dimensions and names are compared before anything is served."""
    for inputs, told in (
        ((spec("x", "FP16", 16),), "is FP16 with 2 dimensions, the program takes FP32"),
        ((spec("x", "FP32", 4, 4),), "is FP32 with 3 dimensions"),
        ((spec("a", "FP32", 16), spec("b", "FP32", 16)), "does not suit the file"),
    ):
        with pytest.raises(Failed, match=told):
            load(linear, inputs=inputs, max_batch_size=64)
    named = load(linear, inputs=(spec("pixels", "FP32", 16),), max_batch_size=64)
    assert run(named, pixels=X).shape == (4, 3)


@pytest.mark.parametrize(
    ("module", "args", "options", "told"),
    [
        (models.NestedInput(), ([X, X],), {}, r"nested input \(list\)"),
        (models.NestedOutput(), (X,), {}, r"nested output \(list\)"),
        (models.Varying(), (X, 3),
         {"dynamic_shapes": {"x": None, "n": torch.export.Dim.DYNAMIC}}, "'n'.*number that varies"),
    ],
)  # fmt: skip
def test_what_no_request_can_carry_is_refused_at_once(tmp_path, module, args, options, told):
    """The error says what to change."""
    path = export(module, *args, path=tmp_path / "m.pt2", **options)
    with pytest.raises(Failed, match=told):
        load(path)


def test_state_is_kept_and_told_of(tmp_path, capfd):
    """A program that changes its buffers runs, with a line in the log unless it says stateful."""
    path = export(models.Counter(), X, path=tmp_path / "c.pt2")
    executor = load(path)
    assert "m/1 changes its total as it runs" in capfd.readouterr().err
    assert [run(executor, x=torch.ones(4, 16))[0, 0].item() for _ in range(3)] == [1, 2, 3]
    load(path, stateful=True)
    assert not capfd.readouterr().err


def test_weights_are_counted_once_each(tmp_path):
    """A tied weight is one storage; rounded up as the device allocates."""
    path = export(models.Everything(), X, path=tmp_path / "e.pt2", kwargs={"mask": X})
    executor = load(path)
    tensors = 16 * 16 + 5 * 16
    assert estimate(scattered(path)) == tensors * 4
    assert executor.weights_bytes(1) == tensors * 4
    assert executor.weights_bytes(512) == 1024 + 5 * 512


def test_what_is_no_exported_program_is_told(linear, tmp_path):
    """With both versions of torch, since that is the usual reason."""
    with zipfile.ZipFile(linear) as whole, zipfile.ZipFile(tmp_path / "x.pt2", "w") as broken:
        for name in whole.namelist():
            data = whole.read(name)
            if name.endswith("models/model.json"):
                data = data.replace(b'"major": ', b'"major": 99')
            broken.writestr(name, data)
    with pytest.raises(Failed, match=rf"\(torch {re.escape(torch.__version__)}.*refuses the file"):
        load(tmp_path / "x.pt2")
    (tmp_path / "y.pt2").write_bytes(b"no zip")
    with pytest.raises(Failed, match="not a zip archive"):
        estimate(scattered(tmp_path / "y.pt2"))


def test_eviction_gives_the_bytes_back(tmp_path):
    """Loaded and closed ten times, the resident set is where it was."""
    path = export(models.Weights(16), torch.ones(2, 512), path=tmp_path / "w.pt2")
    device = CpuDevice()

    def taken(cycles: int) -> int:
        for _ in range(cycles):
            executor = load(path)
            assert executor.weights_bytes(64) == 16 << 20
            run(executor, x=torch.ones(2, 512))
            executor.close()
        del executor
        device.reclaim()
        return device.used_bytes()

    first, last = taken(3), taken(10)
    assert last - first < 8 << 20


def test_the_recipe_in_the_docs_works(tmp_path, monkeypatch):
    """From a module to a file that batches, as docs/models.md has it."""
    monkeypatch.chdir(tmp_path)
    module = models.Linear()
    exec(models.recipe(0), {"model": module, "x": X})
    executor = load(tmp_path / "model.pt2", max_batch_size=64)
    assert torch.equal(run(executor, x=X[:1]), module(X[:1]))


def test_an_engine_serves_an_exported_program(linear, tmp_path):
    """Loaded, warmed up, measured, batched, refused and evicted like any other model."""
    x = (spec("x", "FP32", 16),)
    with EngineProcess() as engine:
        engine.started()
        loaded = engine.load(
            "linear/1",
            linear,
            (WarmUp(1), WarmUp(8)),
            format="export",
            inputs=x,
            max_batch_size=64,
        )
        assert isinstance(loaded, ModelLoaded), (loaded, engine.errors())
        assert loaded.weights_bytes == 64 * 4
        assert [case.rows for case in loaded.cases] == [1, 8]
        assert all(case.seconds > 0 for case in loaded.cases)
        for rows in (1, 3):
            outputs = engine.run("linear/1", {"x": X[:rows].numpy()}, rows=rows)
            expected = models.Linear()(X[:rows]).detach().numpy()
            np.testing.assert_array_equal(outputs["OUTPUT__0"], expected)
        failed = engine.refused("linear/1", {"x": np.ones((2, 5), np.float32)}, rows=2)
        assert failed.code == "invalid_argument"
        engine.evict("linear/1")
        shutil.copy(linear, tmp_path / "cut.pt2")
        with (tmp_path / "cut.pt2").open("r+b") as file:
            file.truncate(3000)
        broken = engine.load("linear/2", tmp_path / "cut.pt2", format="export")
        assert isinstance(broken, LoadFailed)
        assert broken.code == "model_failed"
