from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from services.worker.engine.channel import BatchChannel, Channel
from services.worker.frames import BadFrame
from services.worker.wire import (
    MAX_FRAME,
    BatchRan,
    EvictModel,
    MemoryMeasured,
    Release,
    RunBatch,
    Stop,
    pack,
    unpack_event,
)
from shared.names import ModelId


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        yield ours, Channel(theirs)


def test_commands_arrive_whole_however_they_are_cut(ends):
    """Frames that share a write, and frames that are cut anywhere, come out one by one."""
    agent, channel = ends
    sent = [EvictModel(ModelId("m/1"), "host"), Stop()]
    stream = b"".join(pack(each) for each in sent)
    commands = channel.commands()
    agent.sendall(stream[:1])
    threading.Thread(
        target=lambda: [agent.sendall(stream[at : at + 7]) for at in range(1, len(stream), 7)]
    ).start()
    assert [next(commands) for _ in sent] == sent
    agent.close()
    assert list(commands) == []


def test_an_agent_that_dies_amid_a_frame_is_just_gone(ends):
    """Half a frame at the end of the stream is no fault of the engine's."""
    agent, channel = ends
    agent.sendall(pack(Stop())[:-1])
    agent.close()
    assert list(channel.commands()) == []


@pytest.mark.parametrize(
    "frame",
    [
        (MAX_FRAME + 1).to_bytes(4, "little"),
        b"\x01\x00\x00\x00\xc1",
        b"\x00\x00\x00\x00",
        pack(MemoryMeasured(1)),
    ],
)
def test_what_is_no_command_is_told(ends, frame):
    """Too long, not msgpack, empty, or an event: nothing after it can be trusted."""
    agent, channel = ends
    agent.sendall(frame)
    with pytest.raises(BadFrame):
        next(channel.commands())


def test_a_command_about_batches_belongs_on_the_other_socket(ends):
    """Each socket has its own messages."""
    agent, channel = ends
    agent.sendall(pack(Release((1,))))
    with pytest.raises(BadFrame):
        next(channel.commands())


def test_events_of_two_threads_do_not_mix(ends):
    """Each event is one frame, whoever else is sending."""
    agent, channel = ends
    threads = [
        threading.Thread(target=lambda n=n: [channel.send(MemoryMeasured(n)) for _ in range(500)])
        for n in (1, 1 << 40)
    ]
    for thread in threads:
        thread.start()
    counts: dict[int, int] = {}
    with agent.makefile("rb") as stream:
        for _ in range(1000):
            event = unpack_event(stream.read(int.from_bytes(stream.read(4), "little")))
            counts[event.used_bytes] = counts.get(event.used_bytes, 0) + 1
    assert counts == {1: 500, 1 << 40: 500}
    for thread in threads:
        thread.join()


RUN = RunBatch(1, ModelId("m/1"), 1, ())


@pytest.fixture
def batch_ends():
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(BatchChannel(theirs)) as channel:
        ours.settimeout(10)
        yield ours, channel


def test_batches_that_lie_there_are_read_in_one_go(batch_ends):
    """In their order, and with none there it does not wait."""
    agent, channel = batch_ends
    assert channel.receive(wait=False) == []
    agent.sendall(pack(RUN) + pack(Release((1, 2))) + pack(Stop())[:2])
    assert channel.receive(wait=True) == [RUN, Release((1, 2))]


def test_a_wait_ends_with_the_next_batch(batch_ends):
    """However long it takes to come."""
    agent, channel = batch_ends
    received: list[object] = []
    waiting = threading.Thread(target=lambda: received.extend(channel.receive(wait=True)))
    waiting.start()
    agent.sendall(pack(RUN))
    waiting.join(10)
    assert received == [RUN]


def test_another_thread_can_end_the_wait(batch_ends):
    """Before it has begun as well, and as often as it likes."""
    _, channel = batch_ends
    for _ in range(100_000):  # more than a socket holds
        channel.wake()
    assert channel.receive(wait=True) == []


@pytest.mark.parametrize("wait", [True, False])
def test_a_batch_socket_without_an_agent_says_so(batch_ends, wait):
    """What was sent before is read first."""
    agent, channel = batch_ends
    agent.sendall(pack(RUN))
    agent.close()
    assert channel.receive(wait=wait) == [RUN]
    with pytest.raises(ConnectionError, match="the agent is gone"):
        channel.receive(wait=wait)


def test_what_is_no_batch_command_is_told(batch_ends):
    """Nothing after it can be trusted."""
    agent, channel = batch_ends
    agent.sendall(pack(Stop()))
    with pytest.raises(BadFrame):
        channel.receive(wait=True)


def test_answers_are_frames(batch_ends):
    """One after the other, from whatever thread."""
    agent, channel = batch_ends
    ran = BatchRan(1, (), 0.5, 0)
    channel.send(ran)
    frame = agent.recv(1 << 16)
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    assert unpack_event(frame[4:]) == ran
