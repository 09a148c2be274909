"""A model answers with the same bits as when everyone else loads its file, whatever is done to
the models beside it."""

from __future__ import annotations

import gc
import random
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.importing import PLAIN_LOADS, take_apart  # noqa: E402
from services.worker.engine.programs import Unshareable, import_apart  # noqa: E402
from services.worker.engine.torchscript import evaluate  # noqa: E402
from shared.layout.torchscript import read_layout  # noqa: E402
from tests.property.skeleton_models import MODELS, Model  # noqa: E402
from tests.unit.engine import program_harness as harness  # noqa: E402

pytestmark = pytest.mark.torch

CASES = [(name, way) for name, model in MODELS.items() for way in model.ways]
SHARED = [(name, way) for name, way in CASES if way not in MODELS[name].whole]
WHOLE = [(name, way) for name, way in CASES if way in MODELS[name].whole]
OBSTRUCTED = {
    *(("lstm", "s"), ("gru", "s"), ("tensors in a list", "s"), ("quantized", "s")),
    *(("quantized buffer", "s"), ("sets its state", "s"), ("conjugated", "s")),
}
"""Weights and program cannot be told apart."""
TUNES = 3
STEPS = 24


def make(model: Model, way: str, seed: int, folder: Path) -> Path:
    torch.manual_seed(seed)
    module = harness.randomized(model.make(), seed).train(model.train)
    path = folder / f"{way}{seed}.pt"
    if way == "t":
        return harness.traced(module, model.example(), path)
    if way == "f":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frozen = torch.jit.freeze(torch.jit.script(module.eval()))
        torch.jit.save(frozen, str(path))
        return path
    return harness.scripted(module, path)


@pytest.fixture(autouse=True)
def _nothing_is_loaded_plainly():
    """None of these needs the last resort."""
    before = PLAIN_LOADS.copy()
    yield
    assert before == PLAIN_LOADS


@pytest.mark.parametrize(("name", "way"), SHARED)
def test_models_of_one_skeleton_answer_as_if_each_had_its_own(name, way, tmp_path):
    """Three fine-tunes take turns on one program, come and go, and each answers with the bits
    of its own file."""
    model = MODELS[name]
    paths = [make(model, way, seed, tmp_path) for seed in range(TUNES)]
    layouts = [read_layout(path) for path in paths]
    if way == "f":  # the weights are part of the code
        paths, layouts = paths[:1], layouts[:1]
    assert len({layout.architecture for layout in layouts}) == 1, layouts[0].obstacle
    torch.manual_seed(7)
    examples = [model.example() for _ in range(3)]
    wanted = [
        [harness.run_plain(harness.plain(path), values) for values in examples] for path in paths
    ]
    skeleton = harness.skeleton_of(paths[0])
    executors = [harness.executor_of(skeleton, path) for path in paths]
    dice = random.Random(f"{name}{way}")
    for _ in range(STEPS):
        tune, case = dice.randrange(len(paths)), dice.randrange(len(examples))
        if dice.random() < 0.25:
            executors[tune].close()
            executors[tune] = harness.executor_of(skeleton, paths[tune])
        assert harness.same_bits(wanted[tune][case], harness.run(executors[tune], examples[case]))
    skeleton.close()


@pytest.mark.parametrize(("name", "way"), WHOLE)
def test_programs_that_write_or_are_odd_have_a_module_each(name, way, tmp_path):
    """What could not be right is refused for sharing, and answers with the bits of its file when
    loaded whole: also the tenth time, and no model's state shows in another's answer."""
    model = MODELS[name]
    paths = [make(model, way, seed, tmp_path) for seed in range(TUNES)]
    with pytest.raises(Unshareable):
        harness.skeleton_of(paths[0])
    executors = [harness.whole_of(path) for path in paths]
    plain = [harness.plain(path) for path in paths]
    dice = random.Random(f"{name}{way}")
    for _ in range(STEPS):
        tune = dice.randrange(TUNES)
        if dice.random() < 0.15:
            executors[tune].close()
            executors[tune], plain[tune] = harness.whole_of(paths[tune]), harness.plain(paths[tune])
        values = model.example()
        wanted = harness.run_plain(plain[tune], values)
        assert harness.same_bits(wanted, harness.run(executors[tune], values))


@pytest.mark.parametrize(("name", "way"), SHARED)
def test_a_file_loaded_whole_answers_with_the_same_bits(name, way, tmp_path):
    """Also those that could be shared: they are loaded whole for a model that is stateful."""
    model = MODELS[name]
    path = make(model, way, 0, tmp_path)
    executor, plain = harness.whole_of(path), harness.plain(path)
    for _ in range(3):
        values = model.example()
        wanted = harness.run_plain(plain, values)
        assert harness.same_bits(wanted, harness.run(executor, values))


@pytest.mark.parametrize(("name", "way"), [case for case in CASES if case not in OBSTRUCTED])
def test_weights_that_come_after_the_import_make_the_same_module(name, way, tmp_path):
    """As a device takes them that is not the host."""
    model = MODELS[name]
    path = make(model, way, 0, tmp_path)
    file = harness.open_file(path)
    module = import_apart(file, take_apart(file), read_layout(path), harness.CPU)
    evaluate(module)
    forward, plain = module._get_method("forward"), harness.plain(path)
    for _ in range(3):
        values = model.example()
        wanted = harness.run_plain(plain, values)
        assert harness.same_bits(wanted, harness.run_plain(forward, values))


def test_an_evicted_model_leaves_nothing_behind(tmp_path):
    """After `close` neither program nor executor keeps the weights' memory."""
    paths = [make(MODELS["transformer"], "t", seed, tmp_path) for seed in range(2)]
    skeleton = harness.skeleton_of(paths[0])
    executor, other = (harness.executor_of(skeleton, path) for path in paths)
    values = MODELS["transformer"].example()
    for each in (executor, other, executor):
        harness.run(each, values)
    storages = [view.untyped_storage() for view in executor._weights.views]
    executor.close()
    gc.collect()
    assert {torch._C._storage_Use_Count(each._cdata) for each in storages} == {1}
    harness.run(other, values)
