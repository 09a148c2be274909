"""The `roost` command against a running stack."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest

from roost.client import RoostClient
from tests.e2e.running import Up, save_doubler
from tests.e2e.steady import until

SILERO = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "sr", "datatype": "INT64", "shape": [1]},
    ],
    "outputs": [{"name": "speech", "datatype": "FP32", "shape": [-1, 1]}],
    "stateful": True,
}


def test_a_pushed_model_answers(up):
    """push, then infer: the answer is the model's."""
    answer = json.loads(up.roost("infer", "doubler", "x=[[1, 2, 3.5]]").stdout)
    assert answer["outputs"][0]["data"] == [2, 4, 7]
    assert answer["outputs"][0]["name"] == "y"


def test_a_binary_answer_is_printed_as_json(up, tmp_path):
    """A request body that asks for raw tensors is answered with bytes; people read numbers."""
    request = {
        "parameters": {"binary_data_output": True},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 100.5]}],
    }
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request))
    answer = json.loads(up.roost("infer", "doubler", "--json", str(file)).stdout)
    assert answer["model_name"] == "doubler"
    assert answer["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [2, 201]}
    ]


def test_a_job_prints_what_infer_prints(up):
    """job submit, then job result: by an id that stands alone on its line."""
    id_ = up.roost("job", "submit", "doubler", "x=[[1, 2, 3.5]]").stdout.strip()
    result = json.loads(up.roost("job", "result", id_, "--wait").stdout)
    assert result == json.loads(up.roost("infer", "doubler", "x=[[1, 2, 3.5]]").stdout)
    assert "state: succeeded" in up.roost("job", "show", id_).stdout


def test_ls_says_where_a_model_is(up):
    """ls names the model, and that a worker has it on its device once it was asked."""
    up.roost("infer", "doubler", "x=[[1]]")
    listing = up.roost("ls").stdout
    assert "doubler" in listing
    assert "on device of 1 worker" in listing


def test_an_alias_leads_to_the_version_that_it_is_told_to(up, tmp_path):
    """alias, then infer: each answer names the version that ran; the command ends when the new
    one is loaded."""
    up.roost("push", "renamed", str(save_doubler(tmp_path)))
    _push_simple(up, tmp_path, "renamed")
    given = "x:FP32:1,1=[[1.0]]"
    for version in ("1", "2", "1"):
        told = up.roost("alias", "renamed", "prod", version).stdout.splitlines()
        assert told[-1] == f"prod  ->  version {version}"
        answer = json.loads(up.roost("infer", "renamed", given, "--version", "prod").stdout)
        assert (answer["model_version"], answer["outputs"][0]["data"]) == (version, [2])
    assert up.roost("rm", "renamed", "--version", "1", check=False).returncode == 1
    up.roost("rm", "renamed")


def test_a_removed_model_is_gone(up, tmp_path):
    """rm makes the model unknown to the gateway."""
    _push_simple(up, tmp_path, "shortlived")
    up.roost("infer", "shortlived", "x:FP32=[[1]]")
    up.roost("rm", "shortlived")
    done = up.roost("infer", "shortlived", "x:FP32=[[1]]", check=False)
    assert done.returncode == 1
    assert "shortlived" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_explain_tells_why_a_model_is_where_it_is(up):
    """explain names the worker that has the model bound."""
    up.roost("infer", "doubler", "x=[[1]]")
    assert "worker-0" in up.roost("explain", "doubler").stdout


def test_a_model_of_which_nothing_is_known_works(up, tmp_path):
    """Only a file: inputs by the file's own schema, outputs numbered, no manifest."""
    from tests.e2e.running import save_doubler

    up.roost("push", "bare", str(save_doubler(tmp_path)))
    answer = json.loads(up.roost("infer", "bare", "x:FP32:3=[1, 2, 3]").stdout)
    assert answer["outputs"] == [
        {"name": "OUTPUT__0", "datatype": "FP32", "shape": [3], "data": [2, 4, 6]}
    ]
    done = up.roost("infer", "bare", "wrong:FP32:1=[1]", check=False)
    assert done.returncode == 1
    assert "x" in done.stderr


def test_silero_vad_as_shipped_can_be_asked(up, tmp_path):
    """A stateful third-party file whose forward takes an int: pushed as it is, it answers what
    torch answers, and its state moves on from call to call."""
    import silero_vad
    import torch

    file = Path(silero_vad.__file__).parent / "data" / "silero_vad.jit"
    manifest = tmp_path / "silero.json"
    manifest.write_text(json.dumps(SILERO))
    up.roost("push", "silero-vad", str(file), "--manifest", str(manifest))
    model = torch.jit.load(str(file))
    rng = np.random.default_rng(7)
    sounds = [rng.standard_normal((1, 512)).astype(np.float32) for _ in range(3)]
    with torch.inference_mode(), RoostClient(up.url) as client:
        expected = [model(torch.from_numpy(sound), 16000).numpy() for sound in sounds]
        answers = [
            client.infer("silero-vad", {"x": sound, "sr": np.array([16000])})["speech"]
            for sound in sounds
        ]
    np.testing.assert_allclose(np.concatenate(answers), np.concatenate(expected), atol=1e-4)
    assert len({e.item() for e in expected}) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a model", "TorchScript"),
        (b"", "empty"),
    ],
)
def test_what_is_not_torchscript_is_refused(up, tmp_path, content, reason):
    """The reason stands in one line, and nothing is registered."""
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    done = up.roost("push", "bad", str(path), check=False)
    assert done.returncode == 1
    assert reason in done.stderr
    assert httpx.get(f"{up.url}/v2/models/bad", trust_env=False).status_code == 404


def test_a_truncated_file_is_refused(up, tmp_path):
    """A file that broke off is told apart before a worker ever sees it."""
    from tests.e2e.running import save_doubler

    path = save_doubler(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    done = up.roost("push", "truncated", str(path), check=False)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1


def test_other_bytes_under_an_existing_version_are_refused(up, tmp_path):
    """Versions are immutable; the same bytes again are no conflict."""
    from tests.e2e.running import save_doubler

    first = save_doubler(tmp_path)
    up.roost("push", "fixed", str(first), "--version", "3")
    up.roost("push", "fixed", str(first), "--version", "3")
    _push_simple(up, tmp_path, "other")
    done = up.roost("push", "fixed", str(tmp_path / "simple.pt"), "--version", "3", check=False)
    assert done.returncode == 1
    assert "3" in done.stderr


def test_a_command_without_a_stack_says_so():
    """No traceback: one line that names the address."""
    import subprocess
    import sys

    from tests.e2e.running import ROOT, clean_environment

    done = subprocess.run(
        [sys.executable, "-m", "roost", "ls", "--url", "http://127.0.0.1:9"],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_all_that_up_started_and_nothing_else(tmp_path, up):
    """After SIGINT none of its processes is left; the other stack still answers."""
    other = Up(tmp_path / "data", "--embedded", "--budget", "64MiB", "--device", "cpu")
    other.wait_ready()
    children = other.children()
    assert children, "the engine is a process of its own"
    assert other.stop() == 0
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert httpx.get(f"{up.url}/v2/health/ready", trust_env=False).status_code == 200


def test_a_broker_and_a_store_that_crash_are_started_again(up):
    """`roost up` keeps its own RabbitMQ and Redis up, on the same ports; requests are answered
    again without anybody's help."""
    victims = [pid for pid in up.children() if _program(pid) in {"beam.smp", "redis-server"}]
    assert len(victims) == 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)

    def answered():
        done = up.roost("infer", "doubler", "x=[[1]]", check=False)
        return done.returncode == 0 and {_program(pid) for pid in up.children()} >= {
            "beam.smp",
            "redis-server",
        }

    until(answered, "requests are answered again", limit_s=90)


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _push_simple(up: Up, folder: Path, name: str) -> None:
    import torch

    class Simple(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.script(Simple()).save(str(folder / "simple.pt"))
    up.roost("push", name, str(folder / "simple.pt"))
