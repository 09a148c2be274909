"""`roost scale --compose`: containers come and go as they are needed, where there is a Docker
engine."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from roost.client import RoostClient
from shared.models import ModelSpec
from tests.e2e.composing import Project
from tests.e2e.laborious import SPEC, ask_laborious, fleet, save_laborious, spike
from tests.e2e.running import ROOT
from tests.e2e.steady import until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]

_HASTY = """
services:
  placer:
    environment:
      ROOST_PLACER_SHRINK_AFTER_S: "1"
      ROOST_PLACER_HOLD_DOWN_S: "1"
      ROOST_PLACER_SCALE_TO_ZERO_AFTER_S: "3"
"""
_LIMIT_S = 120.0
"""For a container to start, or to go: both import torch, beside others on a slow machine."""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Without any worker, and with a placer that does not wait for minutes."""
    override = tmp_path / "hasty.yml"
    override.write_text(_HASTY)
    made = Project(override, MIN_WORKERS="0")
    try:
        made.up("--scale", "worker=0")
        yield made
    finally:
        made.down()


@contextlib.contextmanager
def _scaling(project: Project, log: Path) -> Iterator[None]:
    """`roost scale` runs meanwhile, from none to two, and ends well when asked."""
    with log.open("w") as said:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "roost", "scale", "--min-workers", "0", "--max-workers", "2",
                *(part for file in project.files for part in ("--compose", file)),
            ],
            cwd=ROOT,
            env=project.environment | {"ROOST_PLACER_URL": project.placer_url},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    assert status == 0, log.read_text()


def test_from_none_to_two_and_back_to_none(project, tmp_path):
    """The first request starts a worker, more than one can bear a second; that one and then the
    last end by themselves with status 0 and stay away; another first request starts one anew.
    Every request is answered right."""
    with RoostClient(project.url) as client:
        spec = msgspec.json.decode(SPEC, type=ModelSpec)
        client.push("laborious", save_laborious(tmp_path), spec=spec)
    with (
        _scaling(project, tmp_path / "scale.log"),
        httpx.Client(base_url=project.url, timeout=_LIMIT_S, trust_env=False) as http,
    ):
        assert not project.containers("worker")
        ask_laborious(http)
        seen, answered = spike(project.url, project.placer_url, _LIMIT_S)
        assert len(seen) >= 2
        assert answered > 24
        until(lambda: not fleet(project.placer_url)["workers"], "nobody is left", _LIMIT_S)
        until(lambda: not project.containers("worker"), "no container runs", _LIMIT_S)
        ended = project.containers("worker", "--status=exited")
        assert len(ended) == 2
        for container in ended:
            shown = "{{.State.ExitCode}} {{.RestartCount}}"
            told = project.asked("docker", "inspect", "--format", shown, container).stdout
            assert told.split() == ["0", "0"]
        ask_laborious(http)
        assert len(project.containers("worker")) == 1
        assert not project.containers("worker") & ended
