"""`docker compose up --build` serves a request, where there is a Docker engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from roost.client import RoostClient
from shared.models import ModelSpec, TensorSpec
from tests.e2e.composing import Project
from tests.e2e.running import save_doubler

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]

_OURS = ("gateway", "placer", "worker")


@pytest.fixture(scope="module")
def project() -> Iterator[Project]:
    """All of it, taken down with its volumes afterwards."""
    made = Project()
    try:
        made.up()
        yield made
    finally:
        made.down()


def test_a_model_pushed_over_http_answers(project, tmp_path):
    """Push and ask through the published port; a second worker can be added."""
    spec = ModelSpec(inputs=(TensorSpec("x", "FP32", (-1,)),), max_batch_size=4)
    with RoostClient(project.url) as client:
        client.push("doubler", save_doubler(tmp_path), spec=spec)
        answer = client.infer("doubler", {"x": np.array([[1, 2]], np.float32)}, timeout_s=60)
    np.testing.assert_array_equal(next(iter(answer.values())), [[2, 4]])
    project.compose("up", "--detach", "--wait", "--scale", "worker=2", "--no-recreate")
    assert len(project.containers("worker")) == 2


def test_images_are_lean_and_nobody_is_root(project):
    """No torch in gateway and placer, and every service of ours runs as an ordinary user."""
    has_torch = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    for service in _OURS:
        assert project.compose("exec", "-T", service, "id", "-u").strip() not in {"", "0"}
        found = project.compose("exec", "-T", service, "python", "-c", has_torch).strip()
        assert found == str(service == "worker")


def test_containers_can_do_no_more_than_they_need(project):
    """The engine confirms what the file asks for: a root file system that cannot be written, no
    capabilities, no new privileges; and every service says whether it is healthy."""
    for service in (*_OURS, "rabbitmq", "redis"):
        for container in project.containers(service):
            is_ = _inspect(project, container)
            assert is_["State"]["Health"]["Status"] == "healthy", service
            if service in _OURS:
                host = is_["HostConfig"]
                assert host["ReadonlyRootfs"]
                assert host["CapDrop"] == ["ALL"]
                assert "no-new-privileges:true" in host["SecurityOpt"]
                assert not host["Privileged"]
    writes = "try: open('/opt/roost/x', 'w')\nexcept OSError as e: print(e.strerror)"
    for service in _OURS:
        said = project.compose("exec", "-T", service, "python", "-c", writes).strip()
        assert said == "Read-only file system"


def test_the_file_warns_of_nothing(project):
    """Neither alone nor with the one for a GPU on top."""
    gpu = ("-f", "docker-compose.yml", "-f", "deploy/compose.gpu.yml")
    for files in ((), gpu):
        assert project.asked("docker", "compose", *files, "config").stderr == ""


def test_ours_end_in_order_when_they_are_stopped(project):
    """Each within its grace period, with status 0."""
    project.compose("stop", *_OURS)
    for service in _OURS:
        stopped = project.containers(service, "--all")
        assert stopped
        assert {_inspect(project, each)["State"]["ExitCode"] for each in stopped} == {0}, service


def _inspect(project: Project, container: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(project.asked("docker", "inspect", container).stdout)[0]
    return told
