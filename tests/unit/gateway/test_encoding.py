from __future__ import annotations

import gzip
import zlib

import pytest

from services.gateway.encoding import compressed, wanted_coding


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b" GZIP ; q=0.5", b"gzip"),
        (b"gzip, identity;q=0.5", b"gzip"),
        (b"gzip, br;q=0", b"gzip"),
        (None, None),
        (b"", None),
        (b"identity", None),
        (b"*", None),
        (b"br", None),
        (b"gzip;q=0", None),
        (b"gzip;q=0.000", None),
        (b"gzip, deflate", None),
        (b"gzip, deflate, br", None),
        (b",;,", None),
    ],
)
def test_one_coding_is_a_wish_several_are_an_offer(header, coding):
    """Libraries offer all they know with every request."""
    assert wanted_coding(header) == coding


@pytest.mark.parametrize("size", [1000, 100_000])
async def test_what_is_compressed_unpacks_to_what_it_was(size):
    """On the spot or in a thread."""
    body = bytes(size)
    assert gzip.decompress(await compressed(body, b"gzip")) == body
    assert zlib.decompress(await compressed(body, b"deflate")) == body


async def test_little_is_sent_as_it_is():
    """It would only grow."""
    assert await compressed(b"{}", b"gzip") is None
