"""Faults and what became of the requests beside them, as a table in Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from benchmarks.chaos import Done
from benchmarks.ledger import Ledger, Verdict

_AFTER_S: Final = 10.0
"""A fault is felt for a while after it is undone: until a placer's or a worker's lease is over, and
connections are made again."""
_COLUMNS: Final = (Verdict.TOLD, Verdict.CUT, Verdict.REFUSED, Verdict.UNSURE, Verdict.WRONG,
                   Verdict.SILENT)  # fmt: skip


def table(ledger: Ledger, faults: Sequence[Done]) -> str:
    """A request that was not answered right counts with every kind of which a fault lasted, or had
    ended shortly before, while it was asked: causes are not told apart."""
    count, seconds = Counter[str](), defaultdict[str, float](float)
    for fault in faults:
        count[fault.what] += 1
        seconds[fault.what] += fault.seconds
    beside: defaultdict[str, Counter[Verdict]] = defaultdict(Counter)
    for missed in ledger.missed:
        for what in {
            fault.what
            for fault in faults
            if fault.at < missed.ended and missed.asked < fault.at + fault.seconds + _AFTER_S
        } or {"(none)"}:
            beside[what][missed.verdict] += 1
    lines = [
        "| fault | times | lasting | " + " | ".join(_COLUMNS) + " |",
        "|---|---|---|" + "---|" * len(_COLUMNS),
    ]
    for what in sorted({*count, *beside}):
        found = " | ".join(f"{beside[what][verdict]:,}" for verdict in _COLUMNS)
        lines.append(f"| {what} | {count[what]} | {seconds[what]:.0f} s | {found} |")
    total = " | ".join(f"**{ledger.total(verdict):,}**" for verdict in _COLUMNS)
    lines.append(f"| all | **{len(faults)}** | | {total} |")
    return "\n".join(lines)
