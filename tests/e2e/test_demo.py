"""The demo, small: the same steps with few models, over the twins in memory."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.e2e.running import ROOT, clean_environment


def test_the_demo_holds_with_few_models(tmp_path):
    """Five of eight models, one spike, one newcomer; every check held, the picture is there."""
    done = subprocess.run(
        [
            sys.executable, "-m", "examples.demo", "--embedded", "--seed", "1",
            "--registered", "8", "--drawn", "5",
            "--folder", str(tmp_path), "--png", str(tmp_path / "demo.png"),
        ],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert (result["registered"], result["served"], result["wrong"]) == (8, 5, 0)
    spike = result["spike"]
    assert len(spike["models_whose_bindings_changed"]) == 1 or not spike["borne"]
    assert result["evicted_for_newcomer"]
    assert (tmp_path / "demo.png").stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ["demo.png"], "it cleans up after itself"
