"""Bytes as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{u}I": 1024**n for n, u in enumerate("KMGT", start=1)}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*\Z", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """`4GiB`, `500 MB`, `1.5G`, `1024` → bytes, with Kubernetes' meaning of the units: `G` is
    10⁹, `Gi` is 2³⁰. Raises `ValueError` on anything else."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size: a number of bytes, or as 4GiB, 512MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_bytes(count: float) -> str:
    """Three significant digits and a decimal unit: `45.6 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
