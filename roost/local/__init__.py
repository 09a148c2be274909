"""RabbitMQ and Redis of one's own: private processes on free loopback ports, for tests,
benchmarks and `roost up`. Nothing of an installed broker's service is read or changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from roost.local.process import ServiceFailed

__all__ = ["Binaries", "MissingService", "ServiceFailed", "find_binaries"]


class MissingService(RuntimeError):
    """RabbitMQ or Redis is not installed. The message is one line that says what to do."""


class Binaries(msgspec.Struct, frozen=True):
    """Absolute paths of the programs that private services run."""

    rabbitmq_server: str
    rabbitmqctl: str
    epmd: str
    redis_server: str


# Debian's /usr/sbin/rabbitmq-server changes to the user `rabbitmq` and refuses everybody but
# root; the scripts it wraps work for any user, so their folder comes first.
_RABBITMQ_FOLDERS = (
    "/usr/lib/rabbitmq/bin",
    "/opt/rabbitmq/sbin",
    "/opt/homebrew/sbin",
    "/usr/local/sbin",
)
_ERLANG_FOLDERS = ("/usr/lib/erlang/bin", "/opt/erlang/lib/erlang/bin", "/usr/local/lib/erlang/bin")
_COMMON_FOLDERS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/opt/homebrew/bin")


def find_binaries() -> Binaries:
    """Finds the programs, or raises `MissingService`."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    rabbit_path = [*_RABBITMQ_FOLDERS, *path]
    server = _which("rabbitmq-server", rabbit_path)
    ctl = _which("rabbitmqctl", rabbit_path)
    epmd = _which("epmd", [*path, *_ERLANG_FOLDERS, *_COMMON_FOLDERS])
    redis = _which("redis-server", [*path, *_COMMON_FOLDERS]) or _which(
        "valkey-server", [*path, *_COMMON_FOLDERS]
    )
    if server and ctl and epmd and redis:
        return Binaries(server, ctl, epmd, redis)
    found = {"rabbitmq-server": server and ctl and epmd, "redis-server": redis}
    missing = [package for package, there in found.items() if not there]
    raise MissingService(
        f"{' and '.join(missing)} not found: install it (Debian, Ubuntu: apt-get install "
        f"{' '.join(missing)}), or do without: roost up --embedded, make EMBEDDED=1"
    )


def _which(program: str, folders: list[str]) -> str | None:
    found = shutil.which(program, path=os.pathsep.join(folders))
    return str(Path(found).absolute()) if found else None
