from __future__ import annotations

import contextlib
import hashlib
import io
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidRequest
from shared.layout import Block, Layout, decode, encode
from shared.layout.pickled import read_pickle
from shared.layout.records import Unreadable
from shared.layout.torchscript import read_layout
from shared.layout.writes import may_write
from shared.recipes import Assembled, cut, decode_recipe, encode_recipe, extents, write_recipe
from tests.torchscript_files import Made, Tensor, Thing, archive, entries, module

STORAGES = {"0": bytes(range(64)), "1": bytes(32), "2": b""}
ATTRIBUTES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=5),
    st.tuples(st.integers(0, 3), st.text(max_size=2)),
    st.lists(st.integers(0, 3), max_size=3).map(
        lambda numbers: Made("torch.jit._pickle.build_intlist", (numbers,))
    ),
    st.builds(
        lambda key, rows, columns, start, turned: Tensor(
            key, len(STORAGES[key]) // 4, (rows, columns),
            (1, rows) if turned else (columns, 1), start,
        ),
        st.sampled_from(["0", "1"]), st.integers(0, 2), st.integers(1, 3), st.integers(0, 2),
        st.booleans(),
    ),
    st.builds(lambda: Tensor("2", 0)),
)  # fmt: skip
NAMES = st.sampled_from(["a", "b", "c", "weight"])


@st.composite
def modules(draw, depth=2):
    state = draw(st.dictionaries(NAMES, ATTRIBUTES, max_size=3))
    if depth:
        state |= draw(st.dictionaries(st.sampled_from("xyz"), modules(depth - 1), max_size=2))
    return Thing("__torch__.M", **state)


def plain(value):
    """What a module says, as a text that differs when it does."""
    if isinstance(value, Thing):
        return "{" + ",".join(f"{name}:{plain(each)}" for name, each in value.state.items()) + "}"
    if isinstance(value, Tensor):
        return f"t{value.storage[2:]}{value.rest}"
    if isinstance(value, Made):
        return f"{value.name}{value.argument}"
    return f"{type(value).__name__}{value!r}"


def shape(root):
    """The same without the names of storages: only the order in which they are met."""
    text = plain(root)
    met = sorted(
        (key for key in ("'0'", "'1'") if f"t({key}" in text), key=lambda k: text.find(f"t({k}")
    )
    for number, key in enumerate(met):
        text = text.replace(f"t({key}", f"t<{number}>")
    return text


def read(root) -> Layout:
    code = {"__torch__": module()}
    return read_layout(io.BytesIO(archive(entries(root, STORAGES, code))))


@given(modules(), modules())
@settings(max_examples=150, deadline=None)
def test_architectures_are_equal_when_programs_are(one, other):
    """Equal modules have equal keys, different ones different keys, whatever is in them."""
    first, second = read(one), read(other)
    assert first.obstacle is None
    assert read(one) == first
    assert decode(encode(first)) == first
    assert (shape(one) == shape(other)) == (first.architecture == second.architecture)
    for slot in first.slots:
        block = first.blocks[slot.block]
        last = slot.start + sum(
            (n - 1) * s for n, s in zip(slot.shape, slot.stride, strict=True) if n
        )
        assert 0 in slot.shape or 4 * last < block.nbytes


SOUND = archive(
    entries(
        Thing("__torch__.M", a=Tensor("0", 16), b=Thing("__torch__.M", w=Tensor("1", 8)), n=1),
        STORAGES,
        {"__torch__": module(body="    y = torch.neg(x)\n    return y\n")},
        (Tensor("0", 1, ()),),
        **{"constants/0": bytes(4)},
    )
)


@given(
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(SOUND)),
    st.binary(max_size=20),
)
@settings(max_examples=500, deadline=None)
def test_a_damaged_file_is_refused_or_described(changes, length, tail):
    """Whatever happened to a file, reading it ends in a layout or in `InvalidRequest`."""
    data = bytearray(SOUND)
    for at, value in changes:
        data[at] = value
    for candidate in (data, data[:length], data[:length] + tail + data[length:]):
        with contextlib.suppress(InvalidRequest):
            layout = read_layout(io.BytesIO(bytes(candidate)))
            for block in layout.blocks:
                content = candidate[block.offset : block.offset + block.nbytes]
                assert hashlib.sha256(content).digest() == block.digest


OPERATIONS = [bytes([code]) for code in b"hqrj(tKMJRX)Q\x89\x88Nc\x81}ube]a\x85\x86\x87G\x8a."]


@given(st.lists(st.one_of(st.sampled_from(OPERATIONS), st.binary(max_size=4)), max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_pickle_is_read_or_refused(pieces):
    """No sequence of operations does anything else, in the graph of a module neither."""
    data = b"\x80\x02" + b"".join(pieces)
    with contextlib.suppress(Unreadable):
        read_pickle(data)
    members = entries(Thing("__torch__.M"), STORAGES, {"__torch__": module()})
    read_layout(io.BytesIO(archive({**members, "data.pkl": data})))


@given(st.text(alphabet='ab_.(),=" \n:torchdefclas', max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_code_is_read(text):
    """No text makes reading code fail in another way than by an obstacle."""
    members = entries(Thing("__torch__.M"), STORAGES, {"__torch__": module() + text, "b": text})
    layout = read_layout(io.BytesIO(archive(members)))
    assert layout.obstacle is not None or layout.may_write == may_write([module() + text, text])


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([100, 65536, 70000])), max_size=6),
    st.integers(0, 5000),
)
@settings(max_examples=200, deadline=None)
def test_a_file_is_its_pieces(gaps, end):
    """However a file is cut, its recipe puts it together again, read in any steps."""
    contents, blocks = bytearray(), []
    for number, (gap, nbytes) in enumerate(gaps):
        contents += bytes([200 + number]) * gap
        block = bytes([number % 2]) * nbytes
        blocks.append(Block(hashlib.sha256(block).digest(), len(contents), nbytes))
        contents += block
    contents += b"e" * end
    cuts = cut(blocks, len(contents))
    if cuts is None:
        assert all(nbytes < 65536 for _, nbytes in gaps)
        return
    rest = b"".join(contents[c.offset : c.offset + c.nbytes] for c in cuts if c.digest is None)
    recipe = write_recipe(cuts, "rest")
    assert decode_recipe("path", encode_recipe(recipe)) == recipe
    parts = {"rest": bytes(rest)}
    for block in blocks:
        parts[f"sha256:{block.digest.hex()}"] = bytes(
            contents[block.offset : block.offset + block.nbytes]
        )
    assert all(len(parts[part]) == size for part, size in recipe.parts.items())
    file = Assembled(recipe.pieces, lambda part: io.BytesIO(parts[part]))
    assert file.read() == contents
    for at in (0, len(contents) // 2, len(contents) - 1):
        file.seek(at)
        assert file.readline(50) == contents[at:].split(b"\n")[0][:50]
        assert file.tell() == min(at + 50, len(contents))
    found = extents(recipe, {part: part for part in parts})
    joined = b"".join(parts[e.path][e.offset : e.offset + e.nbytes] for e in found)
    assert joined == contents
    assert all(a.path != b.path or a.offset + a.nbytes != b.offset for a, b in pairwise(found))
