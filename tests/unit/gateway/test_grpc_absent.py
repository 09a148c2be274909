"""A gateway where grpcio is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "grpc":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from services.gateway.app import has_grpc
print(has_grpc())
"""


def test_the_gateway_does_without():
    """Nothing of it is imported by the way, and it says that there is none."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert "grpc_off" in done.stdout
