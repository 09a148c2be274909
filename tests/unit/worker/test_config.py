"""A worker's settings."""

from __future__ import annotations

import os

import pytest

from services.worker import devices
from services.worker.config import WorkerConfig
from services.worker.launch import engine_environment
from shared.config import ConfigError, load
from shared.units import parse_bytes


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("BUDGET_BYTES", "lots"),
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
