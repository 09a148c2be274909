from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.frames import BadFrame, Frames
from services.worker.wire import MAX_FRAME


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def taken(frames: Frames) -> list[bytes]:
    bodies = []
    while (body := frames.take()) is not None:
        bodies.append(bytes(body))
    return bodies


@given(
    bodies=st.lists(st.binary(max_size=300), max_size=8),
    cuts=st.lists(st.integers(min_value=1, max_value=64), min_size=1, max_size=30),
)
def test_frames_come_out_whole_however_they_are_cut(bodies, cuts):
    """What is read at once may begin and end anywhere in a frame."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream, heard, frames = b"".join(map(framed, bodies)), [], Frames(theirs)
        for at in range(len(stream) + 1):
            size = cuts[at % len(cuts)]
            piece, stream = stream[:size], stream[size:]
            if not piece:
                break
            ours.sendall(piece)
            assert frames.receive()
            heard += taken(frames)
        assert heard == bodies


def test_a_frame_may_be_larger_than_the_buffer(ends):
    """The buffer grows with it, and what follows is read as before."""
    ours, theirs = ends
    large, frames, heard = bytes(range(256)) * 1000, Frames(theirs), []
    ours.setblocking(False)
    stream = framed(b"before") + framed(large) + framed(b"after")
    while len(heard) < 3:
        stream = stream[ours.send(stream) :] if stream else stream
        frames.receive()
        heard += taken(frames)
    assert heard == [b"before", large, b"after"]


def test_nothing_to_read_is_not_the_end(ends):
    """The end of the stream is told apart from a socket that is only empty."""
    ours, theirs = ends
    frames = Frames(theirs)
    with pytest.raises(BlockingIOError):
        frames.receive(socket.MSG_DONTWAIT)
    ours.close()
    assert not frames.receive()


def test_a_length_that_no_message_has_is_refused(ends):
    """Before any memory is taken for it."""
    ours, theirs = ends
    frames = Frames(theirs)
    ours.sendall((MAX_FRAME + 1).to_bytes(4, "little"))
    frames.receive()
    with pytest.raises(BadFrame, match="a frame of 16,777,217 bytes"):
        frames.take()
