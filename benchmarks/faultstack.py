"""A stack of real processes for faults: two of each service, and whatever ends comes again.

One of each two reaches broker and store directly, as most do; the other through proxies of ours,
which can do to its connections what networks do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

import httpx
import numpy as np

from benchmarks.clocks import Clocks
from benchmarks.proxy import Proxy
from roost.local.ports import LOOPBACK, free_ports
from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from roost.stack.port import StackConfig
from roost.stack.processes import ProcessStack
from roost.stack.waiting import wait_for_url, wait_for_workers
from shared.repository import Repository

PLACERS: Final = ("placer", "placer-2")
_GATEWAYS: Final = ("gateway", "gateway-2")
_FAR: Final = ("gateway-2", "placer-2", "worker-1")
"""Those behind proxies."""
_LOOK_S: Final = 0.2
_DISK_MIB: Final = 64


class FaultStack(ProcessStack):
    """A `ProcessStack` with a second gateway and a second placer. Broker and store are whoever
    does the faults' to start again; the services are started again here, as Kubernetes or Compose
    would."""

    def __init__(self, config: StackConfig, rng: np.random.Generator) -> None:
        super().__init__(config)
        self.gateways: list[str] = []
        self.gateways_grpc: list[str] = []
        self.repository_folder = config.data_dir / "repository"
        self.repository = Repository(str(self.repository_folder))
        self.clocks = Clocks(config.data_dir / "clocks")
        self.links: dict[str, Proxy] = {}
        """By `<service>~<rabbitmq or redis>`."""
        self.restarts = 0
        self._rng = rng
        self._urls: dict[str, str] = {}
        """By service, where it says whether it is ready."""
        self._another = asyncio.Condition()

    async def start(self) -> None:
        await asyncio.to_thread(self.clocks.build)
        for name in _FAR:
            for part in ("rabbitmq", "redis"):
                proxy = self.links[f"{name}~{part}"] = Proxy(self._rng)
                await proxy.start()
        await super().start()
        ports = free_ports(3)
        self.gateways = [self.gateway_url, f"http://{LOOPBACK}:{ports[0]}"]
        self.gateways_grpc = [self.gateway_grpc, f"{LOOPBACK}:{ports[1]}"]
        placers = [self.placer_url, f"http://{LOOPBACK}:{ports[2]}"]
        self._urls = {
            **{
                name: f"{url}/v2/health/ready"
                for name, url in zip(_GATEWAYS, self.gateways, strict=True)
            },
            **{name: f"{url}/readyz" for name, url in zip(PLACERS, placers, strict=True)},
        }
        self._spawn(
            "gateway-2",
            {"ROOST_GATEWAY_PORT": str(ports[0]), "ROOST_GATEWAY_GRPC_PORT": str(ports[1])},
        )
        self._spawn("placer-2", {"ROOST_PLACER_PORT": str(ports[2])})
        for name in ("gateway-2", "placer-2"):
            await self.ready(name)

    async def close(self) -> None:
        await super().close()
        for proxy in self.links.values():
            await proxy.close()

    @property
    def rabbit(self) -> RabbitNode:
        assert self._rabbit is not None, "start() comes first"
        return self._rabbit

    @property
    def redis(self) -> RedisNode:
        assert self._redis is not None, "start() comes first"
        return self._redis

    @property
    def logs(self) -> Path:
        return self._logs

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

    async def ready(self, name: str) -> None:
        """Returns once the service says so. Raises `StackFailed`."""
        if name in self._urls:
            await wait_for_url(self._urls[name], name, self._alive)
        else:
            leader, *_ = await self.led(bool)
            url = self._urls[leader].removesuffix("/readyz")
            await wait_for_workers(url, {name}, self._alive)

    async def leaders(self) -> list[str]:
        """The placers that say they decide. A suspended one says nothing."""
        return [name for name in PLACERS if await self._role(name) == "leader"]

    async def _role(self, name: str) -> str:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            async with httpx.AsyncClient(timeout=1.0, trust_env=False) as http:
                answer: dict[str, str] = (await http.get(self._urls[name])).json()
                return answer.get("role", "")
        return ""

    async def led(self, enough: Callable[[list[str]], bool]) -> list[str]:
        """The placers that say they decide, once they are such."""
        while True:
            leaders = await self.leaders()
            if enough(leaders):
                return leaders
            await asyncio.sleep(_LOOK_S)

    def _alive(self) -> None:
        """Whoever ends is started again."""

    def _spawn(self, name: str, extra: dict[str, str]) -> None:
        extra = extra | self.clocks.environment(name)
        if name in _FAR:
            broker, store = self.links[f"{name}~rabbitmq"], self.links[f"{name}~redis"]
            broker.target_port, store.target_port = self.rabbit.port, self.redis.port
            extra |= {
                "ROOST_AMQP_URL": _by(self.rabbit.amqp_url, broker),
                "ROOST_REDIS_URL": _by(self.redis.url, store),
            }
        super()._spawn(name, extra)


def _by(url: str, proxy: Proxy) -> str:
    return url.replace(f":{proxy.target_port}/", f":{proxy.port}/")


@contextlib.asynccontextmanager
async def running(
    rng: np.random.Generator, *, budget_bytes: int, keep: Path | None = None
) -> AsyncIterator[FaultStack]:
    """A stack in a folder of its own, gone at the end unless it is to be kept. The repository is on
    a small disk of its own where this user may mount one."""
    with contextlib.ExitStack() as folders:
        if keep is None:
            folder = Path(
                folders.enter_context(tempfile.TemporaryDirectory(prefix="roost-faults-"))
            )
        else:
            folder = keep
        folders.enter_context(small_disk(folder / "repository"))
        config = StackConfig(data_dir=folder, workers=2, budget_bytes=budget_bytes, device="cpu")
        stack = FaultStack(config, rng)
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


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts one there, in memory; False where this user may not."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={_DISK_MIB}m"
    command = ["mount", "-t", "tmpfs", "-o", size, "roost-faults", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            # Lazily: what still looks at it must not keep the folder from being removed.
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
