"""`roost up --max-workers`: as many workers as are asked for, and nothing lost on the way."""

from __future__ import annotations

from tests.e2e.laborious import SPEC, fleet, save_laborious, spike
from tests.e2e.running import Up
from tests.e2e.steady import until


def test_a_spike_starts_a_worker_and_its_end_lets_one_go(tmp_path):
    """Up at once, down by draining, and every request is answered right: before, during, after."""
    settings = ("SHRINK_AFTER_S=1", "HOLD_DOWN_S=1")
    stack = Up(
        tmp_path / "data", "--max-workers", "2", "--budget", "256MiB", "--device", "cpu",
        *(part for each in settings for part in ("--set", f"ROOST_PLACER_{each}")),
    )  # fmt: skip
    try:
        stack.wait_ready()
        spec = tmp_path / "spec.json"
        spec.write_text(SPEC)
        stack.roost("push", "laborious", str(save_laborious(tmp_path)), "--manifest", str(spec))
        placer = stack.endpoints["placer"]
        workers, asked = spike(stack.url, placer)
        assert workers[:2] == ["worker-0", "worker-1"]
        assert asked > 24
        gone = ({"worker-0", "worker-1"} - set(fleet(placer)["workers"])).pop()
        told = stack.data / "logs" / f"{gone}.log"
        log = told.read_text()
        assert '"drain": true' in log.replace('"drain":true', '"drain": true')
        assert "worker_stopped" in log
        # It ended well, so nobody starts it again.
        until(lambda: '"service_stopped"' in told.read_text(), "it ended with status 0")
        assert fleet(placer)["workers"] == [({"worker-0", "worker-1"} - {gone}).pop()]
    finally:
        assert stack.stop() == 0
