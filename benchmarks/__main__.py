"""`python -m benchmarks NAME`: one benchmark, its table, and JSON as the last line."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import torch
import uvloop

from benchmarks import (
    connections,
    density,
    engine,
    faults,
    goodput,
    idle,
    overhead,
    oversubscribe,
    path,
    placer,
    reality,
    soak,
    spike,
    swap,
)
from benchmarks.models import FAMILIES
from benchmarks.outcome import Outcome, page, save, show
from shared.units import parse_bytes

RESULTS: Final = Path(__file__).parents[1] / "docs" / "results"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*BENCHMARKS, "page"], help="page: only write the summary")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--budget", default="0", help="density: of the device, e.g. 15.1GB")
    parser.add_argument("--family", default="", help="bert-base, minilm or tiny")
    parser.add_argument("--models", type=int, default=0, help="density: how many should fit")
    parser.add_argument("--registered", type=int, default=0, help="density: drawn out of so many")
    parser.add_argument("--fine-tunes", type=int, default=0, help="density: of one backbone")
    parser.add_argument("--rounds", type=int, default=0, help="swap, idle, soak: how many")
    parser.add_argument("--connections", type=int, default=0, help="connections: how many")
    parser.add_argument("--minutes", type=float, default=5.0, help="faults: how long")
    parser.add_argument("--rate", type=float, default=100.0, help="faults: requests per second")
    parser.add_argument("--every", type=float, default=6.0, help="faults: seconds between two")
    parser.add_argument("--only", default="", help="faults: those whose name begins so")
    parser.add_argument(
        "--rolling", action="store_true", help="faults: restart all in order; nothing may fail"
    )
    parser.add_argument("--keep", default="", help="faults: a folder for logs and the report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="keep the outcome in docs/results")
    return parser


def _density(args: argparse.Namespace) -> Awaitable[Outcome]:
    given = {
        "models": args.models,
        "registered": args.registered,
        "fine_tunes": args.fine_tunes,
    }
    return density.run(
        args.device,
        budget_bytes=parse_bytes(args.budget),
        family_name=args.family,
        seed=args.seed,
        **{name: value for name, value in given.items() if value},
    )


def _swap(args: argparse.Namespace) -> Awaitable[Outcome]:
    return swap.run(args.device, family_name=args.family or "bert-base", rounds=args.rounds or 100)


def _engine(args: argparse.Namespace) -> Awaitable[Outcome]:
    return engine.run(args.device, family_name=args.family or "minilm")


def _oversubscribe(args: argparse.Namespace) -> Awaitable[Outcome]:
    return oversubscribe.run(args.device, family_name=args.family or "minilm", seed=args.seed)


def _spike(args: argparse.Namespace) -> Awaitable[Outcome]:
    return spike.run(args.device, family_name=args.family or "minilm", seed=args.seed)


def _goodput(args: argparse.Namespace) -> Awaitable[Outcome]:
    return goodput.run(args.device, seed=args.seed)


def _idle(args: argparse.Namespace) -> Awaitable[Outcome]:
    return idle.run(args.device, rounds=args.rounds or 6, seed=args.seed)


def _faults(args: argparse.Namespace) -> Awaitable[Outcome]:
    return faults.run(
        args.device,
        minutes=args.minutes,
        seed=args.seed,
        rate=args.rate,
        every_s=args.every,
        only=args.only,
        rolling=args.rolling,
        keep=str(Path(args.keep).absolute()) if args.keep else "",
    )


def _soak(args: argparse.Namespace) -> Awaitable[Outcome]:
    return soak.run(args.device, cycles=args.rounds or soak.CYCLES)


def _overhead(args: argparse.Namespace) -> Awaitable[Outcome]:
    families = (args.family,) if args.family else tuple(FAMILIES)
    return overhead.run(args.device, families=families, rounds=args.rounds or 3, seed=args.seed)


def _connections(args: argparse.Namespace) -> Awaitable[Outcome]:
    return connections.run(args.device, connections=args.connections or 10_000, seed=args.seed)


def _path(args: argparse.Namespace) -> Awaitable[Outcome]:
    return path.run(args.device)


def _placer(args: argparse.Namespace) -> Awaitable[Outcome]:
    return placer.run(args.device)


def _reality(args: argparse.Namespace) -> Awaitable[Outcome]:
    return reality.run(args.device, seed=args.seed)


BENCHMARKS: Final[dict[str, Callable[[argparse.Namespace], Awaitable[Outcome]]]] = {
    "density": _density,
    "swap": _swap,
    "oversubscribe": _oversubscribe,
    "engine": _engine,
    "spike": _spike,
    "goodput": _goodput,
    "idle": _idle,
    "path": _path,
    "placer": _placer,
    "reality": _reality,
    "connections": _connections,
    "overhead": _overhead,
    "faults": _faults,
    "soak": _soak,
}


def main() -> int:
    args = _parser().parse_args()
    if args.name == "page":
        _write_page()
        return 0
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu measures the same on a CPU")
        return 2
    torch.set_num_threads(1)  # as the engine: far steadier on shared cores

    async def run() -> Outcome:
        return await BENCHMARKS[args.name](args)

    outcome = uvloop.run(run()) if sys.platform != "win32" else asyncio.run(run())
    if args.save:
        save(outcome, RESULTS)
        _write_page()
    show(outcome)
    return 0


def _write_page() -> None:
    order = {name: place for place, name in enumerate(BENCHMARKS)}
    kept = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-c*.json"))]
    kept.sort(key=lambda each: (order.get(each["name"], len(order)), each["machine"]["device"]))
    (RESULTS / "benchmarks.md").write_text(page(kept))


if __name__ == "__main__":
    raise SystemExit(main())
