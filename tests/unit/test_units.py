"""Bytes as people write and read them."""

from __future__ import annotations

import pytest

from shared.units import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("512 MB", 512_000_000),
        ("1.5g", 1_500_000_000),
        ("2Gi", 2 << 30),
        ("17", 17),
        (17, 17),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    """Units with an i are binary, others decimal."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["4 apples", "-1", "", "GiB", "1e9", "i"])
def test_what_is_no_size_is_refused(text):
    """The error says what was expected."""
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (45_620_907, "45.6 MB"), (2_771_522_672, "2.77 GB")],
)
def test_sizes_are_shown_in_three_digits(size, text):
    """Decimal units, so that they can be compared with what disks and networks say."""
    assert show_bytes(size) == text
