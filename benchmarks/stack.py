"""The stack as it is run in earnest, with workers that keep a diary, and a look at all of it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis.asyncio as redis

from benchmarks.worker import Entry, read_diary
from roost.local.ports import free_ports
from roost.stack.port import StackConfig
from roost.stack.processes import ProcessStack
from roost.stack.waiting import wait_for_url
from shared.repository import Repository


class BenchStack(ProcessStack):
    """A `ProcessStack` whose workers are `benchmarks.worker`."""

    def __init__(self, config: StackConfig, *, table: bool) -> None:
        super().__init__(config)
        self.data = config.data_dir
        self._table = table
        self.repository = Repository(str(self.data / "repository"))
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)

    async def close(self) -> None:
        await self._http.aclose()
        await super().close()

    async def add_gateway(self) -> str:
        """One more; returns its URL once it is ready."""
        port = free_ports(1)[0]
        name = f"gateway-{sum(each.startswith('gateway') for each in self._services) + 1}"
        self._spawn(name, {"ROOST_GATEWAY_PORT": str(port), "ROOST_GATEWAY_GRPC_PORT": "-1"})
        url = f"http://127.0.0.1:{port}"
        await wait_for_url(f"{url}/v2/health/ready", name, self._check_alive)
        return url

    def _command(self, name: str) -> list[str]:
        if not name.startswith("worker-"):
            return super()._command(name)
        own = [sys.executable, "-m", "benchmarks.worker", "--diary", str(self._diary(name))]
        return [*own, "--table"] if self._table else own

    def _diary(self, worker: str) -> Path:
        return self._logs / f"{worker}.diary"

    # --- what there is to see ---------------------------------------------------------------

    def diaries(self) -> list[Entry]:
        """Of all workers, in the order of time."""
        entries = [each for name in self._workers for each in read_diary(self._diary(name))]
        return sorted(entries, key=lambda entry: entry.at)

    def log(self, service: str) -> str:
        """All that a service has logged."""
        path = self._logs / f"{service}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def fleet(self) -> dict[str, Any]:
        return await self._json("/fleet")

    async def explain(self, model: str) -> dict[str, Any]:
        return await self._json(f"/explain/{model}")

    async def bound(self) -> dict[str, set[str]]:
        """Workers that are assigned or bound, by model."""
        found: dict[str, set[str]] = {}
        for worker in (await self.fleet())["workers"]:
            for seat in worker["models"]:
                if seat["assigned"] or seat["bound"]:
                    found.setdefault(seat["model"], set()).add(worker["worker"])
        return found

    async def metric(self, name: str) -> float:
        """The sum of a metric of the placer's, over its labels; 0 when there is none."""
        answer = await self._http.get(f"{self.placer_url}/metrics")
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", answer.text, re.MULTILINE)
        return sum(map(float, found))

    async def redis_keys(self) -> int:
        assert self._redis is not None
        async with redis.Redis.from_url(self._redis.url) as client:
            return int(await client.dbsize())

    async def redis_bytes(self) -> int:
        """What Redis says that its data take."""
        assert self._redis is not None
        async with redis.Redis.from_url(self._redis.url) as client:
            return int((await client.info("memory"))["used_memory"])

    async def queues(self) -> int:
        """Queues in RabbitMQ."""
        assert self._rabbit is not None
        answer = await self._http.get(f"{self._rabbit.management_url}/api/queues?columns=name")
        return len(answer.raise_for_status().json())

    def memory(self) -> dict[str, int]:
        """Bytes that each service has to itself (its unique set), with its children's."""
        return {name: _unique_bytes(pid) for name, pid in self.pids().items()}

    def cpu_seconds(self) -> dict[str, float]:
        """That each process has used so far; a worker's engine apart from its agent."""
        assert self._rabbit is not None
        pids = self.pids()
        if self._rabbit.pid is not None:
            pids["rabbitmq"] = self._rabbit.pid
        found = {}
        for name, pid in pids.items():
            process = psutil.Process(pid)
            found[name] = _cpu(process)
            children = sum(_cpu(each) for each in process.children(recursive=True))
            apart = "engine" if name.startswith("worker") else name
            found[apart] = found.get(apart, 0.0) + children
        return found

    async def _json(self, path: str) -> dict[str, Any]:
        answer = await self._http.get(f"{self.placer_url}{path}")
        found: dict[str, Any] = answer.raise_for_status().json()
        return found


@contextlib.asynccontextmanager
async def running(
    name: str,
    *,
    workers: int,
    budget_bytes: int,
    table: bool,
    device: str = "cpu",
    settings: dict[str, str] | None = None,
) -> AsyncIterator[BenchStack]:
    """A stack in a folder of its own, gone at the end."""
    with tempfile.TemporaryDirectory(prefix=f"roost-{name}-") as folder:
        config = StackConfig(
            data_dir=Path(folder),
            workers=workers,
            budget_bytes=budget_bytes,
            device=device,
            settings=settings or {},
        )
        stack = BenchStack(config, table=table)
        try:
            await stack.start()
            yield stack
        finally:
            await asyncio.shield(stack.close())


def _cpu(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _unique_bytes(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(each.memory_full_info().uss)
    return total
