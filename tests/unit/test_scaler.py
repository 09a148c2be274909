"""The loop that follows the placer's number of workers."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest

from roost.stack.scaler import (
    CommandRunner,
    ComposeRunner,
    Fleet,
    Limits,
    RunnerFailed,
    Scaler,
    Step,
    next_step,
)

LIMITS = Limits(1, 4)


def fleet(wanted, workers=1, **rest):
    return Fleet(
        workers_wanted=wanted, workers=tuple(f"w{index}" for index in range(workers)), **rest
    )


def test_more_are_started_at_once():
    """All that are missing, up to the limit, whatever is wanted."""
    assert next_step(fleet(3), 1, LIMITS) == Step(start=2)
    assert next_step(fleet(99), 1, LIMITS) == Step(start=3)


def test_what_starts_is_not_started_again():
    """Workers that do not report yet count: an engine needs seconds to start."""
    assert next_step(fleet(3), 3, LIMITS) == Step()


def test_who_leaves_is_kept_before_another_is_started():
    """Taking back is at once and warm; who was told to end already is past that."""
    seen = fleet(4, leaving=("w1",), ending=("w2",))
    assert next_step(seen, 3, LIMITS) == Step(keep=("w1",), start=2)


def test_fewer_go_one_at_a_time():
    """Nobody is let go while one leaves, or while one that was started is not there yet."""
    assert next_step(fleet(1, workers=3), 3, LIMITS) == Step(shrink_to=2)
    assert next_step(fleet(1, workers=3), 4, LIMITS) == Step()
    assert next_step(fleet(1, workers=2, leaving=("w2",)), 3, LIMITS) == Step()
    assert next_step(fleet(1, workers=2, ending=("w2",)), 3, LIMITS) == Step()


def test_limits_bind_both_ways():
    """Never fewer than the least; and more than the most are let go."""
    assert next_step(fleet(0), 1, LIMITS) == Step()
    assert next_step(fleet(0), 1, Limits(0, 4)) == Step(shrink_to=0)
    assert next_step(fleet(5, workers=5), 5, LIMITS) == Step(shrink_to=4)


class Placer:
    """Answers as a placer does, and remembers what it was asked to do."""

    def __init__(self, *fleets: Fleet) -> None:
        self.fleets = list(fleets)
        self.asked: list[str] = []
        self.client = httpx.AsyncClient(
            transport=httpx.MockTransport(self._answer), base_url="http://placer"
        )

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            seen = self.fleets.pop(0)
            return httpx.Response(
                200, json={name: getattr(seen, name) for name in seen.__struct_fields__}
            )
        self.asked.append(f"{request.method} {request.url.raw_path.decode()}")
        return httpx.Response(202, json={"worker": "w1", "why": "least missed"})


class Starts:
    """A runner whose workers start when asked and never report."""

    def __init__(self, running: int = 0) -> None:
        self.running = running
        self.started: list[int] = []

    async def count(self, reporting: int) -> int:
        return max(self.running, reporting)

    async def start(self, more: int, running: int) -> None:
        self.running = running + more
        self.started.append(more)


async def test_the_loop_does_what_the_step_says():
    """It starts, keeps, and asks for one fewer: by the placer alone."""
    placer = Placer(fleet(3), fleet(3), fleet(2, leaving=("w1",)), fleet(1, workers=3))
    runner = Starts(1)
    scaler = Scaler("http://placer", runner, LIMITS)
    for _ in range(2):
        await scaler.look(placer.client)
    assert runner.started == [2]
    runner.running = 2
    await scaler.look(placer.client)
    assert placer.asked == ["DELETE /fleet/workers/w1/drain"]
    await scaler.look(placer.client)
    assert placer.asked[1:] == ["POST /fleet/shrink?to=2"]
    assert runner.started == [2]


async def test_a_command_is_told_the_whole_number(tmp_path):
    """Those that run, and those that are missing; what it started counts until it reports, or
    until it should have."""
    told = tmp_path / "told"
    script = f"open({str(told)!r}, 'a').write('{{count}};')"
    now = 0.0
    runner = CommandRunner((sys.executable, "-c", script), start_s=60, clock=lambda: now)
    assert await runner.count(1) == 1
    await runner.start(2, 1)
    assert told.read_text() == "3;"
    assert await runner.count(1) == 3
    now = 60.0
    assert await runner.count(1) == 1
    await runner.start(1, 1)
    assert await runner.count(2) == 2
    assert told.read_text() == "3;2;"


async def test_a_command_that_fails_says_why():
    """With its status and what it wrote; one that is not there as well."""
    script = "import sys; sys.exit('no room for {count}')"
    with pytest.raises(RunnerFailed, match=r"ended with 1: no room for 1"):
        await CommandRunner((sys.executable, "-c", script)).start(1, 0)
    with pytest.raises(RunnerFailed, match="no-such-program"):
        await CommandRunner(("no-such-program", "{count}")).start(1, 0)


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that tells of two containers and keeps what it is asked in the file returned."""
    program, asked = tmp_path / "docker", tmp_path / "asked"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {asked}\ncase "$*" in *" ps "*) echo a; echo b;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return asked


async def test_compose_never_stops_a_container(docker):
    """What has ended is removed first, for it would count; then there are more than before, and
    those that run are left alone."""
    runner = ComposeRunner(("--file", "x.yml"))
    assert await runner.count(0) == 2
    docker.unlink()
    await runner.start(1, 2)
    removed, listed, up = docker.read_text().splitlines()
    assert removed == "compose --file x.yml rm --force worker"
    assert " ps " in listed
    assert up == (
        "compose --file x.yml up --detach --no-deps --no-recreate --scale=worker=3 worker"
    )
