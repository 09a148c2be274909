from __future__ import annotations

import msgspec
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from services.worker.engine.bare import Unshareable, move_constants  # noqa: E402
from services.worker.engine.blocks import BlockStore  # noqa: E402
from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.importing import (  # noqa: E402
    import_program,
    read_storages,
    take_apart,
)
from services.worker.engine.memory import CpuDevice  # noqa: E402
from services.worker.engine.programs import (  # noqa: E402
    Skeleton,
    TorchScriptExecutor,
    WholeExecutor,
)
from services.worker.engine.views import Weights  # noqa: E402
from shared.layout import Block, Layout, Slot  # noqa: E402
from shared.layout.torchscript import read_layout  # noqa: E402
from tests.property import skeleton_models as family  # noqa: E402
from tests.unit.engine import engine_models as models  # noqa: E402
from tests.unit.engine import program_harness as harness  # noqa: E402

pytestmark = pytest.mark.torch
CPU = harness.CPU


@pytest.fixture
def path(tmp_path):
    return harness.scripted(harness.randomized(family.Tied(), 0), tmp_path / "tied.pt")


def changed(layout: Layout, index: int, **changes) -> Layout:
    slots = list(layout.slots)
    slots[index] = msgspec.structs.replace(slots[index], **changes)
    return msgspec.structs.replace(layout, slots=tuple(slots))


def lies(layout: Layout) -> dict[str, Layout]:
    """Layouts that are not of this file, by what is wrong with them."""
    first = layout.slots[0]
    tie = next(  # the second slot over the first one's tensor
        index for index, slot in enumerate(layout.slots) if index and slot.block == first.block
    )
    block = layout.blocks[0]
    moved = (msgspec.structs.replace(block, offset=block.offset + 8), *layout.blocks[1:])
    return {
        "a path": changed(layout, 0, path=("table", "wait")),
        "a path through a tensor": changed(layout, 0, path=(*first.path, "data")),
        "no path": changed(layout, 0, path=()),
        "a module": changed(layout, 0, path=("table",)),
        "a datatype": changed(layout, 0, dtype="float16"),
        "an unknown datatype": changed(layout, 0, dtype="float7"),
        "a shape": changed(layout, 0, shape=(6, 16)),
        "a stride": changed(layout, 0, stride=(1, 16)),
        "a start": changed(layout, 0, start=1),
        "a block": changed(layout, 0, block=layout.slots[1].block),
        "a block that is not there": changed(layout, 0, block=99),
        "a tie": changed(layout, tie, block=layout.slots[1].block),
        "a place": msgspec.structs.replace(layout, blocks=moved),
        "a missing slot": msgspec.structs.replace(layout, slots=layout.slots[1:tie]),
        "an obstacle": msgspec.structs.replace(layout, obstacle="for a reason"),
    }


LIES = (
    *("a path", "a path through a tensor", "no path", "a module", "a datatype"),
    *("an unknown datatype", "a shape", "a stride", "a start", "a block"),
    *("a block that is not there", "a tie", "a place", "a missing slot", "an obstacle"),
)


@pytest.mark.parametrize("lie", LIES)
def test_a_layout_that_is_not_true_of_the_module_is_not_believed(path, lie):
    """It came from elsewhere, and pointing tensors by it would read other memory."""
    layout = lies(read_layout(path))[lie]
    with pytest.raises(Unshareable):
        Skeleton.load(harness.open_file(path), layout, CPU)


def test_the_list_of_lies_is_whole(path):
    """Each is tested by its name."""
    assert tuple(lies(read_layout(path))) == LIES


def test_a_layout_that_hides_a_setstate_is_not_believed(tmp_path):
    """What runs while the file is loaded would see memory that is none."""
    path = harness.scripted(family.SetsState(), tmp_path / "m.pt")
    with pytest.raises(Unshareable, match="__setstate__"):
        Skeleton.load(harness.open_file(path), Layout(may_write=False), CPU)


def test_ties_stay_ties(path):
    """A tensor that two attributes have is one tensor, pointed at once for both."""
    executor = harness.executor_of(harness.skeleton_of(path), path)
    values = family.MODELS["tied"].example()
    wanted = harness.run_plain(harness.plain(path), values)
    assert harness.same_bits(wanted, harness.run(executor, values))


@pytest.mark.parametrize(
    "change",
    [
        lambda views: views[1:],
        lambda views: (views[0].half(), *views[1:]),
        lambda views: (views[0].t(), *views[1:]),
        lambda views: (views[0].t().contiguous().t(), *views[1:]),
        lambda views: (views[0].to("meta"), *views[1:]),
    ],
)
def test_views_of_another_kind_are_refused(path, change):
    """Too few, of another datatype, shape, order in memory, or on another device."""
    views = change(harness.views_of(path, read_layout(path)))
    with pytest.raises(Unshareable):
        TorchScriptExecutor(harness.skeleton_of(path), Weights(tuple(views)), harness.MANIFEST, CPU)


def test_views_may_be_made_in_inference_mode(path):
    """Whoever makes them need not know who uses them."""
    values = family.MODELS["tied"].example()
    wanted = harness.run_plain(harness.plain(path), values)
    with torch.inference_mode():
        skeleton = harness.skeleton_of(path)
        executor = harness.executor_of(skeleton, path)
        whole = harness.whole_of(path)
    assert harness.same_bits(wanted, harness.run(executor, values))
    assert harness.same_bits(wanted, harness.run(harness.executor_of(skeleton, path), values))
    assert harness.same_bits(wanted, harness.run(whole, values))


def test_a_result_stays_what_it_is_when_another_model_runs(tmp_path):
    """A model may return a weight itself, and its reply is written later."""
    paths = [
        harness.scripted(harness.randomized(family.Returned(), seed), tmp_path / f"{seed}.pt")
        for seed in range(2)
    ]
    skeleton = harness.skeleton_of(paths[0])
    first, second = (harness.executor_of(skeleton, path) for path in paths)
    inputs = [("x", torch.ones(4))]
    with torch.inference_mode():
        result = first.run(inputs)
        kept = harness.copied(result)
        second.run(inputs)
        assert harness.same_bits(harness.copied(result), kept)


def test_a_model_that_was_moved_computes_the_same(tmp_path):
    """Others came and went, and its tensors are where they were not; it was told nothing."""
    base, kib = family.MODELS["tied"], 1024
    files = [
        harness.scripted(harness.randomized(family.Tied(), seed), tmp_path / f"{seed}.pt")
        for seed in range(3)
    ]
    layouts = [read_layout(file) for file in files]
    nbytes = layouts[0].weights_bytes
    kept = BlockStore(CpuDevice(), device_bytes=3 * nbytes, host_bytes=0, grain=4 * kib)
    skeleton, executors = harness.skeleton_of(files[0]), []
    for seed, (file, layout) in enumerate(zip(files, layouts, strict=True)):
        placed = kept.place(str(seed), layout, harness.open_file(file), keep_host=False)
        executors.append(TorchScriptExecutor(skeleton, placed.weights, harness.MANIFEST, CPU))
    values = base.example()
    wanted = harness.run(executors[1], values)
    before = executors[1]._weights.views[0].data_ptr()
    for gone in (0, 2):
        executors[gone].close()
        kept.evict(str(gone), "device")
    large = tmp_path / "large"
    large.write_bytes(b"x" * 2 * nbytes)
    layout = Layout(blocks=(Block(b"large", 0, 2 * nbytes),))
    kept.place("large", layout, harness.open_file(large), keep_host=False)
    assert executors[1]._weights.views[0].data_ptr() != before
    assert harness.same_bits(wanted, harness.run(executors[1], values))


def test_detaching_others_leaves_a_model_in_place(path):
    """An eviction beside a running model changes nothing for it."""
    skeleton = harness.skeleton_of(path)
    executor, other = (harness.executor_of(skeleton, path) for _ in range(2))
    values = family.MODELS["tied"].example()
    wanted = harness.run(executor, values)
    skeleton.detach(other._weights.views)
    assert all(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(executor._weights.views, skeleton._tensors, strict=True)
    )
    other.close()
    assert harness.same_bits(wanted, harness.run(executor, values))


def test_placeholders_take_no_memory(tmp_path):
    """A program costs no more for having large weights."""
    path = harness.scripted(models.Weights(64), tmp_path / "m.pt")
    skeleton = harness.skeleton_of(path)
    assert sum(tensor.untyped_storage().nbytes() for tensor in skeleton._tensors) < 1024


def test_placeholders_are_one_zero_of_each_dtype(path):
    """On a device each would be an allocation and a kernel."""
    skeleton = harness.skeleton_of(path)
    places = {tensor.data_ptr() for tensor in (*skeleton._tensors, *skeleton._empty)}
    assert len(places) <= len({tensor.dtype for tensor in skeleton._tensors})


def test_all_constants_are_found_in_the_code(tmp_path):
    """They are part of it, so nothing else would bring them to a device."""
    path = harness.traced(family.Constants(), [torch.randn(4, 4)], tmp_path / "m.pt")
    file = harness.open_file(path)
    parts = take_apart(file)
    constants = read_storages(file, parts.constants)
    module = import_program(parts, read_storages(file, parts.weights), constants)
    values = [torch.randn(4, 4)]
    before = harness.run_plain(module._get_method("forward"), values)
    move_constants(module, constants, CPU)
    assert harness.same_bits(before, harness.run_plain(module._get_method("forward"), values))
    with pytest.raises(Unshareable, match="constants"):
        move_constants(module, {**constants, "more": torch.zeros(3)}, CPU)


def test_weights_and_constants_are_counted(tmp_path):
    """Each storage in steps of what the device gives out; shared or whole, it is the same."""
    path = harness.traced(family.Constants(), [torch.randn(4, 4)], tmp_path / "m.pt")
    layout = read_layout(path)
    constants = len(take_apart(harness.open_file(path)).constants)
    assert constants >= 3
    for executor in (
        harness.executor_of(harness.skeleton_of(path), path),
        harness.whole_of(path),
    ):
        assert executor.weights_bytes(512) == 512 * (len(layout.blocks) + constants)


@pytest.mark.parametrize("load", [harness.skeleton_of, harness.whole_of])
def test_a_module_that_cannot_be_called_is_no_model(load, tmp_path):
    """Without `forward`, or with an argument that no request can carry."""
    for number, (module, told) in enumerate(
        [(models.NoForward(), "no forward"), (models.Dictionary(), "no request can carry")]
    ):
        path = harness.scripted(module, tmp_path / f"{number}.pt")
        with pytest.raises(Failed, match=told):
            load(path)


def test_a_model_in_training_is_put_into_evaluation(tmp_path):
    """All through, as `.eval()` does."""
    path = harness.scripted(nn.Sequential(nn.Sequential(nn.Dropout(0.9))).train(), tmp_path / "m")
    values = [torch.ones(64)]
    for executor in (
        harness.executor_of(harness.skeleton_of(path), path),
        harness.whole_of(path),
    ):
        assert torch.equal(harness.run(executor, values), values[0])


def test_a_file_without_a_layout_is_loaded_whole(path):
    """A layout only helps."""
    values: list[Tensor] = list(family.MODELS["tied"].example())
    executor = WholeExecutor(harness.open_file(path), None, harness.MANIFEST, CPU)
    wanted = harness.run_plain(harness.plain(path), values)
    assert harness.same_bits(wanted, harness.run(executor, values))


def test_slots_are_named_in_errors(path):
    """With the path, so that a layout can be compared with its file."""
    layout = read_layout(path)
    slot = layout.slots[0]
    assert isinstance(slot, Slot)
    wrong = changed(layout, 0, dtype="int8")
    with pytest.raises(Unshareable, match=r"\.".join(slot.path)):
        Skeleton.load(harness.open_file(path), wrong, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("name", ["tied", "constants", "conv net", "writes a buffer"])
def test_a_gpu_gives_the_bits_that_a_plain_load_gives_there(name, tmp_path):
    """Weights, constants and inputs are all on the device, shared or whole."""
    device = torch.device("cuda")
    model = family.MODELS[name]
    module = harness.randomized(model.make(), 0).eval()
    path = harness.traced(module, model.example(), tmp_path / "m.pt")
    layout = read_layout(path)
    plain = torch.jit.load(str(path), map_location=device).eval().forward
    executors = [WholeExecutor(harness.open_file(path), layout, harness.MANIFEST, device)]
    if not model.whole:
        skeleton = Skeleton.load(harness.open_file(path), layout, device)
        views = tuple(view.to(device) for view in harness.views_of(path, layout))
        executors.append(TorchScriptExecutor(skeleton, Weights(views), harness.MANIFEST, device))
    values = model.example()
    with torch.inference_mode(), torch.jit.optimized_execution(should_optimize=False):
        wanted = plain(*(value.to(device) for value in values)).cpu()
        for executor in executors:
            result = executor.run(harness.inputs_of(executor, values))
            assert isinstance(result, Tensor)
            assert result.device.type == "cuda"
            assert harness.same_bits(wanted, result.cpu())
