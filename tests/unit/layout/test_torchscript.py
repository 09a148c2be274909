"""Layouts of files written by hand: what torch itself writes is in test_torch_files.py."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc

import pytest

from shared.errors import InvalidRequest
from shared.layout import Block, Layout, Slot, decode, encode, objects, torchscript
from shared.layout.torchscript import read_layout
from tests.archives import torchscript as fake
from tests.hostile import CODE_BOMBS
from tests.torchscript_files import (
    Made,
    Name,
    Raw,
    Tensor,
    Thing,
    archive,
    entries,
    module,
    pickle,
    weights,
)

FOUR = struct.pack("<4f", 1, 2, 3, 4)
CODE = {"__torch__": module(attributes=["w : Tensor"])}


def read(data: bytes) -> Layout:
    return read_layout(io.BytesIO(data))


def layout(
    storages: dict[str, bytes] | None = None, constants: object = (), code: object = None,
    more: dict[str, bytes] | None = None, **state: object,
) -> Layout:  # fmt: skip
    """Of a module with these attributes."""
    members = entries(
        Thing("__torch__.M", **state), storages or {"0": FOUR}, code or CODE, constants
    )
    return read(archive({**members, **(more or {})}))


def test_a_file_is_taken_apart():
    """Each tensor attribute is a slot over a block, which is known by its content."""
    data = weights(a=FOUR, b=bytes(8))
    found = read(data)
    assert found.obstacle is None
    assert found.slots == (
        Slot(("a",), 0, "float32", 0, (4,), (1,)),
        Slot(("b",), 1, "float32", 0, (2,), (1,)),
    )
    assert [block.digest for block in found.blocks] == [
        hashlib.sha256(FOUR).digest(), hashlib.sha256(bytes(8)).digest(),
    ]  # fmt: skip
    assert [data[b.offset : b.offset + b.nbytes] for b in found.blocks] == [FOUR, bytes(8)]
    assert found.weights_bytes == 1024
    assert not found.may_write
    assert decode(encode(found)) == found


def test_a_path_will_do(tmp_path):
    """A file is read from a path as well, and shares are left out when nobody wants them."""
    path = tmp_path / "model.pt"
    path.write_bytes(weights(a=FOUR))
    assert read_layout(path) == read_layout(str(path)) == read(weights(a=FOUR))
    assert read_layout(path).shares
    assert not read_layout(path, share=False).shares


def test_other_weights_are_the_same_architecture():
    """Contents, the archive's name and its notes make no difference."""
    one = read(weights(a=FOUR, b=bytes(8)))
    other = read(weights("other", a=bytes(16), b=bytes(8)))
    assert one.architecture == other.architecture
    noted = layout(w=Tensor("0", 4), more={".data/serialization_id": b"7", "extra/x": b"note"})
    assert noted.architecture == layout(w=Tensor("0", 4)).architecture


def test_keys_and_devices_of_storages_make_no_difference():
    """How a storage was called, and from which device it was saved."""
    one = layout(w=Tensor("0", 4))
    assert layout({"9": FOUR}, w=Tensor("9", 4)).architecture == one.architecture
    assert layout(w=Tensor("0", 4, device="cuda:1")).architecture == one.architecture
    assert layout(w=Tensor("0", 4, grad=True)).architecture == one.architecture


DIFFERENT = {
    "dtype": {"w": Tensor("0", 4, kind="torch.IntStorage")},
    "shape": {"w": Tensor("0", 4, (2, 2), (2, 1))},
    "stride": {"w": Tensor("0", 4, (2, 2), (1, 2))},
    "start": {"w": Tensor("0", 4, (3,), start=1)},
    "name": {"v": Tensor("0", 4)},
    "a flag": {"w": Tensor("0", 4), "training": False},
    "another flag": {"w": Tensor("0", 4), "training": True},
    "a number": {"w": Tensor("0", 4), "training": 1},
    "a float": {"w": Tensor("0", 4), "training": 1.0},
    "a text": {"w": Tensor("0", 4), "training": "True"},
    "none": {"w": Tensor("0", 4), "training": None},
    "a list": {"w": Tensor("0", 4), "l": Made("torch.jit._pickle.build_intlist", ([1, 2],))},
    "a longer list": {"w": Tensor("0", 4), "l": Made("torch.jit._pickle.build_intlist", ([1],))},
    "a tuple": {"w": Tensor("0", 4), "l": (1, 2)},
    "a table": {"w": Tensor("0", 4), "l": {"1": 2}},
    "tying": {"w": Tensor("0", 4), "v": Tensor("0", 4)},
    "no tying": {"w": Tensor("0", 4), "v": Tensor("1", 4)},
    "a submodule": {"w": Tensor("0", 4), "m": Thing("__torch__.M")},
}


def test_whatever_differs_makes_another_architecture():
    """Attributes, their order, dtypes, views, tying, storage sizes, code and constants."""
    keys = {
        name: layout({"0": FOUR, "1": FOUR}, **state).architecture
        for name, state in DIFFERENT.items()
    }
    w = Tensor("0", 4)
    keys["plain"] = layout(w=w).architecture
    keys["code"] = layout(
        w=w, code={"__torch__": module(body="    return torch.neg(x)\n")}
    ).architecture
    keys["version"] = layout(w=w, more={"version": b"4\n"}).architecture
    keys["constant"] = layout(
        w=w, constants=(Tensor("0", 4),), more={"constants/0": FOUR}
    ).architecture
    keys["other constant"] = layout(
        w=w, constants=(Tensor("0", 4),), more={"constants/0": bytes(16)}
    ).architecture
    keys["storage"] = layout({"0": bytes(20)}, w=Tensor("0", 5, (4,))).architecture
    keys["order"] = layout({"0": FOUR, "1": FOUR}, v=Tensor("1", 4), w=w).architecture
    assert all(keys.values())
    assert len(set(keys.values())) == len(keys)


def test_gradients_count_where_the_code_asks():
    """A program that looks at `requires_grad` is another one when that differs."""
    code = {"__torch__": module(body="    y = torch.requires_grad(self.w)\n    return x\n")}
    one, other = (layout(w=Tensor("0", 4, grad=grad), code=code) for grad in (True, False))
    assert one.architecture != other.architecture


def test_shared_modules_are_visited_once():
    """A submodule that two attributes name gives its tensors once; a tensor that two attributes
    name gives two slots."""
    once = Thing("__torch__.M", w=Tensor("0", 4)).write()
    memo = Raw(once + b"q\x07"), Raw(b"h\x07")
    found = layout(a=memo[0], b=memo[1])
    assert [slot.path for slot in found.slots] == [("a", "w")]
    twice = Raw(Tensor("0", 4).write() + b"q\x07"), Raw(b"h\x07")
    found = layout(a=twice[0], b=twice[1])
    assert [(slot.path, slot.block) for slot in found.slots] == [(("a",), 0), (("b",), 0)]
    assert len(found.blocks) == 1


def deep(depth: int) -> Thing:
    thing = Thing("__torch__.M", w=Tensor("0", 4))
    for _ in range(depth):
        thing = Thing("__torch__.M", m=thing)
    return thing


OBSTACLES = {
    "list": ({"l": [Tensor("0", 4)]}, "list, dict, tuple"),
    "tensor list": (
        {"l": Made("torch.jit._pickle.build_tensorlist", ([Tensor("0", 4)],))}, "list, dict",
    ),
    "dict": ({"l": {"a": Tensor("0", 4)}}, "list, dict, tuple"),
    "tuple": ({"l": (Tensor("0", 4),)}, "list, dict, tuple"),
    "module in a list": ({"l": [Thing("__torch__.M")]}, "module in a list"),
    "tied to a list": (
        {"a": Raw(Tensor("0", 4).write() + b"q\x07"), "b": [Raw(b"h\x07")]}, "list, dict, tuple",
    ),
    "quantized": ({"w": Tensor("0", 4, kind="torch.QInt8Storage")}, "QInt8Storage"),
    "rebuilt otherwise": ({"w": Made("torch._utils._rebuild_qtensor", (1,))}, "_rebuild_qtensor"),
    "unknown call": ({"w": Made("os.system", ("true",))}, "os.system"),
    "a name": ({"w": Name("os.system")}, "os.system"),
    "own class": ({"w": Thing("__torch__.Absent")}, "does not define"),
    "C++ object": ({"w": Thing("__torch__.torch.classes.a.B")}, "does not define"),
    "own state": ({"w": Raw(b"c__torch__\nM\n)\x81(K\x01tb")}, "state of its own"),
    "no state": ({"w": Raw(b"c__torch__\nM\n)\x81")}, "state of its own"),
    "meta": ({"w": Tensor("0", 4, device="meta")}, "device 'meta'"),
    "beyond": ({"w": Tensor("0", 4, (5,))}, "beyond its storage"),
    "far beyond": ({"w": Tensor("0", 4, (2, 2), (2**40, 1))}, "beyond its storage"),
    "negative": ({"w": Tensor("0", 4, (-1,))}, "impossible shape"),
    "crooked": ({"w": Tensor("0", 4, (4,), (1, 1))}, "no storage could hold"),
    "no storage": ({"w": Tensor("8", 4)}, "has no data/8"),
    "short storage": ({"w": Tensor("0", 9)}, "has 16 bytes, not 36"),
    "two sizes": ({"w": Tensor("0", 4), "v": Tensor("0", 5)}, "disagree"),
    "storage itself": ({"w": Raw(b"K\x01Q")}, "outside of a tensor"),
    "great number": ({"w": Raw(b"\x8a\x09" + b"\xff" * 8 + b"\x00")}, "64 bits"),
    "twice": ({"m": Raw(b"c__torch__\nM\n)\x81}(X\1\0\0\0aNX\1\0\0\0aNub")}, "twice"),
    "deep": ({"m": deep(150)}, "nested"),
}  # fmt: skip


@pytest.mark.parametrize("case", OBSTACLES)
def test_what_is_not_understood_is_an_obstacle(case):
    """Such a file has no architecture, no slots and no shares, but says why."""
    state, reason = OBSTACLES[case]
    found = layout(**state)
    assert reason in str(found.obstacle)
    assert (found.architecture, found.slots, found.shares) == ("", (), ())
    assert found.may_write


def members(**change: bytes | None) -> bytes:
    """A sound file with some members changed or left out."""
    sound = entries(Thing("__torch__.M", w=Tensor("0", 4)), {"0": FOUR}, CODE)
    changed = {**sound, **{name.replace("__", "/", 1): data for name, data in change.items()}}
    return archive({name: data for name, data in changed.items() if data is not None})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (members(byteorder=b"big"), "big-endian"),
        (members(**{"model.json": b"{}"}), "before torch 1.4"),
        (members(**{"data.pkl": b"\x80\x02"}), "cut off"),
        (members(**{"data.pkl": b"\x80\x02N."}), "root is not a module"),
        (members(**{"constants.pkl": b"\x80\x02NN."}), "ends before"),
        (members(**{"constants.pkl": pickle((Thing("__torch__.M"),))}), "among its constants"),
        (members(**{"code/__torch__.py": b"\xff\xfe"}), "not UTF-8"),
        (
            members(**{"code/__torch__.py": b"class M(Module):\n  def __setstate__(self):\n"}),
            "__set",
        ),
        (fake(), "ends before"),
    ],
)
def test_odd_members_are_obstacles(data, reason):
    """What is wrong with any part of the file is told; its blocks are known all the same."""
    found = read(data)
    assert reason in str(found.obstacle)
    assert [block.nbytes for block in found.blocks] in ([16], [64])


def test_compressed_storages_are_an_obstacle():
    """torch does not write them; they cannot be copied to a device as they lie."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in entries(
            Thing("__torch__.M", w=Tensor("0", 64)), {"0": bytes(256)}, CODE
        ).items():
            target.writestr(f"m/{name}", data)
    found = read(buffer.getvalue())
    assert "compressed" in str(found.obstacle)
    assert found.blocks == ()


def test_what_is_no_torchscript_is_refused():
    """The check of the archive speaks first."""
    with pytest.raises(InvalidRequest, match="not a zip"):
        read(b"anything else")
    with pytest.raises(InvalidRequest, match="truncated"):
        read(weights(a=FOUR)[:-30])


def test_storages_are_where_torch_looks_for_them():
    """Local headers may be longer than the directory knows: torch aligns what follows."""
    plain = weights(a=FOUR)
    at = plain.index(FOUR)
    assert read(plain).blocks == (Block(hashlib.sha256(FOUR).digest(), at, 16),)
    damaged = bytearray(plain)
    header = plain.index(b"PK\x03\x04")
    damaged[header + 28 : header + 30] = b"\xff\xff"  # an extra field that reaches too far
    assert "is not where" in str(read(bytes(damaged)).obstacle)


def test_limits_are_kept(monkeypatch):
    """Too much code, too large a pickle and a graph that grows as it is written out are obstacles,
    not work."""
    data = weights(a=FOUR, b=FOUR)
    monkeypatch.setattr(torchscript, "MAX_CODE_BYTES", 20)
    assert "at most 20" in str(read(data).obstacle)
    monkeypatch.undo()
    monkeypatch.setattr(torchscript, "MAX_PICKLE_BYTES", 30)
    assert "at most 30" in str(read(data).obstacle)
    monkeypatch.undo()
    monkeypatch.setattr(objects, "MAX_WRITTEN", 100)
    assert "written out" in str(read(data).obstacle)


def test_long_names_are_not_multiplied():
    """A text that a pickle names a hundred thousand times is written out once."""
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x01"
    many = Raw(b"(" + text + b"h\x01" * 100_000 + b"t")
    assert layout(w=Tensor("0", 4), t=many).obstacle is None


@pytest.mark.parametrize("case", CODE_BOMBS)
def test_hostile_code_costs_little_memory(case):
    """A few kilobytes, unpacked and taken apart, are never hundreds of megabytes."""
    data = CODE_BOMBS[case]()
    tracemalloc.start()
    try:
        read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20


def test_more_constants_than_a_program_has_are_weights(monkeypatch):
    """A file whose constants would fill a device is served as it is."""
    monkeypatch.setattr(torchscript, "MAX_CONSTANT_BYTES", 31)
    constants = {"constants/0": FOUR, "constants/1": FOUR}
    found = layout(constants=(Tensor("0", 4), Tensor("1", 4)), more=constants)
    assert found.obstacle == "its constants have 32 bytes, more than 31"
    assert layout(constants=(Tensor("0", 4),), more={"constants/0": FOUR}).obstacle is None
