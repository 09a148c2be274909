"""Packs: what goes in comes out, and whatever else comes costs an error and no more."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import packs
from shared.broker.port import Message
from shared.names import HEADER_DEADLINE, HEADER_MEMBERS

VALUES = (
    st.text(max_size=20)
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.binary(max_size=20)
    | st.none()
)
NAMES = st.text(min_size=1, max_size=30).filter(lambda name: name != HEADER_DEADLINE)
SINGLES = st.builds(
    Message,
    body=st.binary(max_size=50),
    headers=st.dictionaries(NAMES, VALUES, max_size=4),
    correlation_id=st.text(min_size=1, max_size=60) | st.none(),
    reply_to=st.just("roost.reply.t"),
    priority=st.just(3),
    expiration_ms=st.integers(0, 2**31) | st.none(),
)
FIELDS = st.integers(-5, 60) | VALUES | st.dictionaries(NAMES, VALUES)
INDEX = st.lists(st.lists(FIELDS, max_size=5))


@given(st.lists(SINGLES, min_size=1, max_size=20))
def test_members_are_what_was_packed(singles):
    """In order, with all their properties; and the pack says how many there are."""
    packed = packs.pack(singles)
    if len(singles) == 1:
        assert packed is singles[0]
        return
    assert packs.is_pack(packed)
    assert packs.count(packed) == packed.headers[HEADER_MEMBERS] == len(singles)
    assert packs.members(packed) == singles


@given(st.lists(st.tuples(st.integers(1, 10**6) | st.none(), st.integers(1, 10**15) | st.none()),
                min_size=2, max_size=5))  # fmt: skip
def test_a_pack_lives_as_long_as_its_last_member(times):
    """Without end if one of them does."""
    singles = [
        Message(
            body=b"",
            expiration_ms=expiration,
            headers={} if deadline is None else {HEADER_DEADLINE: deadline},
        )
        for expiration, deadline in times
    ]
    packed = packs.pack(singles)
    expirations, deadlines = zip(*times, strict=True)
    assert packed.expiration_ms == (None if None in expirations else max(expirations))
    assert packed.headers.get(HEADER_DEADLINE) == (None if None in deadlines else max(deadlines))


def hostile(body: bytes) -> Message:
    return Message(body=body, content_type=packs.CONTENT_TYPE, reply_to="roost.reply.t")


def indexed(index: object, bodies: bytes) -> bytes:
    raw = msgspec.msgpack.encode(index)
    return len(raw).to_bytes(4, "big") + raw + bodies


@given(st.binary(max_size=200) | st.builds(indexed, INDEX, st.binary(max_size=60)))
@example(b"\x00\x00\x00\x05" + b"\x91" * 10_000)
@example((10_000).to_bytes(4, "big") + b"\x91" * 10_000)
def test_nothing_but_its_own_error_comes_of_rubbish(body):
    """Whatever a producer sends."""
    try:
        found = packs.members(hostile(body))
    except packs.BadPack:
        return
    assert sum(len(member.body) for member in found) <= len(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        indexed([], b""),
        indexed([[3, "1", {}]], b"12"),
        indexed([[1, "1", {}]], b"12"),
        indexed([[-1, "1", {}]], b""),
        indexed([[0, "é" * 200, {}]], b""),
        indexed([[0, "1", {"x": [1]}]], b""),
        indexed([[0, "1", {"x": {"y": 1}}]], b""),
        indexed([[0, "1", {"x": 2**63}]], b""),
        indexed([[0, "1", {"x" * 61: 1}]], b""),
        indexed([[0, "1", {}]] * (packs.MAX_MEMBERS + 1), b""),
    ],
)
def test_what_is_no_pack_is_refused(body):
    """No member, bytes missing or left over, ids and headers that AMQP has not, too many."""
    with pytest.raises(packs.BadPack):
        packs.members(hostile(body))


def test_a_later_version_may_say_more_of_a_member():
    """Fields that are not known here are passed over."""
    (found,) = packs.members(hostile(indexed([[2, "1", {}, None, "later"]], b"ab")))
    assert (found.correlation_id, found.body) == ("1", b"ab")


def test_single_messages_count_as_one():
    """And so does a pack that lies about its members, until it is read."""
    assert packs.count(Message(body=b"", headers={HEADER_MEMBERS: 7})) == 1
    lying = Message(body=b"", headers={HEADER_MEMBERS: 10**9}, content_type=packs.CONTENT_TYPE)
    assert packs.count(lying) == 1
