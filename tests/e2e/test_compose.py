"""`docker compose up --build` serves a request, where there is a Docker engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from roost.client import RoostClient
from roost.local.ports import free_ports
from shared.models import ModelSpec, TensorSpec
from tests.e2e.running import ROOT, save_doubler

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1500)]

Compose = Callable[..., str]


def _engine() -> bool:
    if shutil.which("docker") is None:
        return False
    probe = ["docker", "compose", "version"], ["docker", "info"]
    return all(subprocess.run(c, capture_output=True, check=False).returncode == 0 for c in probe)


@pytest.fixture(scope="module")
def compose() -> Iterator[tuple[Compose, dict[str, str]]]:
    """A project of its own, taken down with its volumes afterwards."""
    if not _engine():
        pytest.skip("no Docker engine with Compose 2 answers here")
    http, placer, amqp = (str(port) for port in free_ports(3))
    ports = {"HTTP_PORT": http, "PLACER_PORT": placer, "AMQP_PORT": amqp}
    project = f"roost-test-{uuid.uuid4().hex[:8]}"

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["docker", "compose", "--project-name", project, *arguments],
            cwd=ROOT, env=os.environ | ports | {"BUDGET": "256MiB"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    try:
        run("up", "--build", "--detach", "--wait", "--wait-timeout", "600")
        yield run, ports
    finally:
        run("down", "--volumes", "--timeout", "50")


def test_a_model_pushed_over_http_answers(compose, tmp_path):
    """Push and ask through the published port; a second worker can be added."""
    run, ports = compose
    url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
    spec = ModelSpec(inputs=(TensorSpec("x", "FP32", (-1,)),), max_batch_size=4)
    with RoostClient(url) as client:
        client.push("doubler", save_doubler(tmp_path), spec=spec)
        answer = client.infer("doubler", {"x": np.array([[1, 2]], np.float32)}, timeout_s=60)
    np.testing.assert_array_equal(next(iter(answer.values())), [[2, 4]])
    run("up", "--detach", "--wait", "--scale", "worker=2", "--no-recreate")
    assert run("ps", "--quiet", "worker").count("\n") == 2


def test_images_are_lean_and_nobody_is_root(compose):
    """No torch in gateway and placer, and every service of ours runs as an ordinary user."""
    run, _ = compose
    has_torch = "import importlib.util as u; print(u.find_spec('torch') is not None)"
    for service in ("gateway", "placer", "worker"):
        assert run("exec", "-T", service, "id", "-u").strip() not in {"", "0"}
        found = run("exec", "-T", service, "python", "-c", has_torch).strip()
        assert found == str(service == "worker")
