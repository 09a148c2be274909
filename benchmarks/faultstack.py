"""A stack of real processes for faults: two of each service, and whatever ends comes again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from roost.local.ports import free_ports
from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from roost.stack.port import StackConfig
from roost.stack.processes import ProcessStack
from roost.stack.waiting import wait_for_url
from shared.repository import Repository

_LOOK_S: Final = 0.2


class FaultStack(ProcessStack):
    """A `ProcessStack` with a second gateway and a second placer. Broker and store are whoever
    does the faults' to start again; the services are started again here, as Kubernetes or Compose
    would."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.gateways: list[str] = []
        self.repository = Repository(str(config.data_dir / "repository"))
        self.restarts = 0
        self._another = asyncio.Condition()

    async def start(self) -> None:
        await super().start()
        ports = free_ports(2)
        self._spawn(
            "gateway-2", {"ROOST_GATEWAY_PORT": str(ports[0]), "ROOST_GATEWAY_GRPC_PORT": "-1"}
        )
        self._spawn("placer-2", {"ROOST_PLACER_PORT": str(ports[1])})
        self.gateways = [self.gateway_url, f"http://127.0.0.1:{ports[0]}"]
        await wait_for_url(f"{self.gateways[1]}/v2/health/ready", "gateway-2", self._check_alive)

    @property
    def rabbit(self) -> RabbitNode:
        assert self._rabbit is not None, "start() comes first"
        return self._rabbit

    @property
    def redis(self) -> RedisNode:
        assert self._redis is not None, "start() comes first"
        return self._redis

    def signal(self, name: str, number: signal.Signals) -> None:
        """To that service's process alone: a worker's engine is another one."""
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(self.pids()[name], number)

    async def keep_up(self) -> None:
        """Starts again what has ended, at once. Never returns."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for name, (process, extra) in list(self._services.items()):
                if process.returncode is not None:
                    # What is left of its group, as an orchestrator ends a container whole.
                    await asyncio.to_thread(process.kill)
                    self._spawn(name, extra)
                    self.restarts += 1
                    async with self._another:
                        self._another.notify_all()

    async def revived(self, name: str) -> None:
        """Returns once another process has taken its place."""
        before = self.pids()[name]
        async with self._another:
            await self._another.wait_for(lambda: self.pids()[name] != before)

    async def restart(self, name: str) -> None:
        """In order: it is asked to end, and then another is started."""
        self.signal(name, signal.SIGTERM)
        await self.revived(name)


@contextlib.asynccontextmanager
async def running(*, workers: int, budget_bytes: int) -> AsyncIterator[FaultStack]:
    """A stack in a folder of its own, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="roost-faults-") as folder:
        config = StackConfig(
            data_dir=Path(folder), workers=workers, budget_bytes=budget_bytes, device="cpu"
        )
        stack = FaultStack(config)
        try:
            await stack.start()
            keeping = asyncio.create_task(stack.keep_up(), name="keep up")
            try:
                yield stack
            finally:
                keeping.cancel()
                await asyncio.wait([keeping])
        finally:
            await asyncio.shield(stack.close())
