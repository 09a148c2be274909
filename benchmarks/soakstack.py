"""A stack of real processes that can be looked into: what each has, and broker, store and disk."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import redis.asyncio as redis

from benchmarks import counted
from roost.local.ports import free_ports
from roost.stack.port import StackConfig
from roost.stack.processes import ProcessStack
from shared.repository import Repository

COUNTERS: Final = ("loads", "evictions", "engine_restarts", "given_back")
"""`roost_worker_…_total`."""
_LOOKS: Final = 41
"""Half a second apart, for a list of the management that is not empty."""


class SoakStack(ProcessStack):
    """A `ProcessStack` whose services tell their Python objects."""

    def __init__(self, config: StackConfig) -> None:
        self._metrics_port = free_ports(1)[0]
        super().__init__(config)
        self.data = config.data_dir
        self.repository = Repository(str(self.data / "repository"))
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self.types: dict[str, dict[str, int]] = {}
        """Of each service, what it has most of, at the last sample."""

    async def close(self) -> None:
        await self._http.aclose()
        await super().close()

    def _command(self, name: str) -> list[str]:
        module = f"services.{name.partition('-')[0]}"
        return [sys.executable, "-m", "benchmarks.counted", str(self._socket(name)), module]

    def _spawn(self, name: str, extra: dict[str, str]) -> None:
        if name.startswith("worker-"):
            extra = {**extra, "ROOST_WORKER_METRICS_PORT": str(self._metrics_port)}
        super()._spawn(name, extra)

    def _socket(self, name: str) -> Path:
        return self.data / f"{name}.socket"

    # --- what there is to see -----------------------------------------------------------------

    async def counters(self) -> dict[str, float]:
        """The worker's counts so far, over all their labels."""
        answer = await self._http.get(f"http://127.0.0.1:{self._metrics_port}/metrics")
        found = {}
        for name in COUNTERS:
            lines = re.findall(
                rf"^roost_worker_{name}_total(?:{{[^}}]*}})? (\S+)$", answer.text, re.MULTILINE
            )
            found[name] = sum(map(float, lines))
        return found

    async def sample(self) -> dict[str, float]:
        """Everything that could grow, by name."""
        found: dict[str, float] = {}
        for name, pid in self.pids().items():
            service = name.partition("-")[0]
            told = await asyncio.to_thread(counted.ask, self._socket(name))
            self.types[service] = told["types"]
            agent = "agent" if service == "worker" else service
            found[f"{agent}: Python objects"] = told["objects"]
            found[f"{agent}: Python blocks"] = told["blocks"]
            process = psutil.Process(pid)
            found |= _of(agent, process)
            for child in _engines(process):
                found |= _of("engine", child)
        found |= await self._broker() | await self._store()
        for title, folder in (("repository", "repository"), ("services' data", "services")):
            files = await asyncio.to_thread(_files, self.data / folder)
            found[f"{title}: files"] = len(files)
            found[f"{title}: bytes"] = sum(files)
        return found

    async def _broker(self) -> dict[str, float]:
        """The management API counts every few seconds, and lists at once: it is asked to list."""
        assert self._rabbit is not None
        url = self._rabbit.management_url
        found: dict[str, float] = {}
        for what in ("queues", "exchanges", "bindings", "connections", "channels", "consumers"):
            listed = await self._listed(f"{url}/api/{what}")
            found[f"RabbitMQ: {what}"] = len(listed)
            if what == "queues":
                found["RabbitMQ: messages"] = sum(each.get("messages", 0) for each in listed)
        return found

    async def _listed(self, url: str) -> list[dict[str, Any]]:
        """There always are some: a busy broker lists none where its own count came too late."""
        for _ in range(_LOOKS):
            answer = await self._http.get(url)
            listed: list[dict[str, Any]] = answer.raise_for_status().json()
            if listed:
                return listed
            await asyncio.sleep(0.5)
        return []

    async def _store(self) -> dict[str, float]:
        assert self._redis is not None
        async with redis.Redis.from_url(self._redis.url) as client:
            memory = await client.info("memory")
            clients = await client.info("clients")
            return {
                "Redis: keys": float(await client.dbsize()),
                # Without what clients' buffers take, which is there for a moment.
                "Redis: bytes": float(memory["used_memory_dataset"]),
                "Redis: connections": float(clients["connected_clients"]),
            }


def _of(name: str, process: psutil.Process) -> dict[str, float]:
    memory = process.memory_full_info()
    return {
        f"{name}: private bytes": memory.uss,
        f"{name}: shared bytes": memory.rss - memory.uss,
        f"{name}: open files": process.num_fds(),
        f"{name}: threads": process.num_threads(),
    }


def _engines(agent: psutil.Process) -> list[psutil.Process]:
    """The innermost child is the engine: it may be started by others that confine it."""
    found: list[psutil.Process] = agent.children(recursive=True)
    return found[-1:]


def _files(folder: Path) -> list[int]:
    """Their sizes."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                found.append(path.stat().st_size)
    return found
