"""What import-linter is told to look at."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "services" / "worker"


def test_every_part_of_the_worker_but_its_engine_is_kept_from_torch():
    """The contract lists modules one by one: it knows no exceptions."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {each["name"]: each for each in settings["tool"]["importlinter"]["contracts"]}
    listed = contracts["torch lives in the engine alone"]["source_modules"]
    files = {path.stem for path in WORKER.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in WORKER.glob("*/__init__.py")} - {"engine"}
    assert {f"services.worker.{each}" for each in files | folders} <= set(listed)
