"""What one tenant's spike does to another one's traffic, in virtual time."""

from __future__ import annotations

import msgspec
import numpy as np

from shared.tenants import Quota
from sim.placings import Roost
from sim.run import run
from sim.tenants import STEADY, Setting, part, simulate
from tests.sim.rig import MIB, model, poisson, worker

SHORT = Setting(
    workers=2, cap=12, spiking=10, steady=5, rate=150.0, quiet=75.0,
    spike_at_s=4.0, spike_s=6.0, duration_s=12.0, warmup_s=1.0,
)  # fmt: skip


def test_a_spike_of_one_tenant_is_not_anothers():
    """The steady one, which asks for less than its share, is answered in target as if it were
    alone; where all are one tenant's it is not. What it does not use is the spiking one's."""
    shared = simulate(SHORT, tenants=True)
    mixed = simulate(SHORT, tenants=False)
    assert part(shared, SHORT, STEADY).attainment > 0.97
    assert part(mixed, SHORT, STEADY).attainment < 0.6
    busy = [sum(each.busy_s.values()) for each in (shared, mixed)]
    assert busy[0] > 0.9 * busy[1], "no device time is lost"


def test_a_quota_holds_over_a_whole_run():
    """Of two tenants that ask for the same, the one with a quota never has more bindings than it
    may, and is served all the same: its models take turns."""
    models = [
        msgspec.structs.replace(
            made, manifest=msgspec.structs.replace(made.manifest, tenant="ab"[made_at % 2])
        )
        for made_at, made in enumerate(model(n, mib=10) for n in range(8))
    ]
    workload = poisson(models, [0.3] * 8, end=60.0, seed=2)
    quotas = {"a": Quota(device_bytes=2 * 10 * MIB + MIB)}
    outcome = run(workload, [worker(0), worker(1)], Roost(quotas=quotas), seed=1)
    bound = {model.id: 0 for model in models}
    most = {"a": 0, "b": 0}
    tenant = {model.id: model.manifest.tenant for model in models}
    for change in outcome.changes:
        if change.what in {"bound", "unbound"}:
            bound[change.model] += 1 if change.what == "bound" else -1
            for each, before in most.items():
                now = sum(n for model, n in bound.items() if tenant[model] == each)
                most[each] = max(before, now)
    assert most["a"] <= 3, "one may still be unbound as its successor is bound"
    assert most["b"] >= 4
    own = np.array([tenant[model.id] for model in models])[workload.which]
    assert (outcome.ending[own == "b"] == 0).all()
    assert (outcome.ending[own == "a"] == 0).mean() > 0.9
