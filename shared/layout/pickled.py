"""Reads the pickles in a TorchScript file, without pickle.

torch writes them with a small part of pickle's opcodes, and its own reader knows no others; so
does this one. It imports nothing, calls nothing and makes nothing but the inert values below:
what a name stands for is for the caller to know. Time and memory are bounded by the input's
size, which is bounded by `MAX_OPERATIONS`: no opcode makes more than one value, and the memo
is a dict, whatever number a file gives to an entry.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from shared.layout.records import Unreadable

MAX_OPERATIONS: Final = 1_000_000
"""A model of a thousand tensors needs some 40,000."""

_INT: Final = struct.Struct("<i")
_UINT: Final = struct.Struct("<I")
_DOUBLE: Final = struct.Struct(">d")


class Global:
    """A name that pickle would import."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Call:
    """What pickle would call, and with what: a tuple, or the bare value of an enum."""

    __slots__ = ("argument", "name")

    def __init__(self, name: str, argument: object) -> None:
        self.name = name
        self.argument = argument


class Instance:
    """An object of one of the file's own classes."""

    __slots__ = ("cls", "state")

    def __init__(self, cls: str) -> None:
        self.cls = cls
        self.state: object = None


class Persistent:
    """What a pickle names but does not hold: a storage."""

    __slots__ = ("key",)

    def __init__(self, key: object) -> None:
        self.key = key


class Table:
    """A dict, as it was written: keys may be anything, even twice."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[tuple[object, object]] = []


def read_pickle(data: bytes) -> object:
    """What the pickle holds: None, bool, int, float, str, tuple, list, or one of this module's
    classes. Raises `Unreadable`."""
    try:
        return _read(data)
    except (IndexError, struct.error) as error:
        raise Unreadable("a pickle is cut off or damaged") from error
    except UnicodeDecodeError as error:
        raise Unreadable("a pickle has a text that is not UTF-8") from error


def _read(data: bytes) -> object:
    stack: list[object] = []
    below: list[list[object]] = []
    """The stacks under each open mark."""
    memo: dict[int, object] = {}
    at, operations = 0, 0
    while True:
        operations += 1
        if operations > MAX_OPERATIONS:
            raise Unreadable(f"a pickle has more than {MAX_OPERATIONS:,} operations")
        code = data[at]
        at += 1
        # In the order of how often torch writes them.
        if code == 0x68:  # BINGET
            stack.append(_recall(memo, data[at]))
            at += 1
        elif code == 0x71:  # BINPUT
            memo[data[at]] = stack[-1]
            at += 1
        elif code == 0x72:  # LONG_BINPUT
            memo[_UINT.unpack_from(data, at)[0]] = stack[-1]
            at += 4
        elif code == 0x6A:  # LONG_BINGET
            stack.append(_recall(memo, _UINT.unpack_from(data, at)[0]))
            at += 4
        elif code == 0x28:  # MARK
            below.append(stack)
            stack = []
        elif code == 0x74:  # TUPLE
            value = tuple(stack)
            stack = below.pop()
            stack.append(value)
        elif code == 0x4B:  # BININT1
            stack.append(data[at])
            at += 1
        elif code == 0x4D:  # BININT2
            stack.append(data[at] | data[at + 1] << 8)
            at += 2
        elif code == 0x4A:  # BININT
            stack.append(_INT.unpack_from(data, at)[0])
            at += 4
        elif code == 0x52:  # REDUCE
            argument, function = stack.pop(), stack.pop()
            if not isinstance(function, Global):
                raise Unreadable("a pickle calls what is not a name")
            stack.append(Call(function.name, argument))
        elif code == 0x58:  # BINUNICODE
            end = at + 4 + _UINT.unpack_from(data, at)[0]
            if end > len(data):
                raise Unreadable("a pickle is cut off or damaged")
            stack.append(data[at + 4 : end].decode())
            at = end
        elif code == 0x29:  # EMPTY_TUPLE
            stack.append(())
        elif code == 0x51:  # BINPERSID
            stack.append(Persistent(stack.pop()))
        elif code == 0x89:  # NEWFALSE
            stack.append(False)
        elif code == 0x88:  # NEWTRUE
            stack.append(True)
        elif code == 0x4E:  # NONE
            stack.append(None)
        elif code == 0x63:  # GLOBAL
            middle = data.find(b"\n", at, at + 4096)
            end = data.find(b"\n", middle + 1, middle + 4097)
            if middle < 0 or end < 0:
                raise Unreadable("a pickle has a name without an end")
            stack.append(Global(f"{data[at:middle].decode()}.{data[middle + 1 : end].decode()}"))
            at = end + 1
        elif code == 0x81:  # NEWOBJ
            argument, cls = stack.pop(), stack.pop()
            if not isinstance(cls, Global) or argument != ():
                raise Unreadable("a pickle makes an object of what is not a class")
            stack.append(Instance(cls.name))
        elif code == 0x7D:  # EMPTY_DICT
            stack.append(Table())
        elif code == 0x75:  # SETITEMS
            values = stack
            stack = below.pop()
            table = stack[-1]
            if not isinstance(table, Table) or len(values) % 2:
                raise Unreadable("a pickle fills what is not a dict")
            table.items.extend(zip(values[::2], values[1::2], strict=True))
        elif code == 0x62:  # BUILD
            state = stack.pop()
            instance = stack[-1]
            if not isinstance(instance, Instance) or instance.state is not None:
                raise Unreadable("a pickle gives a state to what takes none")
            instance.state = state
        elif code == 0x5D:  # EMPTY_LIST
            stack.append([])
        elif code == 0x65:  # APPENDS
            values = stack
            stack = below.pop()
            _list(stack).extend(values)
        elif code == 0x61:  # APPEND
            item = stack.pop()
            _list(stack).append(item)
        elif code in {0x85, 0x86, 0x87}:  # TUPLE1, TUPLE2, TUPLE3
            count = code - 0x84
            if len(stack) < count:
                raise Unreadable("a pickle is cut off or damaged")
            value = tuple(stack[-count:])
            del stack[-count:]
            stack.append(value)
        elif code == 0x47:  # BINFLOAT
            stack.append(_DOUBLE.unpack_from(data, at)[0])
            at += 8
        elif code == 0x8A:  # LONG1
            size = data[at]
            number = data[at + 1 : at + 1 + size]
            stack.append(int.from_bytes(number, "little", signed=True))
            at += 1 + size
        elif code == 0x80:  # PROTO
            if data[at] != 2:
                raise Unreadable(f"a pickle is of protocol {data[at]}, torch writes 2")
            at += 1
        elif code == 0x2E:  # STOP
            if below or len(stack) != 1 or at != len(data):
                raise Unreadable("a pickle ends before or after its value")
            return stack[0]
        else:
            raise Unreadable(f"a pickle has the operation {code:#04x}, which torch does not write")


def _recall(memo: dict[int, object], number: int) -> object:
    try:
        return memo[number]
    except KeyError:
        raise Unreadable("a pickle refers to what it has not got") from None


def _list(stack: Sequence[object]) -> list[object]:
    target = stack[-1]
    if not isinstance(target, list):
        raise Unreadable("a pickle appends to what is not a list")
    return target
