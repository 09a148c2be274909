"""Policies by name, for commands and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from sim.baselines import (
    ModelMesh,
    Periodic,
    RayServe,
    static,
    static_everywhere,
    static_replicated,
)
from sim.model import Placing, Workload
from sim.placings import Roost

Make = Callable[[Workload], Placing]
"""Oracles are made of the workload; the others only take its seed."""

POLICIES: Final[Mapping[str, Make]] = {
    "roost": lambda _: Roost(),
    "static": static,
    "static-replicated": static_replicated,
    "static-replicated-0.05": lambda workload: static_replicated(workload, 0.05),
    "static-replicated-0.1": lambda workload: static_replicated(workload, 0.1),
    "static-everywhere": static_everywhere,
    "periodic": Periodic,
    "clairvoyant": lambda workload: Periodic(workload, 10.0, clairvoyant=True),
    "modelmesh": lambda workload: ModelMesh(workload.seed),
    "ray-serve": lambda workload: RayServe(workload.seed),
}
REPLICATED: Final = ("static-replicated", "static-replicated-0.05", "static-replicated-0.1")
"""Of these the best one is *the* static placement with replication."""
