"""What an engine may see of the process that started it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest
import structlog

from services.worker.launch import start

_AGENT = """
import ctypes, os
from services.worker.launch import hide_from_engines

def child_reads():
    child = os.fork()
    if not child:
        try:
            seen = b"amqp://secret" in open(f"/proc/{os.getppid()}/environ", "rb").read()
            os._exit(1 if seen else 2)
        except PermissionError:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    # A change of user hides as well; a worker is started as its user.
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
before = child_reads()
hide_from_engines()
print(before, child_reads(), open(f"/proc/{os.getpid()}/status").read().count("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that has /proc")
def test_a_child_cannot_read_the_credentials_in_our_environment():
    """Not as the same user, as an engine is; root could."""
    environ = {**os.environ, "ROOST_AMQP_URL": "amqp://secret"}
    agent = subprocess.run(
        [sys.executable, "-c", _AGENT], env=environ, capture_output=True, text=True, check=False
    )
    if "Operation not permitted" in agent.stderr:
        pytest.skip("it may not become another user than root")
    assert agent.returncode == 0, agent.stderr
    before, after, status = map(int, agent.stdout.split())
    assert before == 1, "without hiding, it could be read"
    assert after == 0
    assert status == 1, "what we measure of a process stays readable"


async def test_an_engine_s_end_does_not_wait_for_what_it_left_behind():
    """A model may have started a process, which holds the engine's output open."""
    engine = await start("sh", "-c", "sleep 20 & exit 3")
    async with asyncio.timeout(10):
        assert await engine.wait() == 3


async def test_what_an_engine_prints_becomes_log_lines():
    """The last line as well, though it has no end."""
    with structlog.testing.capture_logs() as logs:
        engine = await start("sh", "-c", "echo one; echo two >&2; printf three")
        assert await engine.wait() == 0
    assert [entry["line"] for entry in logs] == ["one", "two", "three"]


async def test_a_program_that_is_not_there_is_an_error():
    """And leaves nothing open."""
    with pytest.raises(FileNotFoundError):
        await start("/nowhere/at/all")


async def test_killing_what_has_ended_is_harmless():
    """An engine may end by itself at the same moment."""
    engine = await start("true")
    assert await engine.wait() == 0
    engine.kill()
