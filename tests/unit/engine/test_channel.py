from __future__ import annotations

import socket
import threading

import pytest

from services.worker.engine.channel import BadFrame, Channel
from services.worker.wire import (
    MAX_FRAME,
    EvictModel,
    MeasureMemory,
    MemoryMeasured,
    Release,
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
    sent = [MeasureMemory(), Release((1, 2)), EvictModel(ModelId("m/1")), Stop()]
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
