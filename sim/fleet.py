"""A fleet that changes: what happens to workers at given times, and who follows the number of
workers that the placer wants."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import msgspec

from services.placer.config import PlacerConfig
from services.placer.core.wanted import Wanted
from sim.model import SimWorker
from sim.world import World


class FleetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happens to a worker. `kill` and `drain` are SIGKILL and SIGTERM to it,
    `kill_engine` SIGKILL to its engine."""

    at: float
    what: Literal["add", "kill", "drain", "kill_engine"]
    worker: str
    spec: SimWorker | None = None
    """Of a worker that is added."""


class Autoscaler(msgspec.Struct, frozen=True, kw_only=True):
    """Keeps as many workers as the placer wants. Those that it starts are called `auto-1` and so
    on; the newest leaves first."""

    template: SimWorker
    start_s: float
    """From the wish to a worker that reports: a process with torch, or a machine."""
    least: int = 1
    most: int = 64


@runtime_checkable
class Elastic(Protocol):
    """A placing that says how many workers it wants, and lets one go."""

    @property
    def wanted(self) -> Wanted: ...

    def leave(self, worker: str) -> None:
        """What the worker has is bound elsewhere first, then it ends."""
        ...


def happen(world: World, event: FleetEvent) -> None:
    """Raises `ValueError` for what contradicts the fleet."""
    if event.what == "add":
        if event.spec is None or event.spec.name != event.worker:
            raise ValueError(f"{event.worker} is added without saying what it is")
        world.add(event.spec)
        return
    worker = world.workers.get(event.worker)
    if worker is None:
        raise ValueError(f"there is no worker {event.worker} at {event.at:g} s")
    if event.what == "kill":
        world.kill(event.worker)
    elif event.what == "drain":
        worker.drain()
    else:
        worker.kill_engine()


class Adapter:
    """An autoscaler at work."""

    def __init__(self, scaler: Autoscaler, world: World, placing: Elastic) -> None:
        self._scaler = scaler
        self._world = world
        self._placing = placing
        self._leaving: set[str] = set()
        self._starting = 0
        self._made = 0

    def __repr__(self) -> str:
        return f"<Adapter starting={self._starting} leaving={sorted(self._leaving)}>"

    def follow(self) -> None:
        """After each tick of the placer; not before all workers could report."""
        world, scaler = self._world, self._scaler
        if world.agenda.now < 2 * PlacerConfig().heartbeat_s:
            return
        self._leaving &= world.workers.keys()
        staying = [name for name in world.workers if name not in self._leaving]
        wanted = min(max(self._placing.wanted.workers, scaler.least), scaler.most)
        for _ in range(wanted - len(staying) - self._starting):
            self._starting += 1
            world.agenda.after(scaler.start_s, self._start)
        if len(staying) > wanted and not self._starting:
            self._leaving.add(staying[-1])
            self._placing.leave(staying[-1])

    def _start(self) -> None:
        self._starting -= 1
        self._made += 1
        name = f"auto-{self._made}"
        self._world.add(msgspec.structs.replace(self._scaler.template, name=name))
