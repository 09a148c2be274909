"""The table at the end of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from rich.table import Table

from examples.demo.traffic import Answer, Book, quantile
from examples.demo.watch import Sight
from shared.units import show_bytes

SHOWN = 12


def table(sights: Sequence[Sight], book: Book, marks: Mapping[str, str]) -> Table:
    """One row for each model that has something to tell, and one for all the others.

    `marks`: what happened to a model, by name. Newest answers come first.
    """
    last: dict[str, tuple[str, str, int]] = {}
    for sight in sights:
        for seat in sight.seats:
            # A model that has gone stays in the table with the bytes it took.
            last[seat.model] = (seat.worker, seat.tier, seat.bytes)
    now = sights[-1]
    here = {seat.model: seat for seat in now.seats}
    models = sorted(
        (name for name, answers in book.answers.items() if answers),
        key=lambda name: (name not in marks, -max(a.asked for a in book.answers[name])),
    )
    made = Table(title="Models that were asked, at the end", title_justify="left")
    for column in ("model", "worker", "tier"):
        made.add_column(column)
    for column in ("bytes measured", "requests", "p50 ms", "p99 ms"):
        made.add_column(column, justify="right")
    for name in models[:SHOWN]:
        place = here.get(name)
        label = f"{name} ({marks[name]})" if name in marks else name
        made.add_row(
            label,
            place.worker if place else "—",
            place.tier if place else "disk",
            f"{last[name][2]:,}" if name in last else "",
            *_figures(book.answers[name]),
        )
    rest = [name for name in models[SHOWN:] if name in here]
    if rest:
        made.add_row(
            f"… and {len(rest)} more",
            ", ".join(sorted({here[name].worker for name in rest})),
            ", ".join(sorted({here[name].tier for name in rest})),
            f"{sum(here[name].bytes for name in rest):,}",
            *_figures([a for name in rest for a in book.answers[name]]),
        )
    total = sum(now.used_bytes.values())
    made.caption = f"{show_bytes(total)} on {len(now.used_bytes)} worker(s) at the end"
    return made


def spike(
    book: Book, model: str, others: AbstractSet[str], phases: Mapping[str, tuple[float, float]]
) -> Table:
    """Throughput and latency of the spiking model and of all others, phase by phase.

    `phases`: begin and end by name, `time.monotonic()` seconds.
    """
    made = Table(
        title=f"The spike of {model}, and the other {len(others)} models", title_justify="left"
    )
    made.add_column("")
    for column in ("asked/s", "answered/s", "p50 ms", "p99 ms"):
        made.add_column(column, justify="right")
    for column in ("p50 ms", "p99 ms"):
        made.add_column(f"others' {column}", justify="right")
    for name, (start, end) in phases.items():
        hot, rest = book.between(start, end, {model}), book.between(start, end, others)
        answered = sum(start <= a.answered < end for a in book.answers[model] if not a.error)
        made.add_row(
            name,
            f"{len(hot) / (end - start):.0f}",
            f"{answered / (end - start):.0f}",
            *_figures(hot)[1:],
            *_figures(rest)[1:],
        )
    return made


def _figures(answers: Sequence[Answer]) -> tuple[str, str, str]:
    seconds = [a.seconds for a in answers if not a.error]
    return (
        f"{len(answers):,}",
        f"{quantile(seconds, 0.5) * 1000:.1f}",
        f"{quantile(seconds, 0.99) * 1000:.1f}",
    )
