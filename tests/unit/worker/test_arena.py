from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.worker.arena import ALIGNMENT, Allocator, Arena, aligned


def test_both_ends_see_the_same_bytes():
    """What one mapping of a region writes, another mapping of its descriptor reads."""
    writer = Arena.create("test", 4096)
    reader = Arena.attach(os.dup(writer.fd))
    writer.view[10:15] = b"hello"
    assert bytes(reader.view[10:15]) == b"hello"
    assert reader.capacity == 4096
    reader.close()
    writer.close()


def test_a_region_is_larger_than_dev_shm_allows():
    """A region of many gigabytes can be made: only pages that are written take memory."""
    arena = Arena.create("large", 1 << 36)
    arena.view[(1 << 36) - 1] = 7
    assert arena.capacity == 1 << 36
    arena.close()


def test_nobody_can_shrink_a_region():
    """The engine cannot truncate a region under the agent's feet."""
    arena = Arena.create("sealed", 8192)
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    arena.close()


def test_a_region_without_memfd_is_a_temporary_file(monkeypatch):
    """Where the system has no anonymous files, an unlinked temporary one serves."""
    monkeypatch.delattr(os, "memfd_create")
    arena = Arena.create("fallback", 100)
    arena.view[99] = 1
    assert os.fstat(arena.fd).st_nlink == 0
    arena.close()


def test_an_empty_region_is_refused():
    """A region of no bytes cannot be mapped, and the error says so."""
    with pytest.raises(ValueError, match="at least one byte"):
        Arena.create("none", 0)


def test_closing_twice_and_with_views_alive_is_harmless():
    """A tensor that still looks at the region keeps it readable after `close`."""
    arena = Arena.create("view", 64)
    kept = arena.view[:4]
    arena.close()
    arena.close()
    assert bytes(kept) == bytes(4)


def test_the_whole_region_can_be_one_block():
    """The largest block is the capacity, and a byte more is refused."""
    allocator = Allocator(1000)
    assert allocator.capacity == 960
    assert allocator.alloc(961) is None
    assert allocator.alloc(960) == 0
    assert allocator.alloc(0) is None


def test_zero_bytes_get_their_own_block():
    """Empty tensors have offsets of their own, so that each can be freed by its offset."""
    allocator = Allocator(256)
    assert allocator.alloc(0) != allocator.alloc(0)
    assert allocator.used == 2 * ALIGNMENT


def test_freeing_what_is_not_a_block_is_an_error():
    """A double free is a fault of the caller and does not corrupt the list."""
    allocator = Allocator(256)
    offset = allocator.alloc(1)
    assert offset is not None
    allocator.free(offset)
    with pytest.raises(ValueError, match="no block begins at 0"):
        allocator.free(offset)
    with pytest.raises(ValueError, match="cannot have -1 bytes"):
        allocator.alloc(-1)
    allocator.validate()


@given(st.integers(min_value=0, max_value=1 << 40))
def test_sizes_are_rounded_up_by_less_than_a_unit(nbytes):
    """A block wastes less than one unit, except that an empty one takes a whole unit."""
    assert aligned(nbytes) % ALIGNMENT == 0
    assert nbytes <= aligned(nbytes) < max(nbytes, 1) + ALIGNMENT


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of taking and giving back keeps the allocator's laws."""

    def __init__(self):
        super().__init__()
        self.allocator = Allocator(4096)
        self.held: dict[int, int] = {}

    blocks = Bundle("blocks")

    @rule(target=blocks, nbytes=st.integers(min_value=0, max_value=2000))
    def take(self, nbytes):
        offset = self.allocator.alloc(nbytes)
        if offset is None:
            return -1
        for start, size in self.held.items():
            assert offset + nbytes <= start or start + size <= offset
        assert offset + nbytes <= self.allocator.capacity
        self.held[offset] = nbytes
        return offset

    @rule(offset=consumes(blocks))
    def give_back(self, offset):
        if offset < 0:
            return
        del self.held[offset]
        self.allocator.free(offset)
        if not self.held:
            whole = self.allocator.alloc(self.allocator.capacity)
            assert whole == 0
            self.allocator.free(0)

    @invariant()
    def the_laws_hold(self):
        self.allocator.validate()


TestAllocator = AllocatorMachine.TestCase
