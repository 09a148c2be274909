from __future__ import annotations

import ctypes
import resource

import pytest

torch = pytest.importorskip("torch")

from services.worker.engine.extents import Place  # noqa: E402
from services.worker.engine.movers import CpuMover, Read, Staging, fills  # noqa: E402
from services.worker.engine.slabs import HUGE_PAGE, HostSlab  # noqa: E402
from tests.unit.engine.engine_weights import Weights, anonymous_bytes, noise  # noqa: E402

pytestmark = pytest.mark.torch

MIB = 1 << 20


def test_a_slab_is_there_from_the_start_and_gone_at_the_end():
    """The process' resident set grows by the slab at once, and falls by it at its release, even
    while somebody still holds a view, who then reads zeros."""
    before = anonymous_bytes()
    slab = HostSlab(64 * MIB)
    assert anonymous_bytes() - before >= 63 * MIB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    slab.typed(torch.uint8).fill_(7)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 100
    kept = slab.typed(torch.uint8)[5:8]
    slab.release()
    assert anonymous_bytes() - before <= 2 * MIB
    assert kept.tolist() == [0, 0, 0]


@pytest.mark.parametrize("nbytes", [512, HUGE_PAGE - 512, 3 * MIB, 8 * MIB])
def test_all_of_a_slab_can_be_written(nbytes):
    """The tensor and the buffer are the same bytes, from a huge page's begin to the last one."""
    slab = HostSlab(nbytes)
    assert slab.address % HUGE_PAGE == 0
    slab.view[:1] = slab.view[-1:] = b"\x09"
    flat = slab.typed(torch.uint8)
    assert flat.shape == (nbytes,)
    assert (flat[0], flat[-1]) == (9, 9)
    assert ctypes.string_at(slab.address + nbytes - 1, 1) == b"\x09"
    slab.release()


def test_views_are_plain_tensors_whoever_asks():
    """No inference tensors, which a module could not take; the same flat tensor every time."""
    with torch.inference_mode():
        slab = HostSlab(4096)
        flat = slab.typed(torch.bfloat16)
        assert flat.shape == (2048,)
        assert not flat.is_inference()
        assert not flat.as_strided((2, 2), (2, 1), 8).is_inference()
    assert slab.typed(torch.bfloat16) is flat


def test_lots_are_of_the_room_that_there_is():
    """Large stretches are cut, small ones share a lot, and each lot's places are whole units."""
    slab = HostSlab(512)
    reads = [
        Read(10, 700, slab, Place(1, 0, 1024)),
        Read(900, 1, slab, Place(1, 1024, 512)),
        Read(1000, 1500, slab, Place(2, 0, 1536)),
    ]
    lots = [[(each.offset, each.nbytes, each.place) for each in lot] for lot in fills(reads, 1024)]
    assert lots == [
        [(10, 700, Place(1, 0, 1024))],
        [(900, 1, Place(1, 1024, 512)), (1000, 512, Place(2, 0, 512))],
        [(1512, 988, Place(2, 512, 1024))],
    ]


@pytest.mark.parametrize("sizes", [(100, 3000, 0, 7), (8192,), (512,) * 9, ()])
def test_staged_bytes_arrive_and_no_half_is_filled_while_it_is_copied(tmp_path, sizes):
    """Before a half is filled again, its copies have been waited for; what lies together goes
    in one copy."""
    weights = Weights(tmp_path, "m", [noise(index, size) for index, size in enumerate(sizes)])
    target, halves = HostSlab(16384), [HostSlab(1024), HostSlab(1024)]
    cpu, pending, copies = CpuMover(), [], []

    def copy(source, at, slab, to):
        copies.append(to)
        pending.append((source, at, slab, to))

    def mark():
        def wait():  # a device that does nothing before it is waited for
            while pending:
                cpu.copy(*pending.pop(0))

        return wait

    reads, end = [], 0
    for block in weights.layout.blocks:
        place = Place(1, end, -(-block.nbytes // 512) * 512)
        reads.append(Read(block.offset, block.nbytes, target, place))
        end += place.nbytes
    staging = Staging(halves, copy, mark)
    staging.read(weights.file, reads)
    mark()()
    for read, content in zip(reads, weights.contents, strict=True):
        assert bytes(target.view[read.place.offset :][: len(content)]) == content
    assert len(copies) == -(-end // 1024)
    weights.file.close()
