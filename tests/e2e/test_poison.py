"""A model that really ends the engine, from the command line: what its askers are told, what is
kept, and the way back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.running import Up, save_doubler
from tests.e2e.steady import until

MANIFEST = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
    "max_batch_size": 16,
}


def save_crasher(folder: Path) -> Path:
    """A scripted model: x → y = 2·x, but for x = 666 a write far outside of any memory."""

    class Crasher(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x == 666).any()):
                far = torch.full([1, 1], 1 << 44, dtype=torch.int64)
                one = torch.ones([1])
                return torch.ops.aten._sparse_coo_tensor_unsafe(far, one, [4]).to_dense()
            return x * 2

    path = folder / "crasher.pt"
    torch.jit.script(Crasher()).save(str(path))
    return path


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Up]:
    """A stack of its own with two workers, a good model and one that can be made to crash."""
    stack = Up(tmp_path / "data", "--workers", "2", "--budget", "256MiB", "--device", "cpu")
    manifest = tmp_path / "model.json"
    manifest.write_text(json.dumps(MANIFEST))
    try:
        stack.wait_ready()
        for name, save in (("doubler", save_doubler), ("crasher", save_crasher)):
            stack.roost("push", name, str(save(tmp_path)), "--manifest", str(manifest))
        yield stack
    finally:
        stack.stop()


def outputs(up: Up, model: str, x: float) -> list[float]:
    answer = json.loads(up.roost("infer", model, f"x=[[{x}]]").stdout)
    return list(answer["outputs"][0]["data"])


def dead(up: Up, *arguments: str, check: bool = True) -> str:
    done = up.roost("dead", *arguments, "--amqp-url", up.endpoints["amqp"], check=check)
    return done.stdout if check else done.stdout + done.stderr


def letters(up: Up) -> list[dict[str, str]]:
    return list(json.loads(dead(up, "ls", "--model", "crasher", "--json")))


def test_a_model_that_crashes_is_quarantined_and_released(two):
    """Two requests each end two engines and are buried; the model is then refused at once, and the
    other one answers all the time. Released, it answers again; a letter that is sent again dies
    again and is not lost; purged, it is gone."""
    assert outputs(two, "crasher", 1) == outputs(two, "doubler", 1) == [2]
    for _ in range(2):
        refused = two.roost("infer", "crasher", "x=[[666]]", check=False)
        assert refused.returncode == 1
        assert "ended 2 engines" in refused.stderr
        assert outputs(two, "doubler", 3) == [6]
    until(lambda: two.roost("quarantine", "ls").stdout.startswith("crasher/1"), "quarantined")
    told = two.roost("quarantine", "ls").stdout
    assert "seen by worker-" in told
    assert "2 of its requests ended engines" in told
    refused = two.roost("infer", "crasher", "x=[[1]]", check=False)
    assert "crasher/1 is quarantined" in refused.stderr
    assert "quarantined" in two.roost("ls").stdout
    assert "quarantined" in two.roost("explain", "crasher").stdout

    found = letters(two)
    assert [each["reason"] for each in found] == ["it ended 2 engines"] * 2
    one = found[0]["id"]
    shown = dead(two, "show", one)
    assert '"name": "x"' in shown
    assert not re.search(r"(?<![0-9a-f])666(?![0-9a-f])", shown)  # but in an id, by chance
    assert "is quarantined" in dead(two, "replay", one, check=False)
    assert len(letters(two)) == 2

    assert two.roost("quarantine", "release", "crasher").stdout == "crasher/1\n"
    assert outputs(two, "crasher", 1) == [2]
    assert two.roost("quarantine", "release", "crasher", check=False).returncode == 1
    dead(two, "replay", one)

    def died_again() -> bool:
        now = [each["id"] for each in letters(two)]
        return len(now) == 2 and one not in now

    until(died_again, "the letter has died again")
    assert outputs(two, "crasher", 2) == [4]
    assert outputs(two, "doubler", 2) == [4]
    dead(two, "purge", "--model", "crasher")
    assert "no dead letters" in dead(two, "ls")


def test_a_broker_that_is_not_there_is_said_so():
    """In one line, without the password."""
    import subprocess
    import sys

    from tests.e2e.running import ROOT, clean_environment

    done = subprocess.run(
        [sys.executable, "-m", "roost", "dead", "ls"],
        cwd=ROOT,
        env=clean_environment() | {"ROOST_AMQP_URL": "amqp://user:secret@127.0.0.1:9/"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
