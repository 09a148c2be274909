"""What a fuzz target is: one function that takes any bytes, and where its mutations begin.

A target runs what a border of Roost runs on bytes from outside. It returns, or raises one of the
errors that the border promises; these it catches itself. Whatever else comes out, or takes longer
or more memory than such bytes may, is a finding. Each target is written once: hypothesis mutates
its seeds in `make test` (tests/property/test_fuzz.py), atheris searches by coverage for as long
as one likes (`python -m tests.fuzz`).
"""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from shared.errors import RoostError
from shared.v2 import error_body

CPU_S: Final = 5.0
"""For one input of at most 64 KiB. What is linear takes milliseconds, on a busy machine too."""
BASE_BYTES: Final = 48 << 20
BYTES_PER_BYTE: Final = 400
"""Of memory, for each byte of an input, beside `BASE_BYTES`: an empty msgpack array of one byte
becomes a list of 56."""
MOST_BYTES: Final = 64 << 10

Run = Callable[[bytes], object]


class Target(NamedTuple):
    name: str
    run: Run
    seeds: Sequence[bytes]
    """Valid bytes, and what was found with others."""
    words: tuple[bytes, ...]
    """What a mutation may put in."""


TARGETS: Final[dict[str, Target]] = {}


def target(*seeds: bytes, words: Sequence[bytes] = ()) -> Callable[[Run], Run]:
    """Registers a function under its name."""

    def register(run: Run) -> Run:
        name = run.__name__
        TARGETS[name] = Target(name, run, tuple(seeds), tuple(words))
        return run

    return register


class Costly(AssertionError):
    """An input took more than inputs may."""


def timed(run: Run, data: bytes) -> None:
    """Raises `Costly` for what takes too long."""
    began = time.process_time()
    run(data)
    took = time.process_time() - began
    if took > CPU_S:
        raise Costly(f"{took:.1f} s of CPU for {len(data)} bytes")


def weighed(run: Run, data: bytes) -> None:
    """Raises `Costly` for what takes too much memory."""
    tracemalloc.start()
    try:
        run(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if peak > BASE_BYTES + BYTES_PER_BYTE * len(data):
        raise Costly(f"{peak:,} bytes of memory for {len(data)} bytes")


def sayable(error: RoostError) -> None:
    """A refusal's message can be sent, and is never long."""
    assert len(error_body(error.message)) < 10_000, error.message[:200]


EXTREMES: Final = (
    b"\0", b"\x7f", b"\x80", b"\xff", b"\xff\xff", b"\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff" * 8, b"\x7f" + b"\xff" * 7,
    b"\0\0\0\0\0\0\xf8\x7f", b"\x7f\xf8\0\0\0\0\0\0", b"\x7f\xf0\0\0\0\0\0\0", b"1e999", b"NaN",
    b"-1", b"9" * 40, b"[" * 600, b'{"":' * 300, b"\x91" * 1500, b"\x81\xa0" * 1500,
    b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc1", b"\xa2\xff\xfe",
    b"\xcb" + b"\xff" * 8,
)  # fmt: skip
"""Lengths, numbers and nestings at the ends of what can be said."""


def mutated(target: Target, edits: Sequence[int]) -> bytes:
    """Some seed, changed as the numbers say: the same numbers, the same bytes."""
    chance = random.Random(repr(edits))
    data = bytearray(chance.choice(target.seeds) if target.seeds else b"")
    for _ in edits:
        _edit(data, target, chance)
    return bytes(data[:MOST_BYTES])


def _edit(data: bytearray, target: Target, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(at + chance.choice((0, 1, 2, 4, 8, 30)), len(data))
    match chance.randrange(7):
        case 0 if data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at:end] = chance.choice(EXTREMES)
        case 3 if target.words:
            data[at:end] = chance.choice(target.words)
        case 4:
            other = chance.choice(target.seeds)
            cut = chance.randrange(len(other) + 1)
            data[at:] = other[cut:]
        case 5:
            data[at:at] = data[at:end] * chance.choice((1, 3, 40))
        case _:
            del data[at:end]


def chunks(data: bytes, most: int = 16) -> Iterator[bytes]:
    """The data in pieces, each after a byte that says its length."""
    at = 0
    while at < len(data) and most:
        yield data[at + 1 : at + 1 + data[at] * 4]
        at += 1 + data[at] * 4
        most -= 1
