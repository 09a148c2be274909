from __future__ import annotations

import io
import itertools
import os
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.failures import Failed
from services.worker.engine.files import Piece, ScatteredFile
from shared.layout import Extent


@pytest.fixture
def scattered(tmp_path):
    """Bytes 0…999 of a file, whose middle lies in another."""
    data = bytes(index * 7 % 251 for index in range(1000))
    (tmp_path / "base").write_bytes(b"head" + data[:300] + data[700:])
    (tmp_path / "other").write_bytes(b"x" * 11 + data[300:700])
    file = ScatteredFile(
        [
            Extent(str(tmp_path / "base"), 4, 300),
            Extent(str(tmp_path / "other"), 11, 400),
            Extent(str(tmp_path / "base"), 304, 300),
        ]
    )
    yield file, data
    file.close()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def read(file, offset, nbytes):
    buffer = bytearray(nbytes)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_stretches_of_several_files_read_as_one(scattered):
    """A read may begin in one local file and end in another."""
    file, data = scattered
    assert file.size == 1000
    assert read(file, 0, 1000) == data
    assert read(file, 250, 600) == data[250:850]
    assert read(file, 1000, 0) == b""


def test_pieces_are_filled_each_with_its_own_bytes(scattered):
    """Also when they are out of order, overlap or have no bytes."""
    file, data = scattered
    spans = [(10, 5), (20, 0), (16, 300), (990, 10), (0, 40), (5, 100)]
    buffers = [bytearray(nbytes) for _, nbytes in spans]
    file.read_pieces(
        Piece(offset, memoryview(buffer))
        for (offset, _), buffer in zip(spans, buffers, strict=True)
    )
    for (offset, nbytes), buffer in zip(spans, buffers, strict=True):
        assert bytes(buffer) == data[offset : offset + nbytes]


def test_more_pieces_than_one_call_takes(tmp_path):
    """Thousands of small tensors need no thousands of calls, and are no error either."""
    data = os.urandom(9000)
    (tmp_path / "many").write_bytes(data)
    file = ScatteredFile([Extent(str(tmp_path / "many"), 0, len(data))])
    buffers = [bytearray(2) for _ in range(3000)]
    file.read_pieces(Piece(3 * index, memoryview(each)) for index, each in enumerate(buffers))
    assert b"".join(buffers) == b"".join(data[at : at + 2] for at in range(0, 9000, 3))
    file.close()


def test_a_zip_can_be_read_from_it(tmp_path):
    """It is a file as Python has files."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a", b"1" * 1000)
        archive.writestr("b", b"2" * 1000)
    data = whole.getvalue()
    (tmp_path / "one").write_bytes(data[:1200])
    (tmp_path / "two").write_bytes(data[1200:])
    file = ScatteredFile(
        [
            Extent(str(tmp_path / "one"), 0, 1200),
            Extent(str(tmp_path / "two"), 0, len(data) - 1200),
        ]
    )
    with file.open() as raw, zipfile.ZipFile(raw) as archive:
        assert archive.read("b") == b"2" * 1000
    assert read(file, 0, 4) == data[:4]
    file.close()


def test_positions_are_those_of_a_file(scattered):
    """Each opening has its own position; beyond the end there is nothing."""
    file, data = scattered
    with file.open() as one, file.open() as other:
        assert one.seek(-10, os.SEEK_END) == 990
        assert one.read(100) == data[990:]
        assert one.read(1) == b""
        assert one.seek(5, os.SEEK_CUR) == 1005
        assert one.read(1) == b""
        assert other.tell() == 0
        assert other.read() == data
        with pytest.raises(ValueError, match="no position"):
            one.seek(-1)


def test_reading_beyond_the_end_says_so(scattered):
    """A layout that promises more than the file has is the model's fault, with numbers."""
    file, _ = scattered
    with pytest.raises(Failed, match="bytes 990 to 1,010 are wanted, it has 1,000") as error:
        read(file, 990, 20)
    assert error.value.code == "model_failed"


def test_a_local_file_that_was_cut_short_says_so(tmp_path):
    """A truncated file never leaves a buffer half full without a word."""
    (tmp_path / "short").write_bytes(b"12345")
    file = ScatteredFile([Extent(str(tmp_path / "short"), 0, 10)])
    with pytest.raises(Failed, match="short is cut short: 5 bytes from 5 on are missing"):
        read(file, 0, 10)
    file.close()


def test_a_local_file_that_is_gone_says_so(tmp_path):
    """The path and the system's reason are told."""
    file = ScatteredFile([Extent(str(tmp_path / "gone"), 0, 10)])
    with pytest.raises(Failed, match=r"cannot read .*gone: No such file") as error:
        read(file, 0, 1)
    assert error.value.code == "model_failed"


def test_descriptors_are_few_and_given_back(tmp_path):
    """A file in hundreds of pieces does not take hundreds of descriptors."""
    before = open_files()
    extents = []
    for index in range(40):
        path = tmp_path / f"part{index}"
        path.write_bytes(bytes([index]) * 10)
        extents.append(Extent(str(path), 0, 10))
    file = ScatteredFile(extents)
    assert open_files() == before
    assert read(file, 0, 400) == b"".join(bytes([index]) * 10 for index in range(40))
    assert open_files() <= before + 8
    file.close()
    file.close()
    assert open_files() == before
    assert read(file, 395, 5) == bytes([39]) * 5
    file.close()


def test_several_threads_may_read(tmp_path):
    """None closes the descriptor from which another is reading."""
    extents = []
    for index in range(20):
        path = tmp_path / f"part{index}"
        path.write_bytes(bytes([index]) * 100)
        extents.append(Extent(str(path), 0, 100))
    file = ScatteredFile(extents)
    expected = b"".join(bytes([index]) * 100 for index in range(20))
    wrong = []

    def reader():
        wrong.extend(1 for _ in range(30) if read(file, 0, 2000) != expected)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    file.close()


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 500), max_size=6),
    spans=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=10),
)
def test_any_cut_of_a_file_reads_the_same(tmp_path_factory, cuts, spans):
    """However a file is scattered, and whatever is read of it."""
    folder = tmp_path_factory.mktemp("cuts")
    data = bytes(index % 256 for index in range(500))
    edges = [0, *sorted(cuts), 500]
    extents = []
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        path = folder / f"part{index}"
        path.write_bytes(bytes(index) + data[start:end])
        extents.append(Extent(str(path), index, end - start))
    file = ScatteredFile(extents)
    buffers = [bytearray(abs(b - a)) for a, b in spans]
    file.read_pieces(
        Piece(min(span), memoryview(buffer)) for span, buffer in zip(spans, buffers, strict=True)
    )
    for (a, b), buffer in zip(spans, buffers, strict=True):
        assert bytes(buffer) == data[min(a, b) : max(a, b)]
    file.close()
