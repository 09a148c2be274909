"""How many connections are open at once, and who makes way."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import Any, cast

import httpx
import structlog
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from shared.http.crowd import Crowd
from tests.http_rig import served, talk


class Connection:
    """What the crowd knows of one."""

    def __init__(self) -> None:
        self.aborted = False
        self.transport = cast("Any", self)

    def abort(self) -> None:
        self.aborted = True


class Crowded(RuleBasedStateMachine):
    """Connections come, are busy and idle and go, in any order, also after they made way."""

    def __init__(self) -> None:
        super().__init__()
        self.crowd = Crowd(3)
        self.inside: dict[Connection, bool] = {}
        """And whether each is idle, the longest idle first."""

    connections = Bundle("connections")

    @rule(target=connections)
    def enter(self) -> Connection:
        one = Connection()
        room = len(self.inside) < 3
        victim = None if room else next((each for each in self.inside if self.inside[each]), None)
        assert self.crowd.enter(one) == (room or victim is not None)
        if victim is not None:
            assert victim.aborted, "the longest idle makes way"
            del self.inside[victim]
        if room or victim is not None:
            self.inside[one] = True
        return one

    @rule(one=connections)
    def busy(self, one: Connection) -> None:
        self.crowd.busy(one)
        if one in self.inside:
            self.inside[one] = False

    @rule(one=connections)
    def idle(self, one: Connection) -> None:
        self.crowd.idle(one)
        if not self.inside.get(one, True):  # one that is idle already is not so anew
            del self.inside[one]
            self.inside[one] = True

    @rule(one=connections)
    def leave(self, one: Connection) -> None:
        self.crowd.leave(one)
        self.inside.pop(one, None)

    @invariant()
    def nobody_else_makes_way(self) -> None:
        assert not any(each.aborted for each in self.inside)


TestCrowded = Crowded.TestCase


async def test_beyond_max_connections_new_ones_are_closed_at_once() -> None:
    """While all are busy, the connection too many gets nothing; the others are not disturbed."""
    async with served(max_connections=1) as server, httpx.AsyncClient() as client:
        running = asyncio.create_task(client.get(f"{server.url}/wait"))
        await server.entered.wait()
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                with contextlib.suppress(ConnectionError):
                    assert await talk(server.port, b"GET /hello HTTP/1.1\r\n\r\n") == b""
        assert [line["event"] for line in lines] == ["connections_refused"], "no flood of lines"
        server.release.set()
        assert (await running).status_code == 200
        again = await client.get(f"{server.url}/hello")
        assert again.status_code == 200, "on the connection that is there already"


async def test_idle_connections_make_way_for_new_ones() -> None:
    """Whoever keeps every connection open and says nothing shuts nobody out: the one that was
    idle for longest goes, the others stay usable."""
    request = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
    async with served(max_connections=3) as server:
        silent = await asyncio.open_connection("127.0.0.1", server.port)
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(2)]
        for reader, writer in reversed(idle):
            writer.write(request)
            assert b"hello 0" in await reader.readuntil(b"hello 0")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{server.url}/hello")).text == "hello 0"
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(silent[0].read(), 5) == b""
        for reader, writer in idle:
            writer.write(request)
            assert b"hello 0" in await reader.readuntil(b"hello 0")
        for _, writer in (silent, *idle):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def test_a_low_limit_of_open_files_is_raised():
    """As far as the process may, and no further; what is possible then is told."""
    script = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 2000))
from shared.http.crowd import openable
print(openable(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0], openable(5000))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout.splitlines()[-1].split() == ["1000", "1256", "1744"]
