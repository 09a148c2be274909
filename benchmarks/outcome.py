"""What a benchmark found, for people (a table) and for programs (its last line, JSON)."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

Bound = Literal["at least", "at most"]


class Figure(msgspec.Struct, frozen=True):
    """One thing measured, and what it should reach. Without a reach it only informs."""

    name: str
    value: float
    unit: str = ""
    reach: float | None = None
    bound: Bound = "at most"

    @property
    def ok(self) -> bool:
        if self.reach is None:
            return True
        return self.value <= self.reach if self.bound == "at most" else self.value >= self.reach


class Machine(msgspec.Struct, frozen=True):
    """What it ran on."""

    device: str
    cores: int
    python: str
    torch: str
    system: str

    def __str__(self) -> str:
        return (
            f"{self.device}, {self.cores} cores, {self.system}, Python {self.python}, "
            f"torch {self.torch}"
        )


class Outcome(msgspec.Struct, frozen=True):
    """A benchmark's answer: its headline, then everything."""

    name: str
    what: str
    """One sentence: what was done to what."""
    machine: Machine
    figures: tuple[Figure, ...]
    """The first is the headline."""
    seconds: float
    at: str = ""

    @property
    def ok(self) -> bool:
        return all(figure.ok for figure in self.figures)

    def summary(self) -> dict[str, object]:
        head = self.figures[0]
        return {
            "name": self.name,
            "value": _rounded(head.value),
            "reach": head.reach,
            "ok": self.ok,
            "figures": [
                {
                    "name": figure.name,
                    "value": _rounded(figure.value),
                    "unit": figure.unit,
                    "reach": figure.reach,
                    "bound": figure.bound,
                    "ok": figure.ok,
                }
                for figure in self.figures
            ],
            "what": self.what,
            "machine": msgspec.to_builtins(self.machine),
            "seconds": round(self.seconds, 1),
            "at": self.at,
        }


def machine(device: str, torch_version: str) -> Machine:
    return Machine(
        device=device,
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        torch=torch_version,
        system=f"{platform.system()} {platform.release().split('-')[0]}",
    )


def now() -> str:
    """As it stands in the results: UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def show(outcome: Outcome) -> None:
    """The table, and the JSON as the last line."""
    console = Console(width=110)
    table = Table(title=f"{outcome.name}: {outcome.what}", title_justify="left")
    for column in ("figure", "value", "reach", ""):
        table.add_column(column, justify="left" if column in {"figure", ""} else "right")
    for figure in outcome.figures:
        table.add_row(*row(figure))
    console.print(table)
    console.print(f"{outcome.machine}; {outcome.seconds:.0f} s")
    print(json.dumps(outcome.summary()), flush=True)


def row(figure: Figure) -> tuple[str, str, str, str]:
    """Name, value, reach and a mark, as text."""
    unit = f" {figure.unit}" if figure.unit else ""
    if figure.reach is None:
        return figure.name, f"{_told(figure.value)}{unit}", "", ""
    sign = "≤" if figure.bound == "at most" else "≥"
    reach = f"{sign} {_told(figure.reach)}{unit}"
    return figure.name, f"{_told(figure.value)}{unit}", reach, "✓" if figure.ok else "✗"


def save(outcome: Outcome, folder: Path) -> Path:
    """Keeps the outcome, in place of the last one of the same benchmark and device kind."""
    kind = "cuda" if outcome.machine.device.startswith("cuda") else "cpu"
    path = folder / f"{outcome.name}-{kind}.json"
    path.write_text(json.dumps(outcome.summary(), indent=1) + "\n")
    return path


def page(summaries: Sequence[dict[str, object]]) -> str:
    """The summary page of everything that is kept, in Markdown."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; each table is one command, `python -m benchmarks NAME`, with its",
        "baseline in the same run. What is missed is marked ✗ and explained in",
        "[README.md](README.md).",
    ]
    for summary in summaries:
        figures = msgspec.convert(summary["figures"], list[Figure])
        ran_on = msgspec.convert(summary["machine"], Machine)
        lines += [
            "",
            f"## {summary['name']}",
            "",
            f"{summary['what']}",
            "",
            f"{summary['at']}, {ran_on}, {summary['seconds']} s.",
            "",
            "| figure | value | reach | |",
            "|---|---:|---:|---|",
        ]
        lines += [f"| {' | '.join(row(figure))} |" for figure in figures]
    return "\n".join([*lines, ""])


def _told(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
