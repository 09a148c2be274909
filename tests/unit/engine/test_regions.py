from __future__ import annotations

import ctypes
import resource

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.movers import (  # noqa: E402
    CpuMover,
    Read,
    Staging,
    fills,
    move_by_pieces,
    move_in_host,
    parts,
)
from services.worker.engine.places import Move, Place  # noqa: E402
from services.worker.engine.regions import HUGE_PAGE, HostRegion  # noqa: E402
from tests.unit.engine.engine_weights import Weights, anonymous_bytes, noise  # noqa: E402

pytestmark = pytest.mark.torch

MIB = 1 << 20


def test_only_what_is_backed_takes_memory():
    """The process' resident set grows by what is backed at once, without a fault later, and falls
    when it is given back, even while somebody still holds a view, who then reads zeros."""
    before = anonymous_bytes()
    region = HostRegion(1 << 40, 2 * MIB)
    assert anonymous_bytes() - before <= MIB
    region.back(Place(64 * MIB, 64 * MIB))
    assert anonymous_bytes() - before >= 63 * MIB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = region.typed(torch.uint8)[64 * MIB : 128 * MIB]
    kept.fill_(7)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 100
    region.give_back(Place(64 * MIB, 32 * MIB))
    assert 31 * MIB <= anonymous_bytes() - before <= 34 * MIB
    assert (kept[0], kept[-1]) == (0, 7)
    region.give_back(Place(96 * MIB, 32 * MIB))
    assert anonymous_bytes() - before <= 2 * MIB


@pytest.mark.parametrize("nbytes", [512, HUGE_PAGE - 512, 3 * MIB, 8 * MIB])
def test_all_of_a_region_can_be_written(nbytes):
    """The tensor and the buffer are the same bytes, from a huge page's begin to the last one."""
    region = HostRegion.whole(nbytes)
    assert region.address % HUGE_PAGE == 0
    region.view[:1] = region.view[-1:] = b"\x09"
    flat = region.typed(torch.uint8)
    assert flat.shape == (nbytes,)
    assert (flat[0], flat[-1]) == (9, 9)
    assert ctypes.string_at(region.address + nbytes - 1, 1) == b"\x09"


def test_a_tier_without_budget_has_a_region_of_nothing():
    """It needs no special case."""
    assert HostRegion(0, 2 * MIB).typed(torch.float32).shape == (0,)


@pytest.mark.parametrize("by", [512, 1024, 1536, 4096, 9216])
def test_bytes_move_towards_the_beginning_whole(by):
    """On a host and on a device, where no copy may overlap itself; others stay as they are."""
    content = bytearray(noise(1, 16384))
    source, target = Place(9216, 6144), Place(9216 - by, 6144)
    host = HostRegion.whole(16384)
    host.view[:] = content
    device, bounce = torch.frombuffer(bytearray(content), dtype=torch.uint8), torch.empty(1024)
    move_in_host(host, [Move(source, target)])
    move_by_pieces(device, source, target, bounce.to(torch.uint8))
    content[target.offset : target.end] = content[source.offset : source.end]
    left = source.offset, max(source.offset, target.end)
    content[left[0] : left[1]] = host.view[left[0] : left[1]]
    assert bytes(host.view) == content
    moved = device[target.offset : target.end].numpy().tobytes()
    assert moved == content[target.offset : target.end]
    assert device[: target.offset].numpy().tobytes() == content[: target.offset]


def test_copies_are_cut_where_grains_end():
    """A device copies at once only from what was registered with it at once."""
    assert list(parts(Place(500, 2000), 1000)) == [
        Place(500, 500),
        Place(1000, 1000),
        Place(2000, 500),
    ]
    assert list(parts(Place(1000, 0), 1000)) == []


def test_views_are_plain_tensors_whoever_asks():
    """No inference tensors, which a module could not take; the same flat tensor every time."""
    with torch.inference_mode():
        region = HostRegion.whole(4096)
        flat = region.typed(torch.bfloat16)
        assert flat.shape == (2048,)
        assert not flat.is_inference()
        assert not flat.as_strided((2, 2), (2, 1), 8).is_inference()
    assert region.typed(torch.bfloat16) is flat


def test_lots_are_of_the_room_that_there_is():
    """Large stretches are cut, small ones share a lot, and each lot's places are whole units."""
    region = HostRegion.whole(512)
    reads = [
        Read(10, 700, region, Place(0, 1024)),
        Read(900, 1, region, Place(1024, 512)),
        Read(1000, 1500, region, Place(2048, 1536)),
    ]
    lots = [[(each.offset, each.nbytes, each.place) for each in lot] for lot in fills(reads, 1024)]
    assert lots == [
        [(10, 700, Place(0, 1024))],
        [(900, 1, Place(1024, 512)), (1000, 512, Place(2048, 512))],
        [(1512, 988, Place(2560, 1024))],
    ]


@pytest.mark.parametrize("sizes", [(100, 3000, 0, 7), (8192,), (512,) * 9, ()])
def test_staged_bytes_arrive_and_no_half_is_filled_while_it_is_copied(tmp_path, sizes):
    """Before a half is filled again, its copies have been waited for; what lies together goes
    in one copy."""
    weights = Weights(tmp_path, "m", [noise(index, size) for index, size in enumerate(sizes)])
    target, halves = HostRegion.whole(16384), [HostRegion.whole(1024) for _ in range(2)]
    cpu, pending, copies = CpuMover(), [], []

    def copy(source, at, region, to):
        copies.append(to)
        pending.append((source, at, region, to))

    def mark():
        def wait():  # a device that does nothing before it is waited for
            while pending:
                cpu.copy(*pending.pop(0))

        return wait

    reads, end = [], 0
    for block in weights.layout.blocks:
        place = Place(end, -(-block.nbytes // 512) * 512)
        reads.append(Read(block.offset, block.nbytes, target, place))
        end += place.nbytes
    staging = Staging(halves, copy, mark)
    staging.read(weights.file, reads)
    mark()()
    for read, content in zip(reads, weights.contents, strict=True):
        assert bytes(target.view[read.place.offset :][: len(content)]) == content
    assert len(copies) == -(-end // 1024)
    weights.file.close()
