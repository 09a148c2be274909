"""The clock of jobs: Unix time, since they outlive processes and machines."""

from __future__ import annotations

import time


def now_ms() -> int:
    return time.time_ns() // 1_000_000
