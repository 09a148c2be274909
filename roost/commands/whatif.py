"""`roost whatif`: how many workers a recorded load needs."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import msgspec

from shared.errors import InvalidRequest
from shared.traces import read_trace
from shared.units import parse_bytes, show_bytes

POLICIES = (
    "roost", "static", "static-replicated", "static-replicated-0.05", "static-replicated-0.1",
    "static-everywhere", "periodic", "clairvoyant", "modelmesh", "ray-serve",
)  # fmt: skip
"""sim.policies.POLICIES, which a test compares: the simulator is only imported when it runs."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "whatif",
        help="how many workers a recorded load needs",
        description="Simulates the requests of a trace, which the placer records when "
        "ROOST_PLACER_RECORD names a file, on fleets of different sizes, with the placer's and the "
        "worker's own decisions. docs/simulator.md says how far to trust it.",
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--workers", type=_sizes, default=(1, 8), metavar="A..B",
        help="sizes to try, upwards, until one reaches the target (default 1..8)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=_bytes, default=0, metavar="SIZE",
        help="of one worker's device, e.g. 12GiB (default: as the last worker of the trace)",
    )  # fmt: skip
    parser.add_argument(
        "--host", type=_bytes, default=None, metavar="SIZE",
        help="of one worker's host memory for copies (default: as in the trace; with --budget 0)",
    )  # fmt: skip
    parser.add_argument(
        "--target", type=_share, default=0.99,
        help="share of the requests to be answered within their model's target_ms (default 0.99)",
    )  # fmt: skip
    parser.add_argument("--policy", choices=POLICIES, default="roost")
    parser.add_argument(
        "--busiest", type=_length, metavar="SECONDS",
        help="only the busiest stretch of this length",
    )  # fmt: skip
    parser.add_argument(
        "--warmup", type=_seconds, default=0.0, metavar="SECONDS",
        help="the first seconds are served but not counted: they begin with nothing loaded",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every size, also beyond the first")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--picture", type=Path, metavar="PNG", help="of the sizes that were tried")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when a size reaches the target, 3 when none does."""
    from sim import whatif
    from sim.report import HEAD, row, summary, table

    trace = read_trace(arguments.trace)
    if not trace.requests:
        raise InvalidRequest(f"{arguments.trace} has no requests")
    models, assumed = whatif.models_of(trace)
    window = None if arguments.busiest is None else whatif.busiest(trace, arguments.busiest)
    workload = whatif.workload_of(
        trace, models, window,
        warmup_s=arguments.warmup, seed=arguments.seed, name=arguments.trace.name,
    )  # fmt: skip
    first, last = arguments.workers
    tried, enough = [], None
    for outcome in whatif.simulate(
        trace, workload, range(first, last + 1), arguments.policy,
        budget_bytes=arguments.budget, host_bytes=arguments.host,
    ):  # fmt: skip
        tried.append(outcome)
        if outcome.attainment() >= arguments.target and enough is None:
            enough = len(outcome.busy_s)
        if enough is not None and not arguments.all:
            break
    figures = [summary(outcome) for outcome in tried]
    if arguments.picture is not None:
        _draw(arguments.picture, tried[::-1])  # the size that is enough first
    if arguments.json:
        told = {
            "workers": enough, "target": arguments.target, "policy": arguments.policy,
            "assumed": msgspec.to_builtins(assumed), "tried": msgspec.to_builtins(figures),
        }  # fmt: skip
        print(json.dumps(told, indent=2))
        return 0 if enough is not None else 3
    fleet = whatif.fleet_of(trace, 1, budget_bytes=arguments.budget, host_bytes=arguments.host)
    host = f" and {show_bytes(fleet[0].host_bytes)} of host memory" if fleet[0].host_bytes else ""
    print(
        f"{len(workload.times):,} requests of {len(models)} models in {workload.duration_s:,.0f} s "
        f"on workers with {show_bytes(fleet[0].budget_bytes)}{host}"
    )
    for names, what in (
        (assumed.times, "were never measured: taken to run as long as the median one"),
        (assumed.loads, "were never seen loading: taken to load in 1 s"),
    ):
        if names:
            print(f"note: {len(names)} models {what} ({', '.join(names[:3])}, …)")
    print(table(HEAD, [row(each) for each in figures]))
    if enough is None:
        print(f"not enough: {last} workers do not reach {arguments.target:.1%}")
        return 3
    print(f"enough: {enough} worker{'s' * (enough != 1)} reach {arguments.target:.1%}")
    return 0


def _draw(path: Path, tried: list) -> None:  # type: ignore[type-arg]  # sim is imported late
    try:
        from sim.picture import draw
    except ModuleNotFoundError as error:
        raise InvalidRequest("a picture needs matplotlib: pip install 'roost[sim]'") from error
    try:
        draw(path, tried)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror or error}") from error


def _sizes(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers, or A..B")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= 1024:
        raise argparse.ArgumentTypeError("workers are from 1 to 1024, the smaller number first")
    return first, last


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time of 0 s or longer")
    return seconds


def _length(text: str) -> float:
    if not (seconds := _seconds(text)):
        raise argparse.ArgumentTypeError("a stretch is longer than 0 s")
    return seconds


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, e.g. 0.99") from error
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError("the target is a share above 0 and at most 1")
    return share
