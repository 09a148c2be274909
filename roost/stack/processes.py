"""The stack as it is run in earnest: each service a process, RabbitMQ and Redis their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Protocol

import structlog

from roost.local import MissingService
from roost.local.ports import free_ports
from roost.local.process import OwnedProcess, ServiceFailed, tail
from roost.local.rabbit import RabbitNode
from roost.local.redis import RedisNode
from roost.stack.port import StackConfig, StackFailed, own_key
from roost.stack.waiting import wait_for_url, wait_for_workers
from shared.broker.amqp import AmqpBroker
from shared.broker.policies import apply_policies
from shared.broker.port import Broker

log = structlog.get_logger(__name__)

_KEPT_ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_HOME",
)  # fmt: skip


class Node(Protocol):
    """A private broker or store."""

    @property
    def running(self) -> bool: ...

    def start(self) -> None: ...

    def kill(self) -> None: ...


def revive(name: str, node: Node) -> bool:
    """Starts a node that has ended again, on the same ports and data. Blocks. False when there
    was nothing to do; raises `StackFailed` when it does not start."""
    if node.running:
        return False
    log.warning("node_ended", node=name)
    node.kill()  # what is left of it: RabbitMQ's epmd would keep its port
    try:
        node.start()
    except (ServiceFailed, MissingService) as error:
        raise StackFailed(f"{name} ended and did not start again: {error}") from error
    log.info("node_started_again", node=name)
    return True


class ProcessStack:
    """Private RabbitMQ and Redis, one placer, one gateway, N workers, each a process of ours."""

    def __init__(self, config: StackConfig) -> None:
        self._config = config
        self._logs = config.data_dir / "logs"
        self._rabbit: RabbitNode | None = None
        self._redis: RedisNode | None = None
        self._reviving: asyncio.Future[bool] | None = None
        self._services: dict[str, tuple[OwnedProcess, dict[str, str]]] = {}
        self._workers: list[str] = []
        self.gateway_url = ""
        self.gateway_grpc = ""
        self.placer_url = ""
        self.placer_key, self._further_key = own_key()

    async def start(self) -> None:
        try:
            await self._start()
        except ServiceFailed as error:
            raise StackFailed(str(error)) from error

    async def _start(self) -> None:
        config = self._config
        for folder in (config.data_dir, self._logs, config.data_dir / "repository"):
            folder.mkdir(parents=True, exist_ok=True)
        # 1. The broker and the store; both need seconds, so side by side.
        self._rabbit = RabbitNode(config.data_dir / "rabbitmq")
        self._redis = RedisNode(config.data_dir / "redis")
        await asyncio.gather(
            asyncio.to_thread(self._rabbit.start), asyncio.to_thread(self._redis.start)
        )
        if self._rabbit.management_url:
            await asyncio.to_thread(apply_policies, self._rabbit.management_url)
        # 2. The services. They wait for one another by themselves; no order is needed.
        port, placer_port = config.port, config.placer_port
        spare = free_ports(3)
        port, placer_port = port or spare[0], placer_port or spare[1]
        grpc_port = config.grpc_port or spare[2]
        self.gateway_url = f"{config.scheme}://127.0.0.1:{port}"
        self.gateway_grpc = f"127.0.0.1:{grpc_port}" if grpc_port > 0 else ""
        self.placer_url = f"{config.scheme}://127.0.0.1:{placer_port}"
        self._spawn("placer", {"ROOST_PLACER_PORT": str(placer_port), **self._further_key})
        ports = {"ROOST_GATEWAY_PORT": str(port), "ROOST_GATEWAY_GRPC_PORT": str(grpc_port)}
        self._spawn("gateway", ports)
        for _ in range(config.workers):
            self.spawn_worker()
        # 3. Ready is what answers, not what was started.
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
        process, _ = self._services.pop(worker)
        await asyncio.to_thread(process.stop, 40.0)

    async def producer(self) -> Broker:
        assert self._rabbit is not None, "start() comes first"
        broker = AmqpBroker(self._rabbit.amqp_url, "producer")
        await broker.start()
        return broker

    def endpoints(self) -> dict[str, str]:
        assert self._rabbit is not None, "start() comes first"
        return {
            "grpc": self.gateway_grpc or "off",
            "placer": self.placer_url,
            "amqp": self._rabbit.amqp_url,
            "rabbitmq management": self._rabbit.management_url or "off",
        }

    def pids(self) -> dict[str, int]:
        """Process ids of the services by name."""
        return {name: process.pid for name, (process, _) in self._services.items()}

    async def watch(self) -> None:
        pause_s = 0.5
        while True:
            await asyncio.sleep(pause_s)
            for name, node in (("rabbitmq", self._rabbit), ("redis", self._redis)):
                if node is None or node.running:
                    continue
                # Shielded: its thread cannot be stopped, so `close` waits for it.
                self._reviving = asyncio.ensure_future(asyncio.to_thread(revive, name, node))
                if await asyncio.shield(self._reviving):
                    pause_s = min(pause_s * 2, 10.0)
            for name, (process, extra) in list(self._services.items()):
                if process.returncode is None or self._forget_let_go(name):
                    continue
                log.warning("service_ended", service=name, returncode=process.returncode)
                self._spawn(name, extra)
                pause_s = min(pause_s * 2, 10.0)

    async def close(self) -> None:
        # Workers first: they finish what they hold and give the rest back to a broker that is
        # still there. The gateway before them would leave nobody to answer to.
        workers = [self._services.pop(name)[0] for name in self.workers()]
        rest = [self._services.pop(name)[0] for name in list(self._services)]
        await asyncio.gather(*(asyncio.to_thread(p.stop, 40.0) for p in workers))
        await asyncio.gather(*(asyncio.to_thread(p.stop, 15.0) for p in rest))
        if self._reviving is not None:
            await asyncio.wait({self._reviving})
        for node in (self._redis, self._rabbit):
            if node is not None:
                with contextlib.suppress(ServiceFailed):
                    await asyncio.to_thread(node.stop)

    def workers(self) -> list[str]:
        return [name for name in self._workers if name in self._services]

    def spawn_worker(self) -> str:
        name = f"worker-{len(self._workers)}"
        self._workers.append(name)
        extra = {
            "ROOST_WORKER_WORKER_ID": name,
            "ROOST_WORKER_DEVICE": self._config.device,
            "ROOST_WORKER_THREADS": str(self._config.threads),
        }
        if self._config.budget_bytes is not None:
            extra["ROOST_WORKER_BUDGET_BYTES"] = str(self._config.budget_bytes)
        self._spawn(name, extra)
        return name

    def _spawn(self, name: str, extra: dict[str, str]) -> None:
        assert self._rabbit is not None
        assert self._redis is not None
        data = self._config.data_dir
        service = name.partition("-")[0]
        env = {
            key: value
            for key, value in os.environ.items()
            if key in _KEPT_ENVIRONMENT or key.startswith("OTEL_")
        }
        env |= {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "ROOST_AMQP_URL": self._rabbit.amqp_url,
            "ROOST_REDIS_URL": self._redis.url,
            "ROOST_REPOSITORY_URL": str(data / "repository"),
            "ROOST_DATA_DIR": str(data / "services"),
            "ROOST_LOG_FORMAT": "json",
        }
        env |= {k: v for k, v in self._config.settings.items() if _concerns(k, service)} | extra
        process = OwnedProcess(
            name,
            self._command(name),
            env=env,
            cwd=data,
            output=self._logs / f"{name}.log",
        )
        self._services[name] = (process, extra)

    def _command(self, name: str) -> list[str]:
        """What runs the service of this name; benchmarks have workers of their own."""
        return [sys.executable, "-m", f"services.{name.partition('-')[0]}"]

    def _forget_let_go(self, name: str) -> bool:
        """Whether it is a worker that ended in order: then the placer has let it go."""
        if name not in self._workers or self._services[name][0].returncode != 0:
            return False
        log.info("worker_left", worker=name)
        del self._services[name]
        return True

    def _check_alive(self) -> None:
        for name, (process, _) in list(self._services.items()):
            if process.returncode is not None and not self._forget_let_go(name):
                raise StackFailed(
                    f"{name} ended with {process.returncode}; its log ends with:\n"
                    + tail(process.output)
                )


def _concerns(variable: str, service: str) -> bool:
    """Whether a ROOST_… setting is this service's own, or common to all."""
    others = {"gateway", "placer", "worker"} - {service}
    return not variable.startswith(tuple(f"ROOST_{other.upper()}_" for other in others))
