"""`docker compose` on this project's file, as a project of the tests' own."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from roost.local.ports import free_ports
from tests.e2e.running import ROOT, clean_environment


@functools.cache
def _engine() -> bool:
    if shutil.which("docker") is None:
        return False
    probe = ["docker", "compose", "version"], ["docker", "info"]
    return all(subprocess.run(c, capture_output=True, check=False).returncode == 0 for c in probe)


class Project:
    """A compose project with ports and volumes of its own. Skips the test where no Docker engine
    answers."""

    def __init__(self, *overrides: Path, **settings: str) -> None:
        """`overrides` are compose files on top of ours; `settings` are variables of ours."""
        if not _engine():
            pytest.skip("no Docker engine with Compose 2 answers here")
        http, rpc, placer, amqp = (str(port) for port in free_ports(4))
        self.url, self.placer_url = f"http://127.0.0.1:{http}", f"http://127.0.0.1:{placer}"
        self.files = ("docker-compose.yml", *(str(each) for each in overrides))
        self.environment = clean_environment() | {
            "COMPOSE_PROJECT_NAME": f"roost-test-{uuid.uuid4().hex[:8]}",
            "COMPOSE_FILE": os.pathsep.join(self.files),
            "HTTP_PORT": http,
            "GRPC_PORT": rpc,
            "PLACER_PORT": placer,
            "AMQP_PORT": amqp,
            "BUDGET": "256MiB",
            **settings,
        }

    def compose(self, *arguments: str) -> str:
        """What it printed; fails with all it said."""
        return self.asked("docker", "compose", *arguments).stdout

    def asked(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def up(self, *arguments: str) -> None:
        """Builds, starts, and waits until all is healthy."""
        self.compose("up", "--build", "--detach", "--wait", "--wait-timeout", "600", *arguments)

    def containers(self, service: str, *options: str) -> set[str]:
        """Ids of those that run, or that `options` of `docker compose ps` choose."""
        return set(self.compose("ps", "--quiet", *options, service).split())

    def down(self) -> None:
        """At once: nothing of it is needed any more."""
        self.compose("kill")
        self.compose("down", "--volumes")
