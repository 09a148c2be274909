"""Where models are, in words."""

from __future__ import annotations

from services.gateway.core.placement import UNPLACED, placements
from shared.control import ModelReport, Report
from shared.models import Footprint
from shared.names import ModelId

BERT = ModelId("bert/1")


def report(worker, *models, engine_up=True):
    return Report(
        worker=worker, incarnation="i", seq=1, at=0.0, device_kind="cpu", device_name="cpu",
        budget_bytes=100, used_bytes=10, measured_bytes=10, generation=1, models=models,
        engine_up=engine_up,
    )  # fmt: skip


def seen(tier="device", phase="ready", bound=True, error=None):
    return ModelReport(
        model=BERT, tier=tier, phase=phase, bound=bound, footprint=Footprint(7, 3), error=error
    )


def test_a_model_that_nobody_mentions_is_on_disk_and_servable():
    """The request itself brings it in."""
    assert str(UNPLACED) == "disk"
    assert UNPLACED.servable


def test_devices_are_counted():
    """Two workers have it, one of them bound; the bytes add up."""
    place = placements([report("a", seen()), report("b", seen(bound=False))])[BERT]
    assert str(place) == "on device of 2 workers"
    assert place.bound == ["a"]
    assert place.device_bytes == 20
    assert str(placements([report("a", seen())])[BERT]) == "on device of 1 worker"


def test_host_memory_and_loading_are_told():
    """What is on its way is told with where it comes from."""
    assert str(placements([report("a", seen("host", "absent"))])[BERT]) == "host memory"
    assert str(placements([report("a", seen("disk", "loading"))])[BERT]) == "disk, loading"


def test_a_model_that_all_failed_to_load_is_not_servable():
    """The worker's reason is passed on; one success elsewhere outweighs it."""
    failed = seen("disk", "failed", bound=False, error="no such operator")
    place = placements([report("a", failed)])[BERT]
    assert not place.servable
    assert str(place) == "cannot be loaded: no such operator"
    assert placements([report("a", failed), report("b", seen())])[BERT].servable


def test_an_engine_that_is_down_holds_nothing():
    """Its device's memory went with it."""
    assert str(placements([report("a", seen(), engine_up=False)])[BERT]) == "disk"


def test_a_model_that_is_served_from_host_memory_is_servable():
    """It failed on one worker and is swapped in by another; a worker whose engine is down holds
    nothing, nor does the one that failed."""
    failed = report("a", seen("host", "failed", bound=False, error="out of memory"))
    host = seen("host", "ready", bound=False)
    place = placements([failed, report("b", host)])[BERT]
    assert place.servable
    assert str(place) == "host memory"
    assert place.tiers == {"b": "host"}
    assert placements([failed, report("b", seen("disk", "absent"))])[BERT].servable
    assert not placements([failed])[BERT].servable
    stale = report("a", seen("host", "failed", bound=True, error="out of memory"))
    assert not placements([stale])[BERT].servable
    assert not placements([failed, report("b", host, engine_up=False)])[BERT].servable


def test_tiers_are_told_by_worker():
    """Where it is on disk only, nothing is said."""
    reports = [report("a", seen()), report("b", seen("host")), report("c", seen("disk", "absent"))]
    assert placements(reports)[BERT].tiers == {"a": "device", "b": "host"}
