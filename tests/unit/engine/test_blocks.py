from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule  # noqa: E402
from msgspec.structs import replace  # noqa: E402

from services.worker.engine.blocks import BlockMemory, BlockStore  # noqa: E402
from services.worker.engine.failures import Failed  # noqa: E402
from services.worker.engine.memory import CpuDevice  # noqa: E402
from shared.layout import aligned  # noqa: E402
from tests.unit.engine.engine_weights import Weights, anonymous_bytes, noise  # noqa: E402

pytestmark = pytest.mark.torch

KIB = 1024
MIB = 1024 * KIB
DEVICE = CpuDevice()


def store(device_kib=64, host_kib=64, **options) -> BlockStore:
    options = {"grain": 16 * KIB, "patience_s": 5.0, **options}
    return BlockStore(DEVICE, device_bytes=device_kib * KIB, host_bytes=host_kib * KIB, **options)


@pytest.fixture
def weights(tmp_path):
    """Makes files full of blocks: `weights("name", b"first", b"second", …)`."""
    made = []

    def make(name, *blocks):
        made.append(Weights(tmp_path, name, blocks))
        return made[-1]

    yield make
    for each in made:
        each.file.close()


def place(kept: BlockStore, name: str, weights: Weights, *, keep_host=False):
    return kept.place(name, weights.layout, weights.file, keep_host=keep_host)


def hold(kept: BlockStore, name: str, weights: Weights) -> None:
    for _ in kept.hold(name, weights.layout, weights.file):
        pass


def contents(placed) -> tuple[bytes, ...]:
    return tuple(view.numpy().tobytes() for view in placed.weights.views)


def test_a_model_comes_from_the_disk_and_from_the_host(weights):
    """Its bytes are the file's, whichever way they came; the answer says which."""
    kept, model = store(), weights("m", noise(1, 5000), b"", noise(2, 300))
    straight = place(kept, "m", model)
    assert contents(straight) == model.contents
    assert (straight.source, straight.weights_bytes) == ("disk", 5120 + 512)
    assert not kept.in_tier("m", "host")
    kept.evict("m", "device")
    through = place(kept, "m", model, keep_host=True)
    assert contents(through) == model.contents
    assert (through.source, kept.in_tier("m", "host")) == ("disk", True)
    kept.evict("m", "device")
    model.path.unlink()
    model.file.close()
    back = place(kept, "m", model)
    assert contents(back) == model.contents
    assert back.source == "host"


def test_holding_takes_host_memory_alone(weights):
    """A model in the host tier takes nothing of the device."""
    kept, model = store(), weights("m", noise(1, 5000))
    hold(kept, "m", model)
    hold(kept, "m", model)
    assert kept.memory() == BlockMemory(0, 0, 5120, 16 * KIB - 5120)
    assert (kept.in_tier("m", "host"), kept.in_tier("m", "device")) == (True, False)


def test_evicting_gives_bytes_back_at_once_and_memory_after_a_while(weights):
    """A swap finds the memory that it needs; the system gets what nobody needs."""
    kept, model = store(), weights("m", noise(1, 5000))
    place(kept, "m", model)
    assert kept.tidy(100.0) is None
    kept.evict("m", "device")
    kept.evict("m", "device")
    kept.evict("m", "host")
    assert kept.memory() == BlockMemory(0, 16 * KIB, 0, 0)
    assert kept.tidy(100.0) == 105.0
    assert kept.tidy(104.0) == 105.0
    assert kept.memory().device_spare_bytes == 16 * KIB
    assert kept.tidy(105.0) is None
    assert kept.memory() == BlockMemory(0, 0, 0, 0)
    assert contents(place(kept, "m", model)) == model.contents


def test_memory_that_was_used_meanwhile_waits_anew(weights):
    """Patience counts from the last time that it became empty."""
    kept, model = store(), weights("m", noise(1, 5000))
    place(kept, "m", model)
    kept.evict("m", "device")
    kept.tidy(100.0)
    place(kept, "m", model)
    kept.evict("m", "device")
    assert kept.tidy(104.0) == 109.0
    assert kept.tidy(106.0) == 109.0


def test_placing_again_makes_views_and_nothing_else(weights):
    """A second place of the same model moves no bytes and takes no room; it may still ask for
    the host's copy."""
    kept, model = store(), weights("m", noise(1, 5000))
    first = place(kept, "m", model)
    second = place(kept, "m", model)
    assert second.source == "host"
    assert second.weights.views[0].data_ptr() == first.weights.views[0].data_ptr()
    assert kept.memory().device_bytes == 5120
    assert place(kept, "m", model, keep_host=True).source == "disk"
    assert kept.memory().host_bytes == 5120
    kept.evict("m", "device")
    assert kept.memory().device_bytes == 0


def test_equal_blocks_are_kept_once(weights):
    """Models of one backbone share it in both tiers, and it stays for the last of them."""
    kept, backbone = store(), noise(0, 20_000)
    one = weights("one", backbone, noise(1, 1000))
    two = weights("two", noise(2, 1000), backbone)
    hold(kept, "one", one)
    first = place(kept, "one", one)
    second = place(kept, "two", two, keep_host=True)
    assert first.weights_bytes == second.weights_bytes == 20_480 + 1024
    assert kept.memory().device_bytes == kept.memory().host_bytes == 20_480 + 2 * 1024
    assert first.weights.views[0].data_ptr() == second.weights.views[1].data_ptr()
    kept.evict("one", "device")
    kept.evict("one", "host")
    assert contents(second) == two.contents
    assert kept.memory().device_bytes == 20_480 + 1024
    kept.evict("two", "device")
    assert kept.memory().device_bytes == 0


def test_what_another_model_holds_in_the_host_need_not_be_read(weights):
    """Only what is nowhere comes from the disk."""
    kept, backbone = store(), noise(0, 20_000)
    one, two = weights("one", backbone, b"1"), weights("two", backbone)
    hold(kept, "one", one)
    two.path.unlink()
    placed = place(kept, "two", two, keep_host=True)
    assert placed.source == "host"
    assert contents(placed) == two.contents


def test_equal_blocks_of_one_model_are_kept_once(weights):
    """Layers that begin alike cost one of them."""
    kept, model = store(), weights("m", noise(1, 1000), noise(2, 500), noise(1, 1000))
    placed = place(kept, "m", model)
    assert contents(placed) == model.contents
    assert placed.weights_bytes == kept.memory().device_bytes == 1536


def test_without_sharing_every_block_is_its_models_own(weights):
    """Equal content takes room as often as it comes."""
    kept, backbone = store(share=False), noise(0, 1000)
    one, two = weights("one", backbone, backbone), weights("two", backbone)
    first, second = place(kept, "one", one), place(kept, "two", two, keep_host=True)
    assert len({view.data_ptr() for view in (*first.weights.views, *second.weights.views)}) == 3
    assert (first.weights_bytes, second.weights_bytes) == (2048, 1024)
    assert kept.memory().device_bytes == 3 * 1024
    kept.evict("one", "device")
    assert contents(second) == two.contents


@pytest.mark.parametrize(("device_kib", "host_kib"), [(10, 64), (64, 10)])
def test_what_does_not_fit_is_refused_and_changes_nothing(weights, device_kib, host_kib):
    """Either tier may refuse; the model is then in neither, and who was there stays."""
    kept = store(device_kib, host_kib, grain=4 * KIB)
    small, large = (
        weights("small", noise(1, 3000)),
        weights("large", *[noise(2, 2000)], noise(3, 9000)),
    )
    stays = place(kept, "small", small, keep_host=True)
    before = kept.memory()
    with pytest.raises(Failed, match=r"large needs 11,264 bytes: 7,168 are free") as error:
        place(kept, "large", large, keep_host=True)
    assert error.value.code == "resource_exhausted"
    after = kept.memory()
    assert (after.device_bytes, after.host_bytes) == (before.device_bytes, before.host_bytes)
    assert not kept.in_tier("large", "device")
    assert not kept.in_tier("large", "host")
    assert contents(stays) == small.contents
    kept.validate()


def test_a_file_that_cannot_be_read_leaves_nothing(weights):
    """Neither tier has half of a model, and what it shares with others stays whole."""
    kept, backbone = store(), noise(0, 1000)
    good, bad = weights("good", backbone), weights("bad", backbone, noise(1, 2000), noise(2, 3000))
    stays = place(kept, "good", good, keep_host=True)
    before = kept.memory()
    os.truncate(bad.path, 4000)
    for keep_host in (False, True):
        with pytest.raises(Failed, match="cut short") as error:
            place(kept, "bad", bad, keep_host=keep_host)
        assert error.value.code == "model_failed"
    with pytest.raises(Failed, match="cut short"):
        hold(kept, "bad", bad)
    assert kept.memory() == before
    assert not kept.in_tier("bad", "device")
    assert not kept.in_tier("bad", "host")
    assert contents(stays) == good.contents
    kept.validate()


def test_a_model_in_the_host_stays_there_when_the_device_refuses(weights):
    """A refused swap costs nothing: it can be tried again."""
    kept, model = store(device_kib=4), weights("m", noise(1, 9000))
    hold(kept, "m", model)
    with pytest.raises(Failed, match="device tier"):
        place(kept, "m", model, keep_host=True)
    assert kept.in_tier("m", "host")


def test_a_layout_that_reaches_beyond_its_blocks_is_refused(weights):
    """Before a byte is moved."""
    kept, model = store(), weights("m", noise(1, 1000))
    slot = replace(model.layout.slots[0], shape=(1001,))
    with pytest.raises(Failed, match="reaches beyond its block"):
        kept.place("m", replace(model.layout, slots=(slot,)), model.file, keep_host=False)
    assert kept.memory() == BlockMemory(0, 0, 0, 0)


def test_a_store_that_lost_its_room_in_pieces_still_takes_what_fits(weights):
    """Blocks of a model stand wherever there is room."""
    kept = store(device_kib=16)
    small = [weights(f"s{index}", noise(index, 1024)) for index in range(16)]
    for index, each in enumerate(small):
        place(kept, f"s{index}", each)
    for index in range(0, 16, 2):
        kept.evict(f"s{index}", "device")
    model = weights("m", *[noise(100 + index, 1000) for index in range(8)])
    assert contents(place(kept, "m", model)) == model.contents
    assert kept.memory() == BlockMemory(16 * KIB, 0, 0, 0)


def test_others_are_moved_for_a_block_that_no_hole_takes(weights):
    """While nothing runs, and before anything runs again each model finds its tensors where
    they are: the same bytes, seen by whoever had them before."""
    stood_still = []

    def standstill(work):
        before = [contents(each) for each in placed]
        work()
        stood_still.append(([contents(each) for each in placed], before))

    kept = store(device_kib=64, standstill=standstill)
    models = [weights(f"m{i}", noise(i, 5 * KIB), noise(20 + i, 3 * KIB)) for i in range(8)]
    placed = [place(kept, f"m{i}", each) for i, each in enumerate(models)]
    for gone in (0, 2, 5):
        kept.evict(f"m{gone}", "device")
    placed = [placed[i] for i in (1, 3, 4, 6, 7)]
    large = weights("large", noise(30, 20 * KIB))
    assert contents(place(kept, "large", large)) == large.contents
    kept.validate()
    ((found, before),) = stood_still
    assert found == before == [models[i].contents for i in (1, 3, 4, 6, 7)]
    assert kept.memory().device_bytes == 60 * KIB


def test_what_is_being_held_may_be_moved_meanwhile(weights):
    """Its next piece goes to where its room is by then."""
    kept = store(10 * MIB // KIB, 10 * MIB // KIB, grain=MIB)
    first, one = weights("first", noise(0, 3 * MIB)), weights("one", noise(1, 5 * MIB))
    large = weights("large", noise(2, 4 * MIB))
    hold(kept, "first", first)
    steps = kept.hold("one", one.layout, one.file)
    next(steps)
    kept.evict("first", "host")
    hold(kept, "large", large)
    assert list(steps) == [None, None]
    placed = place(kept, "one", one)
    assert (contents(placed), placed.source) == (one.contents, "host")


def test_a_lowered_device_budget_gives_back_at_once_what_is_empty(weights):
    """Models that are there stay; what is reserved for nothing goes; what comes must fit."""
    kept = store()
    one, two, small = (weights(name, noise(ord(name), 15_000)) for name in "abc")
    stays = place(kept, "one", one)
    place(kept, "two", two)
    kept.evict("two", "device")
    kept.limit_device(20 * KIB)
    assert kept.memory() == BlockMemory(15_360, 1024, 0, 0)
    with pytest.raises(Failed, match="device tier"):
        place(kept, "small", small)
    assert contents(stays) == one.contents
    kept.limit_device(32 * KIB)
    assert contents(place(kept, "small", small)) == small.contents


def test_hundreds_of_swaps_leave_no_trace(weights):
    """The resident set does not grow with the number of swaps, and is as before at the end."""
    mib = 1 << 20
    model = weights("m", *[noise(index, 1 << 20) for index in range(20)])
    gc.collect()  # other tests' stores
    before = anonymous_bytes()
    kept = store(64 * KIB, 64 * KIB, grain=32 * mib)
    place(kept, "m", model, keep_host=True)
    loaded = anonymous_bytes()
    assert loaded - before >= 64 * mib
    for turn in range(300):
        kept.evict("m", "device")
        if turn % 3 == 0:
            kept.evict("m", "host")
        if turn % 30 == 0:
            kept.tidy(10.0 * turn)
            kept.tidy(10.0 * turn + 6.0)
        place(kept, "m", model, keep_host=turn % 2 == 0)
    assert anonymous_bytes() <= loaded + 2 * mib
    kept.evict("m", "device")
    kept.evict("m", "host")
    kept.tidy(1e6)
    kept.tidy(2e6)
    assert kept.memory() == BlockMemory(0, 0, 0, 0)
    assert anonymous_bytes() <= before + 4 * mib


POOL = [noise(index, size) for index, size in enumerate((0, 1, 511, 512, 513, 2000, 5000, 9000))]


BUDGETS = {"device": 24, "host": 32}


class Swapping(RuleBasedStateMachine):
    """Models come and go in both tiers, in any order, over blocks that many of them have."""

    share = True

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = store(24, 32, grain=8 * KIB, share=self.share)
        self.models: dict[str, Weights] = {}
        self.tiers: dict[str, set[str]] = {"device": set(), "host": set()}
        self.placed = {}
        self.now = 0.0

    models = st.integers(0, 5).map("m{}".format)

    @contextlib.contextmanager
    def refused(self, broken, **tiers):
        """For want of bytes, and only then, or because a file is broken. `tiers`: who is to be
        in which of them."""
        scarce = any(self.needs(tier, name) > BUDGETS[tier] * KIB for tier, name in tiers.items())
        why = ""
        try:
            yield
        except Failed as error:
            why = error.code
        assert (why == "resource_exhausted") == scarce
        assert why in {"", "resource_exhausted"} or broken

    def needs(self, tier, newcomer):
        """Bytes of all that would be in the tier."""
        blocks = [
            block for name in {*self.tiers[tier], newcomer} for block in self.models[name].contents
        ]
        return sum(aligned(len(each)) for each in (set(blocks) if self.share else blocks))

    def weights(self, name, blocks):
        if name not in self.models:
            folder = Path(self.folder.name)
            self.models[name] = Weights(folder, name, [POOL[index] for index in blocks])
        return self.models[name]

    @rule(
        name=models,
        blocks=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=6),
        keep_host=st.booleans(),
        broken=st.booleans(),
    )
    def place(self, name, blocks, keep_host, broken):
        model = self.weights(name, blocks)
        hidden = model.path.with_suffix(".hidden")
        if broken:
            model.file.close()
            model.path.rename(hidden)
        tiers = {"device": name, "host": name} if keep_host else {"device": name}
        with self.refused(broken, **tiers):
            self.placed[name] = place(self.store, name, model, keep_host=keep_host)
            self.tiers["device"].add(name)
            if keep_host:
                self.tiers["host"].add(name)
        if broken:
            hidden.rename(model.path)

    @rule(name=models, blocks=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=6))
    def hold(self, name, blocks):
        model = self.weights(name, blocks)
        with self.refused(broken=False, host=name):
            hold(self.store, name, model)
            self.tiers["host"].add(name)

    @rule(name=models, tier=st.sampled_from(["device", "host"]))
    def evict(self, name, tier):
        self.store.evict(name, tier)
        self.tiers[tier].discard(name)
        if tier == "device":
            self.placed.pop(name, None)

    @rule(seconds=st.sampled_from([0.0, 3.0, 6.0]))
    def tidy(self, seconds):
        self.now += seconds
        at = self.store.tidy(self.now)
        assert at is None or self.now < at <= self.now + 5.0

    @invariant()
    def every_model_is_whole(self):
        self.store.validate()
        for tier, names in self.tiers.items():
            assert {name for name in self.models if self.store.in_tier(name, tier)} == names
        for name, placed in self.placed.items():
            assert contents(placed) == self.models[name].contents

    @invariant()
    def bytes_are_counted_and_within_the_budgets(self):
        memory = self.store.memory()
        assert memory.device_bytes + memory.device_spare_bytes <= BUDGETS["device"] * KIB
        assert memory.host_bytes + memory.host_spare_bytes <= BUDGETS["host"] * KIB
        for tier, used in (("device", memory.device_bytes), ("host", memory.host_bytes)):
            blocks = [block for name in self.tiers[tier] for block in self.models[name].contents]
            assert used == sum(
                aligned(len(each)) for each in (set(blocks) if self.share else blocks)
            )

    def teardown(self):
        for name in self.models:
            self.store.evict(name, "device")
            self.store.evict(name, "host")
            self.models[name].file.close()
        self.store.tidy(self.now)
        self.store.tidy(self.now + 6.0)
        assert self.store.memory() == BlockMemory(0, 0, 0, 0)
        self.store.validate()
        self.folder.cleanup()


class SwappingUnshared(Swapping):
    share = False


Swapping.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
SwappingUnshared.TestCase.settings = Swapping.TestCase.settings
TestSwapping = Swapping.TestCase
TestSwappingUnshared = SwappingUnshared.TestCase


# --- holds, piece by piece ----------------------------------------------------------------


def test_nobody_takes_bytes_that_are_still_under_way(weights):
    """A model that shares a block with one that is being held reads it for itself; what comes
    later has it."""
    kept, shared = store(4 * MIB // KIB, 8 * MIB // KIB, grain=8 * MIB), noise(0, 3 * MIB)
    one, two = weights("one", shared), weights("two", shared, noise(2, 1000))
    steps = kept.hold("one", one.layout, one.file)
    next(steps)
    for keep_host in (False, True):
        placed = place(kept, "two", two, keep_host=keep_host)
        assert (contents(placed), placed.source) == (two.contents, "disk")
        kept.evict("two", "device")
    kept.validate()
    assert list(steps) == [None]
    assert place(kept, "two", two).source == "host"
    assert kept.memory().host_bytes == aligned(3 * MIB) + 1024


@pytest.mark.parametrize("cut", [False, True])
def test_a_hold_that_is_given_up_leaves_nothing(weights, cut):
    """Nor does one that fails after a while; what another model has of it by then is right."""
    kept, shared = store(16 * MIB // KIB, 16 * MIB // KIB, grain=16 * MIB), noise(0, 3 * MIB)
    one, two = weights("one", shared, noise(1, 3 * MIB)), weights("two", shared)
    steps = kept.hold("one", one.layout, one.file)
    next(steps)
    hold(kept, "two", two)
    if cut:
        os.truncate(one.path, 1 * MIB)
        with pytest.raises(Failed, match="cut short"):
            list(steps)
    else:
        steps.close()
    kept.validate()
    assert not kept.in_tier("one", "host")
    assert kept.memory().host_bytes == aligned(3 * MIB)
    assert contents(place(kept, "two", two)) == two.contents
