"""What `roost up`, the demo and the end-to-end tests need of a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from shared.broker.port import Broker
from shared.keys import new_key


class StackConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a local stack is laid out."""

    data_dir: Path
    """Holds the repository (kept between runs), the broker's files, and logs."""
    port: int = 0
    """HTTP port of the gateway on 127.0.0.1; 0 takes a free one."""
    grpc_port: int = 0
    """The gateway's gRPC port; 0 takes a free one, -1 none."""
    placer_port: int = 0
    workers: int = 1
    """To begin with."""
    budget_bytes: int | None = None
    """Device budget of each worker; None leaves it to the worker (what the device has)."""
    device: str = "auto"
    threads: int = 1
    """Threads per engine for one operation. One is far steadier than two on small machines."""
    settings: dict[str, str] = {}
    """Further ROOST_… variables for all services."""

    @property
    def scheme(self) -> str:
        """Of the services' URLs."""
        return "https" if self.settings.get("ROOST_TLS_CERT_FILE") else "http"


def own_key() -> tuple[str, dict[str, str]]:
    """A key for a stack's own placer, and the setting by which the placer knows it."""
    key, token = new_key(scopes=("admin",), note="the stack's own")
    return token, {"ROOST_PLACER_FURTHER_KEY": f"{key.id}:{key.sha256}"}


class StackFailed(RuntimeError):
    """A part of the stack did not start or ended by itself; the message says which and why."""


class Stack(Protocol):
    """A running stack. `close` ends all that `start` and `add_worker` began, and nothing else."""

    gateway_url: str
    gateway_grpc: str
    """Host and port; empty without gRPC."""
    placer_url: str
    placer_key: str
    """An API key by which this placer, and nobody else, may be asked, whatever keys there are."""

    def endpoints(self) -> dict[str, str]:
        """Where its parts can be reached, by name, for people and scripts."""

    async def start(self) -> None:
        """Returns when the gateway can answer and all workers report. Raises `StackFailed`."""

    async def add_worker(self) -> str:
        """Starts one more worker; returns its id once the placer sees it."""

    async def remove_worker(self, worker: str) -> None:
        """Ends one worker in order: it finishes or gives back what it holds."""

    def workers(self) -> list[str]:
        """Those that run, reporting or not. A worker that the placer let go is not started
        again."""

    def spawn_worker(self) -> str:
        """Starts one more, and waits for nothing."""

    async def producer(self) -> Broker:
        """A connection to the broker of its own, as an AMQP producer has it. The caller closes."""

    async def watch(self) -> None:
        """Keeps the stack up (a service that ends is started again) until cancelled."""

    async def close(self) -> None: ...
