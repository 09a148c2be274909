from __future__ import annotations

import pickle
import struct
import time

import pytest

from shared.layout import pickled
from shared.layout.pickled import Call, Global, Instance, Persistent, Table, read_pickle
from shared.layout.records import Unreadable
from tests.torchscript_files import Made, Name, Thing, write
from tests.torchscript_files import pickle as torch_pickle


def refusal(data: bytes) -> str:
    with pytest.raises(Unreadable) as caught:
        read_pickle(data)
    return str(caught.value)


@pytest.mark.parametrize(
    "value", [None, True, False, 0, -1, 2**62, 1.5, "", "text ä", (), (1, (2,)), [1, [2]], ("a",)]
)
def test_plain_values_are_read(value):
    """What needs no class comes back as it was."""
    read = read_pickle(torch_pickle(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("value", [(1, 255, 256, 65535, 65536, -5, 2**40), "x" * 300, 2.5, [True]])
def test_what_python_writes_is_read(value):
    """Memo and short integers as the standard library writes them, too."""
    assert read_pickle(pickle.dumps(value, 2)) == value


def test_names_stay_names():
    """A class, a call, an object and a storage become inert values that tell what they are."""
    name = read_pickle(torch_pickle(Name("os.system")))
    assert isinstance(name, Global)
    assert name.name == "os.system"
    call = read_pickle(torch_pickle(Made("os.system", ("true",))))
    assert isinstance(call, Call)
    assert (call.name, call.argument) == ("os.system", ("true",))
    thing = read_pickle(torch_pickle(Thing("__torch__.a.M", x=1)))
    assert isinstance(thing, Instance)
    assert isinstance(thing.state, Table)
    assert (thing.cls, thing.state.items) == ("__torch__.a.M", [("x", 1)])
    storage = read_pickle(b"\x80\x02" + write("0") + b"Q.")
    assert isinstance(storage, Persistent)
    assert storage.key == "0"


def test_nothing_is_called(tmp_path):
    """A pickle made to run a command runs none."""
    target = tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return (open, (str(target), "w"))

    call = read_pickle(pickle.dumps(Evil(), 2))
    assert isinstance(call, Call)
    assert not target.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"\x80\x04N.",
        b"\x80\x02NN.",
        b"\x80\x02(N.",
        b"\x80\x02N.N",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02h\x05.",
        b"\x80\x02q\x00.",
        b"\x80\x02\x85.",
        b"\x80\x02N\x86.",
        b"\x80\x02NNR.",
        b"\x80\x02NN\x81.",
        b"\x80\x02NNb.",
        b"\x80\x02NNa.",
        b"\x80\x02N(NNu.",
        b"\x80\x02}(Nu.",
        b"\x80\x02cos\nsystem",
        b"\x80\x02t.",
        b"\x80\x02R.",
        b"\x80\x02cos\nsystem\n(Nio\n.",
        b"\x80\x02]\x94.",
    ],
)
def test_what_is_damaged_or_foreign_is_refused(data):
    """Whatever is wrong, the answer is the same error, with words."""
    assert refusal(data)


def test_a_state_is_given_once():
    """An object whose state is set twice is not what torch writes."""
    assert "state" in refusal(b"\x80\x02cm\nC\n)\x81Nb}b}b.")


def test_a_memo_number_costs_nothing():
    """The greatest number of a memo entry takes no more memory than the least."""
    assert read_pickle(b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".") is None


def test_deep_nesting_is_read_or_refused_quickly():
    """A hundred thousand tuples in one another do not exhaust the stack, here or when they go."""
    depth = 100_000
    started = time.monotonic()
    assert read_pickle(b"\x80\x02N" + b"\x85" * depth + b".")
    assert "ends" in refusal(b"\x80\x02" + b"(" * depth + b"N.")
    assert time.monotonic() - started < 10


def test_operations_are_counted(monkeypatch):
    """A pickle of very many operations is refused."""
    monkeypatch.setattr(pickled, "MAX_OPERATIONS", 10)
    assert "operations" in refusal(torch_pickle(tuple(range(10))))
