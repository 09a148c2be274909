"""The stack in one process, over the twins of broker and store in memory.

For trying Roost out where RabbitMQ and Redis cannot be had. Gateway, placer and agents are the
same code but for the two adapters; engines stay processes of their own, as always. Queues live
and die with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from roost.local.ports import free_ports
from roost.stack.port import StackConfig, StackFailed, own_key
from roost.stack.waiting import wait_for_url, wait_for_workers
from services.gateway.app import run as run_gateway
from services.gateway.config import GatewayConfig
from services.placer.app import run as run_placer
from services.placer.config import PlacerConfig
from services.worker.app import run as run_worker
from services.worker.config import WorkerConfig
from shared.broker.memory import MemoryBroker, MemoryExchange
from shared.broker.port import Broker
from shared.config import load
from shared.store.memory import MemoryState, MemoryStore

_LOOK_S = 0.5


class EmbeddedStack:
    """Gateway, placer and worker agents as tasks of this process."""

    def __init__(self, config: StackConfig) -> None:
        self._config = config
        self._exchange = MemoryExchange()
        self._state = MemoryState()
        self._services: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._workers: list[str] = []
        self.gateway_url = ""
        self.gateway_grpc = ""
        self.placer_url = ""
        self.placer_key, self._further_key = own_key()

    async def start(self) -> None:
        config = self._config
        (config.data_dir / "repository").mkdir(parents=True, exist_ok=True)
        spare = free_ports(3)
        port, placer_port = config.port or spare[0], config.placer_port or spare[1]
        grpc_port = config.grpc_port or spare[2]
        self.gateway_url = f"{config.scheme}://127.0.0.1:{port}"
        self.gateway_grpc = f"127.0.0.1:{grpc_port}" if grpc_port > 0 else ""
        self.placer_url = f"{config.scheme}://127.0.0.1:{placer_port}"
        settings = self._settings("placer") | self._further_key
        placer = load(PlacerConfig, "PLACER", settings, port=placer_port)
        self._spawn("placer", lambda stop, b, s: run_placer(placer, stop, broker=b, store=s))
        gateway = load(
            GatewayConfig, "GATEWAY", self._settings("gateway"), port=port, grpc_port=grpc_port
        )
        self._spawn("gateway", lambda stop, b, s: run_gateway(gateway, stop, broker=b, store=s))
        for _ in range(config.workers):
            self.spawn_worker()
        await wait_for_url(f"{self.placer_url}/readyz", "the placer", self._check_alive)
        await wait_for_url(f"{self.gateway_url}/v2/health/ready", "the gateway", self._check_alive)
        await self._wait_for(set(self._workers))

    async def add_worker(self) -> str:
        worker = self.spawn_worker()
        await self._wait_for({worker})
        return worker

    async def _wait_for(self, workers: set[str]) -> None:
        await wait_for_workers(self.placer_url, workers, self._check_alive, api_key=self.placer_key)

    async def remove_worker(self, worker: str) -> None:
        task, stop = self._services.pop(worker)
        stop.set()
        await task

    def endpoints(self) -> dict[str, str]:
        return {"grpc": self.gateway_grpc or "off", "placer": self.placer_url}

    async def producer(self) -> Broker:
        broker = MemoryBroker(self._exchange, "producer")
        await broker.start()
        return broker

    async def watch(self) -> None:
        while True:
            tasks = [task for task, _ in self._services.values()]
            # Not for ever: workers may be added meanwhile.
            await asyncio.wait(tasks, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            self._check_alive()

    async def close(self) -> None:
        for names in (self._workers, ["gateway", "placer"]):
            running = [self._services.pop(name) for name in names if name in self._services]
            for _, stop in running:
                stop.set()
            await asyncio.gather(*(task for task, _ in running), return_exceptions=True)

    def workers(self) -> list[str]:
        return [name for name in self._workers if name in self._services]

    def spawn_worker(self) -> str:
        name = f"worker-{len(self._workers)}"
        self._workers.append(name)
        settings = self._settings("worker") | {
            "ROOST_WORKER_WORKER_ID": name,
            "ROOST_WORKER_DEVICE": self._config.device,
            "ROOST_WORKER_THREADS": str(self._config.threads),
        }
        if self._config.budget_bytes is not None:
            settings["ROOST_WORKER_BUDGET_BYTES"] = str(self._config.budget_bytes)
        config = load(WorkerConfig, "WORKER", settings)
        self._spawn(name, lambda stop, b, s: run_worker(config, stop, broker=b, store=s))
        return name

    def _spawn(
        self,
        name: str,
        run: Callable[[asyncio.Event, MemoryBroker, MemoryStore], Awaitable[None]],
    ) -> None:
        stop = asyncio.Event()
        broker, store = MemoryBroker(self._exchange, name), MemoryStore(self._state)

        async def service() -> None:
            await run(stop, broker, store)

        self._services[name] = (asyncio.create_task(service(), name=name), stop)

    def _settings(self, service: str) -> dict[str, str]:
        data = self._config.data_dir
        own = f"ROOST_{service.upper()}_"
        return {
            key: value
            for key, value in self._config.settings.items()
            if key.startswith(own)
            or not key.startswith(("ROOST_GATEWAY_", "ROOST_PLACER_", "ROOST_WORKER_"))
        } | {
            "ROOST_REPOSITORY_URL": str(data / "repository"),
            "ROOST_DATA_DIR": str(data / "services"),
        }

    def _check_alive(self) -> None:
        for name, (task, _) in list(self._services.items()):
            if name in self._workers and task.done() and _ended_well(task):
                del self._services[name]  # the placer let it go
            elif task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    error = task.exception()
                    raise StackFailed(f"{name} ended: {error!r}") from error


def _ended_well(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None
