"""A private broker or store that ends by itself is started again."""

import pytest

from roost.local import ServiceFailed
from roost.stack.port import StackFailed
from roost.stack.processes import revive


class FakeNode:
    """Remembers what was done to it."""

    def __init__(self, *, running: bool, broken: bool = False) -> None:
        self.running = running
        self.done: list[str] = []
        self._broken = broken

    def start(self) -> None:
        self.done.append("start")
        if self._broken:
            raise ServiceFailed("no room on disk")
        self.running = True

    def kill(self) -> None:
        self.done.append("kill")


def test_a_running_node_is_left_alone() -> None:
    """Nothing to do."""
    node = FakeNode(running=True)
    assert not revive("redis", node)
    assert node.done == []


def test_an_ended_node_is_cleared_away_and_started() -> None:
    """Its remains first: they may hold its ports."""
    node = FakeNode(running=False)
    assert revive("redis", node)
    assert node.done == ["kill", "start"]


def test_a_node_that_does_not_start_fails_the_stack() -> None:
    """The message says which and why."""
    with pytest.raises(StackFailed, match=r"rabbitmq.*no room on disk"):
        revive("rabbitmq", FakeNode(running=False, broken=True))
