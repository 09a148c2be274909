"""docs/metrics.md lists every metric there is, and the dashboard asks for no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.gateway.metrics import Metrics as GatewayMetrics
from services.placer.core.policy import Policy
from services.placer.knowledge import Knowledge
from services.placer.metrics import Metrics as PlacerMetrics
from services.worker.devices import GpuMeasured
from services.worker.metrics import Metrics as WorkerMetrics
from services.worker.nvmetrics import MachineMetrics

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\b(?:roost|nv)_[a-z0-9_]+")


def names(registry: CollectorRegistry) -> dict[str, str]:
    """Kind by name as docs/metrics.md writes it: a counter of ours with its `_total`."""
    found = {}
    for family in registry.collect():
        counter = family.type == "counter"
        found[f"{family.name}_total" if counter else family.name] = family.type
    return found


@pytest.fixture(scope="module")
def there() -> dict[str, str]:
    placer, worker = PlacerMetrics(), WorkerMetrics("w0")
    placer.knowledge = Knowledge(Policy())
    worker.registry.unregister(worker.machine)  # this machine may have no GPU: one that has
    machine = MachineMetrics(lambda _: GpuMeasured(0.1, 2, 1, 1.0, 2.0, 3.0))
    machine.uuid = "GPU-1"
    machine._ticks = (0, 0)
    worker.registry.register(machine)
    return {
        **names(GatewayMetrics().registry),
        **names(placer.registry),
        **names(worker.registry),
    }


def documented() -> set[str]:
    """The first cells of the tables."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in NAME.findall(row)}


def test_the_documentation_lists_what_there_is(there):
    """No more and no less."""
    assert documented() == set(there)


def test_every_panel_asks_for_what_there_is(there):
    """Histograms by their parts; and each panel has a query, in its own place."""
    board = json.loads((ROOT / "deploy" / "grafana" / "roost.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = {
        name for panel in panels for each in panel["targets"] for name in NAME.findall(each["expr"])
    }
    parts = {
        f"{name}_{part}"
        for name, kind in there.items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    assert asked <= set(there) | parts
    assert all(panel["targets"] for panel in panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(places) == len(set(places))


def test_expressions_are_balanced():
    """The nearest to a parser that there is here."""
    board = json.loads((ROOT / "deploy" / "grafana" / "roost.json").read_text())
    for panel in board["panels"]:
        for each in panel.get("targets", ()):
            expr = re.sub(r'"[^"]*"', "", each["expr"])
            for opened, closed in ("()", "{}", "[]"):
                assert expr.count(opened) == expr.count(closed), expr
