"""What the fault harness counts with, on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.chaos import Done
from benchmarks.clocks import Clocks
from benchmarks.faultstack import small_disk
from benchmarks.faulttable import table
from benchmarks.known import Model
from benchmarks.ledger import Ended, Ledger, Verdict, judged

MODEL = Model("times-003", 3)
_CLOCK = "import time; print(time.time()); print(time.monotonic()); input(); print(time.time())"


def answer(*y: int) -> bytes:
    return json.dumps({"outputs": [{"data": y}]}).encode()


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, answer(3, 6), Verdict.RIGHT),
        (200, answer(2, 4), Verdict.WRONG),
        (200, b"", Verdict.WRONG),
        (503, b'{"error": "later"}', Verdict.TOLD),
        (503, b"<html>", Verdict.WRONG),
    ],
)
def test_an_answer_is_right_only_if_it_is_that_of_its_model_and_request(status, body, verdict):
    """Another model's is wrong, and so is an error that does not say what is the matter."""
    assert judged(status, body, MODEL, [1, 2]).verdict is verdict


def test_what_went_wrong_stands_beside_the_faults_of_that_time():
    """A fault is felt for ten seconds after its end; what is beside none is told apart."""
    ledger, now = Ledger(), time.time()
    ledger.note("http", MODEL.name, now, Ended(Verdict.RIGHT))
    ledger.note("http", MODEL.name, now, Ended(Verdict.CUT))
    ledger.note("amqp", MODEL.name, now - 100, Ended(Verdict.SILENT))
    ledger.missed[1] = type(ledger.missed[1])(
        Verdict.SILENT, "amqp", MODEL.name, now - 100, now - 90, ""
    )
    faults = [Done(now - 8, 2, "kill", "worker-0"), Done(now - 60, 1, "restart", "gateway")]
    lines = table(ledger, faults).splitlines()
    assert "| kill | 1 | 2 s | 0 | 1 | 0 | 0 | 0 | 0 |" in lines
    assert "| restart | 1 | 1 s | 0 | 0 | 0 | 0 | 0 | 0 |" in lines
    assert "| (none) | 0 | 0 s | 0 | 0 | 0 | 0 | 0 | 1 |" in lines
    assert lines[-1] == "| all | **2** | | **0** | **1** | **0** | **0** | **0** | **1** |"


def test_one_process_s_wall_clock_can_be_set_off_and_back(tmp_path: Path):
    """While it runs; its monotonic clock stays right, as after a real clock step."""
    clocks = Clocks(tmp_path)
    clocks.build()
    if clocks.missing:
        pytest.skip(clocks.missing)
    environment = {**os.environ, **clocks.environment("worker-0")}
    clocks.set_off("worker-0", 3600.0)
    with subprocess.Popen(
        [sys.executable, "-c", _CLOCK],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ahead, monotonic = float(process.stdout.readline()), float(process.stdout.readline())
        assert abs(ahead - time.time() - 3600) < 60
        assert abs(monotonic - time.monotonic()) < 60
        clocks.set_off("worker-0", 0.0)
        process.stdin.write("\n")
        process.stdin.flush()
        assert abs(float(process.stdout.readline()) - time.time()) < 60


def test_a_small_disk_is_gone_afterwards(tmp_path: Path):
    """Where this user may mount one it is small; elsewhere the folder is any folder."""
    folder = tmp_path / "repository"
    with small_disk(folder) as mounted:
        assert folder.is_dir()
        assert os.path.ismount(folder) == mounted
        if mounted:
            assert os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize <= 64 << 20
    assert not os.path.ismount(folder)
