from __future__ import annotations

import io
import pickle
import struct
import zipfile

import pytest

from shared import archive as module
from shared.archive import check_torchscript
from shared.errors import InvalidRequest
from tests.archives import TORCHSCRIPT, archive, torchscript


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        check_torchscript(io.BytesIO(data))
    return str(caught.value)


def without(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in TORCHSCRIPT.items() if name not in names}


def test_accepts_torchscript(tmp_path):
    """What has the members of a TorchScript file passes, from a path or an open file."""
    path = tmp_path / "model.pt"
    path.write_bytes(torchscript())
    check_torchscript(path)
    check_torchscript(str(path))
    with path.open("rb") as file:
        check_torchscript(file)
        assert not file.closed


def test_accepts_the_newer_place_of_the_version():
    """Newer torch writes the version below `.data/`."""
    check_torchscript(io.BytesIO(archive({**without("version"), ".data/version": b"3\n"})))


def test_accepts_zip64():
    """Files beyond 4 GiB have a second end record, which is read too."""
    data = torchscript()
    end = data.rfind(b"PK\x05\x06")
    _, _, _, _, count, length, offset, _ = struct.unpack("<4s4H2LH", data[end:])
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    check_torchscript(io.BytesIO(data[:end] + wide + locator + last))
    assert "damaged" in refusal(data[:end] + bytes(len(wide)) + locator + last)


@pytest.mark.torch
def test_accepts_what_torch_writes(tmp_path):
    """A scripted module, saved, passes; its checkpoints, old and new, are told apart."""
    import torch

    model = torch.nn.Linear(2, 2)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    check_torchscript(tmp_path / "model.pt")
    for legacy in (True, False):
        torch.save(
            model.state_dict(),
            tmp_path / "state.pt",
            _use_new_zipfile_serialization=not legacy,
        )
        with pytest.raises(InvalidRequest, match=r"a torch.save checkpoint, not TorchScript"):
            check_torchscript(tmp_path / "state.pt")


def test_tells_what_is_no_zip():
    """Empty files, other formats and pickles each get their own words."""
    assert "empty" in refusal(b"")
    assert "not a zip" in refusal(b"ONNX or anything else")
    assert "a pickle" in refusal(pickle.dumps({"weights": [1.0]}))
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100)
    assert "torch.save checkpoint" in refusal(legacy)


def test_tells_a_checkpoint_and_an_export():
    """A checkpoint, and a torch.export package, come with the way out."""
    checkpoint = refusal(archive(without("code/__torch__.py", "constants.pkl")))
    assert checkpoint == (
        "a torch.save checkpoint, not TorchScript: export with torch.jit.trace/script and .save()"
    )
    exported = refusal(archive({"archive_format": b"pt2", "models/model.json": b"{}"}))
    assert "torch.export package" in exported


def test_names_what_is_missing():
    """A zip that is nearly TorchScript hears what it lacks."""
    assert "model/constants.pkl" in refusal(archive(without("constants.pkl")))
    assert "model/version" in refusal(archive(without("version")))
    assert "model/code/" in refusal(archive(without("data.pkl", "code/__torch__.py")))
    assert "root folder" in refusal(archive(TORCHSCRIPT, root=""))
    assert "root folder" in refusal(archive({}))


def test_every_truncation_is_refused():
    """However short a file was cut, it never passes, and never fails in another way."""
    whole = torchscript()
    for length in range(len(whole)):
        assert refusal(whole[:length])
    assert "truncated" in refusal(whole[: len(whole) // 2])


def test_padding_is_refused():
    """Bytes before or behind the archive mean that something went wrong on its way."""
    whole = torchscript()
    assert refusal(b"PK" + whole)
    assert "directory" in refusal(whole[:-22] + b"garbage" + whole[-22:])


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a\\..\\x", "/etc/x"])
def test_unsafe_names_are_refused(name):
    """No entry may point out of its folder."""
    root = "" if name.startswith("/") else "model"
    entries = {f"model/{key}": data for key, data in TORCHSCRIPT.items()}
    assert "unsafe name" in refusal(
        archive({**entries, f"{root}/{name}" if root else name: b""}, "")
    )


def test_repeated_names_are_refused():
    """Two entries of one name would mean two things to two readers."""
    buffer = io.BytesIO(torchscript())
    with zipfile.ZipFile(buffer, "a") as target, pytest.warns(UserWarning, match="Duplicate"):
        target.writestr("model/version", b"4\n")
    assert "two entries" in refusal(buffer.getvalue())


def test_a_zip_bomb_is_refused():
    """What would unpack to far more than the file is called by its name."""
    bomb = {**TORCHSCRIPT, "data/1": bytes(70 << 20)}
    assert "a zip bomb" in refusal(archive(bomb, compression=zipfile.ZIP_DEFLATED))


def test_a_code_bomb_is_refused(monkeypatch):
    """One huge code file is refused even where the whole file is large."""
    monkeypatch.setattr(module, "MAX_CODE_BYTES", 1000)
    bomb = {**TORCHSCRIPT, "code/x.py": bytes(1001)}
    assert "a zip bomb: code file" in refusal(archive(bomb))


def test_overlapping_entries_are_refused():
    """Many entries over the same bytes are a bomb in which each is harmless."""
    data = bytearray(torchscript())
    start = struct.unpack_from("<L", data, data.rfind(b"PK\x05\x06") + 16)[0]
    second = data.index(b"PK\x01\x02", start + 4)
    data[second + 42 : second + 46] = bytes(4)  # its local header: the first entry's
    assert "overlaps" in refusal(bytes(data))


def test_too_many_entries_are_refused(monkeypatch):
    """The number of entries is bounded by what the directory says and by what it holds."""
    monkeypatch.setattr(module, "MAX_ENTRIES", 4)
    assert "5 entries" in refusal(torchscript())
    data = bytearray(torchscript())
    end = data.rfind(b"PK\x05\x06")
    data[end + 8 : end + 12] = struct.pack("<2H", 1, 1)
    assert "more than the 4 entries" in refusal(bytes(data))


def test_lying_sizes_are_refused():
    """A stored entry has one size; encryption and odd compressions are not torch's."""
    whole = torchscript()
    start = struct.unpack_from("<L", whole, whole.rfind(b"PK\x05\x06") + 16)[0]
    for offset, value, expected in (
        (24, 99, "sizes differ"),
        (8, 1, "encrypted"),
        (10, 12, "compress"),
    ):
        data = bytearray(whole)
        data[start + offset] = value
        assert expected in refusal(bytes(data))
