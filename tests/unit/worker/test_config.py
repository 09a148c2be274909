"""A worker's settings."""

from __future__ import annotations

import os

import pytest

from services.worker import devices
from services.worker.app import host_budget
from services.worker.config import WorkerConfig, parse_labels
from services.worker.hostmemory import available_bytes
from services.worker.launch import engine_environment
from shared.config import ConfigError, load
from shared.units import parse_bytes


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("BUDGET_BYTES", "lots"),
        ("HOST_BYTES", "some"),
        ("DEVICE", "gpu0"),
        ("WORKER_ID", "a/b"),
        ("INBOX_BYTES", "1MiB"),
        ("REPORT_INTERVAL_S", "9"),
        ("LOAD_TIMEOUT_S", "0"),
        ("BUDGTE_BYTES", "1"),
    ],
)
def test_wrong_settings_name_themselves(setting, value):
    """Nothing wrong is taken for a default."""
    with pytest.raises(ConfigError, match=setting):
        load(WorkerConfig, "WORKER", {f"ROOST_WORKER_{setting}": value})


def test_settings_come_from_the_environment():
    """A budget may be a number or a text."""
    config = load(
        WorkerConfig,
        "WORKER",
        {"ROOST_WORKER_BUDGET_BYTES": "4GiB", "ROOST_WORKER_DEVICE": "cuda:1"},
    )
    assert parse_bytes(config.budget_bytes) == 4 << 30
    assert config.new_worker_id() != config.new_worker_id()
    assert load(WorkerConfig, "WORKER", {}).device == "auto"


def test_the_host_tier_is_half_of_what_is_free(tmp_path):
    """On a GPU, and at most eight times its budget; on a CPU there is none unless it is asked
    for. A container's limit counts, but not the files that it has cached."""
    assert host_budget(WorkerConfig(), "cpu", 10, 1) == 0
    assert host_budget(WorkerConfig(host_bytes="1KiB"), "cpu", 10, 8) == 1024
    assert host_budget(WorkerConfig(), "cuda:0", 10, 1) == 80
    alone = host_budget(WorkerConfig(), "cuda:0", 1 << 60, 1)
    assert alone < 1 << 50
    assert host_budget(WorkerConfig(), "cuda:0", 1 << 60, 1000) < alone / 100, "each has a share"
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:       5 kB\n")
    assert available_bytes(meminfo, tmp_path) == 5 * 1024
    for name, text in (("max", "4000"), ("current", "3000"), ("stat", "anon 1\ninactive_file 70")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_bytes(meminfo, tmp_path) == 1070
    (tmp_path / "memory.max").write_text("max")
    assert available_bytes(meminfo, tmp_path) == 5 * 1024
    assert available_bytes(tmp_path / "none", tmp_path) == 0


def test_an_engine_gets_no_credentials(monkeypatch):
    """Of the environment only what the engine needs."""
    monkeypatch.setenv("ROOST_AMQP_URL", "amqp://user:secret@host/")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    environment = engine_environment(2)
    assert "secret" not in str(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["OMP_NUM_THREADS"]


def test_a_cpu_stands_for_a_device():
    """Its capacity is the machine's, its use the engine's resident set beyond the start."""
    assert devices.resolve("cuda") == "cuda:0"
    assert devices.capacity_bytes("cpu") > 1 << 28
    assert devices.Meter("cpu", "", os.getpid(), 0).models_bytes() > 1 << 20
    assert devices.Meter("cpu", "", os.getpid(), 1 << 60).models_bytes() == 0
    assert devices.Meter("cpu", "", 2**22 + 1, 0).models_bytes() == 0


def test_labels_are_read():
    """`a=b,c=d`, with room for spaces; nothing is no labels."""
    assert parse_labels("zone=a, nvidia.com/gpu=t4") == {"zone": "a", "nvidia.com/gpu": "t4"}
    assert parse_labels("") == {}


@pytest.mark.parametrize("text", ["zone", "=a", "zone=a,zone=b", "worker=w1", "z one=a", "z=a b"])
def test_wrong_labels_are_refused(text):
    """No label is left out in silence, and none passes for what the worker itself says."""
    with pytest.raises(ConfigError, match="ROOST_WORKER_LABELS"):
        WorkerConfig(labels=text)
