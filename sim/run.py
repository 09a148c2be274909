"""One run of the simulation, from the first arrival until every request has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sim.fleet import Adapter, Autoscaler, Elastic, FleetEvent, happen
from sim.model import Outcome, Placing, SimWorker, Workload
from sim.settings import Settings
from sim.world import World

__all__ = ["Autoscaler", "FleetEvent", "Settings", "run"]


def run(
    workload: Workload,
    workers: Sequence[SimWorker],
    placing: Placing,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    events: Sequence[FleetEvent] = (),
    autoscaler: Autoscaler | None = None,
    until: float = float("inf"),
) -> Outcome:
    """Simulates until all have ended or `until` (s): what is left then counts as late.

    The same arguments give the same outcome, but for `wall_s`; the placing must be new. Raises
    `ValueError` for events that contradict the fleet, and for an autoscaler beside a placing that
    does not say how many workers it wants.
    """
    began = time.perf_counter()
    world = World(workload, placing, settings or Settings(), seed)
    world.begin(workers)
    for event in events:
        world.agenda.at(event.at, happen, world, event)
    if autoscaler is not None:
        if not isinstance(placing, Elastic):
            raise ValueError(f"{placing.name} does not say how many workers it wants")
        world.on_tick = Adapter(autoscaler, world, placing).follow
    _turn(world, workload, until)
    latency, ending = world.ledger.close(world.held())
    everyone = [*world.gone, *world.workers.values()]
    busy: dict[str, float] = {}
    for worker in everyone:
        busy[worker.name] = busy.get(worker.name, 0.0) + worker.busy_s
    return Outcome(
        workload=workload,
        policy=placing.name,
        latency=latency,
        ending=ending,
        busy_s=busy,
        changes=tuple(world.changes),
        load_seconds=sum(worker.load_seconds for worker in everyone),
        workers_over_time=tuple(world.fleet),
        events=world.agenda.done + len(workload.times),
        wall_s=time.perf_counter() - began,
    )


def _turn(world: World, workload: Workload, until: float) -> None:
    """Arrivals are not on the agenda: they are known, and come in order."""
    agenda, ledger = world.agenda, world.ledger
    times, which = ledger.times, workload.which.tolist()
    count, request = len(times), 0
    end = min(until, max(ledger.deadlines, default=0.0))
    while ledger.left:
        due = times[request] if request < count else float("inf")
        ahead = agenda.next_at
        if min(due, ahead) > end:
            return
        if due <= ahead:
            agenda.now = due
            world.arrive(request, which[request])
            request += 1
        else:
            agenda.step()
