"""All targets, by name. Whoever needs them imports this."""

from __future__ import annotations

from tests.fuzz import borders, codec, engine, files
from tests.fuzz.kit import TARGETS

__all__ = ["TARGETS", "borders", "codec", "engine", "files"]
