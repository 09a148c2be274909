from __future__ import annotations

import io
import json
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.aotinductor import (  # noqa: E402
    AotInductorExecutor,
    check_target,
    estimate,
)
from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.memory import CpuDevice  # noqa: E402
from services.worker.wire import ModelLoaded, WarmUp  # noqa: E402
from tests.unit.engine import pt2_models as models  # noqa: E402
from tests.unit.engine.engine_harness import EngineProcess, spec  # noqa: E402
from tests.unit.engine.pt2_models import CPU, manifest, scattered  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

X = torch.arange(64.0).reshape(4, 16) / 64
QUICKLY = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": True,
}
"""The compiler is not under test; what is left takes some ten seconds."""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """`models.Linear`, exported and compiled as docs/models.md has it, once for the whole file."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: AOTInductor packages cannot be built")
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        import torch._inductor.config

        with torch._inductor.config.patch(QUICKLY):
            exec(models.recipe(0) + models.recipe(1), {"model": models.Linear(), "x": X})
    return folder / "compiled.pt2"


@pytest.fixture
def apart(package, tmp_path):
    """The same with weights beside the library, and others: all 3 in place of all 2."""
    weight = io.BytesIO()
    torch.save(torch.full((48,), 3.0), weight)
    name = AotInductorExecutor(scattered(package), manifest(), CPU)
    names = name._runner.get_constant_names_to_original_fqns().values()
    places = {each: ["weight_0", [3, 16], [16, 1], 0] for each in names if "weight" in each}
    bias = io.BytesIO()
    torch.save(torch.ones(3), bias)
    places |= {each: ["weight_1", [3], [1], 0] for each in names if "bias" in each}
    return edited(
        package, tmp_path / "apart.pt2",
        {
            "data/aotinductor/model/weights_config.json": json.dumps(places).encode(),
            "data/weights/weight_0": weight.getvalue(),
            "data/weights/weight_1": bias.getvalue(),
        },
    )  # fmt: skip


def edited(package, path, more=None, without="-", replace=(b"", b"")):
    """A copy of a package with other members."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            if without not in name:
                data = source.read(name)
                target.writestr(name, data.replace(*replace) if replace[0] else data)
        root = source.namelist()[0].partition("/")[0]
        for name, data in (more or {}).items():
            target.writestr(f"{root}/{name}", data)
    return path


def load(path, **spec) -> AotInductorExecutor:
    return AotInductorExecutor(scattered(path), manifest(**spec), CPU)


def run(executor, **inputs):
    with torch.inference_mode():
        return executor.run(list(inputs.items()))


def test_a_compiled_program_answers_like_the_module(package):
    """For every number of rows that it was compiled for, and for one row, which inductor alone
    would refuse."""
    executor = load(package, max_batch_size=64)
    for rows in (1, 2, 7, 64):
        x = torch.randn(rows, 16)
        answer = run(executor, INPUT__0=x)
        assert answer.shape == (rows, 3)
        torch.testing.assert_close(answer, models.Linear()(x))


def test_inputs_have_the_manifests_names_in_order(package):
    """A package has forgotten the names of what is given by place."""
    assert [argument.name for argument in load(package).schema] == ["INPUT__0"]
    named = load(package, inputs=(spec("x", "FP32", 16),), max_batch_size=64)
    torch.testing.assert_close(run(named, x=X), models.Linear()(X))
    with pytest.raises(Failed, match="does not suit the file"):
        load(package, inputs=(spec("x", "FP32", 16), spec("y", "FP32", 16)))


def test_inputs_are_checked_against_the_manifest(package):
    """Before native code sees them."""
    executor = load(package, inputs=(spec("x", "FP32", 16),), max_batch_size=8)
    for bad in (X.double(), X[:, :8], X[0], torch.ones(9, 16)):
        with pytest.raises(Failed, match=re.escape("takes FP32 [0…8, 16], not")) as caught:
            run(executor, x=bad)
        assert caught.value.code == "invalid_argument"


def test_inputs_are_checked_by_the_code_itself(package):
    """Also without a manifest: wrong shapes and datatypes never reach the kernels."""
    executor = load(package)
    for bad in (X.double(), X[:, :8], torch.ones(65, 16)):
        with pytest.raises(Failed, match="do not suit the program") as caught:
            run(executor, INPUT__0=bad)
        assert caught.value.code == "invalid_argument"
    with pytest.raises(Failed, match="takes no BYTES"):
        run(executor, INPUT__0=[b"text"])
    torch.testing.assert_close(run(executor, INPUT__0=X), models.Linear()(X))
    turned = torch.ones(16, 4).t()  # no row-major rows
    torch.testing.assert_close(run(executor, INPUT__0=turned), models.Linear()(turned))


def test_code_without_checks_needs_a_manifest(package, tmp_path):
    """Somebody has to say what the inputs are."""
    bare = edited(package, tmp_path / "bare.pt2", replace=(b"AOTI_RUNTIME_CHECK_INPUTS", b"A" * 25))
    with pytest.raises(Failed, match="manifest must say"):
        load(bare)
    load(bare, inputs=(spec("x", "FP32", 16),), max_batch_size=64)


def test_a_manifest_cannot_promise_greater_batches(package):
    """More rows than the code was compiled for are found when it is loaded."""
    with pytest.raises(Failed, match="made for 1…64 rows, the manifest's max_batch_size is 65"):
        load(package, max_batch_size=65)


def test_weights_beside_the_library_are_the_ones_that_count(apart):
    """Handed over without a copy, and counted like those inside."""
    torch.testing.assert_close(run(load(apart), INPUT__0=X), 3 * X.sum(1, True).expand(4, 3) + 1)
    assert load(apart).weights_bytes(1) > 48 * 4


def test_weights_are_checked(package, apart, tmp_path):
    """One that is missing, or is no tensor, is an error of the load and not of the engine."""
    none = {"data/aotinductor/model/weights_config.json": b'{"other": ["w", [1], [1], 0]}'}
    tensor = io.BytesIO()
    torch.save(torch.ones(1), tensor)
    lacking = edited(package, tmp_path / "l.pt2", {**none, "data/weights/w": tensor.getvalue()})
    with pytest.raises(Failed, match="lacks the weight"):
        load(lacking)
    text = io.BytesIO()
    torch.save("text", text)
    strange = edited(package, tmp_path / "s.pt2", {**none, "data/weights/w": text.getvalue()})
    with pytest.raises(Failed, match="'other' is no tensor"):
        load(strange)


def test_a_package_for_another_machine_is_refused():
    """It would end the engine with an illegal instruction, or worse."""
    for notes, told in (
        ({"AOTI_DEVICE_KEY": "cuda"}, "compiled for cuda, this worker is cpu"),
        ({"AOTI_MACHINE": "s390x"}, "compiled for s390x"),
        ({"AOTI_PLATFORM": "win32"}, "compiled for win32"),
    ):
        with pytest.raises(Failed, match=told):
            check_target(notes, CPU)
    if not torch.cpu._is_amx_fp16_supported():
        with pytest.raises(Failed, match="processors with AMX_FP16"):
            check_target({"AOTI_CPU_ISA": "AVX2 AMX_FP16"}, CPU)
    check_target({"AOTI_CPU_ISA": "SOMETHING_NEW", "AOTI_DEVICE_KEY": "cpu"}, CPU)


def test_a_damaged_package_is_an_error(package, tmp_path):
    """Nothing of it is run."""
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "bad.pt2").write_bytes(data)
    with pytest.raises(Failed, match="damaged"):
        load(tmp_path / "bad.pt2")
    (tmp_path / "none.pt2").write_bytes(b"no zip")
    with pytest.raises(Failed, match="not a zip archive"):
        estimate(scattered(tmp_path / "none.pt2"))


def test_loading_again_maps_nothing_anew(package, apart):
    """The leak that torch's own loader has: after many cycles the memory, and the number of
    mapped files, are where they were."""
    device = CpuDevice()

    def taken(cycles: int) -> tuple[int, int]:
        for _ in range(cycles):
            for path in (package, apart):
                executor = load(path, max_batch_size=64)
                run(executor, INPUT__0=X)
                executor.close()
        device.reclaim()
        lines = Path("/proc/self/maps").read_text().splitlines()
        return device.used_bytes(), sum("roost-native" in line for line in lines)

    (first, mapped_first), (last, mapped_last) = taken(3), taken(30)
    assert mapped_last == mapped_first
    assert last - first < 4 << 20


def test_an_engine_serves_a_package(package):
    """Loaded, warmed up, measured, batched, refused and evicted like any other model."""
    with EngineProcess() as engine:
        engine.started()
        loaded = engine.load(
            "linear/1", package, (WarmUp(1), WarmUp(8)), format="aotinductor",
            inputs=(spec("x", "FP32", 16),), max_batch_size=64,
        )  # fmt: skip
        assert isinstance(loaded, ModelLoaded), (loaded, engine.errors())
        assert 48 * 4 <= loaded.weights_bytes <= estimate(scattered(package)) + 4096
        assert [case.rows for case in loaded.cases] == [1, 8]
        for rows in (1, 3):
            outputs = engine.run("linear/1", {"x": X[:rows].numpy()}, rows=rows)
            expected = models.Linear()(X[:rows]).detach().numpy()
            np.testing.assert_allclose(outputs["OUTPUT__0"], expected, rtol=1e-5)
        failed = engine.refused("linear/1", {"x": np.ones((2, 5), np.float32)}, rows=2)
        assert failed.code == "invalid_argument"
        engine.evict("linear/1")
