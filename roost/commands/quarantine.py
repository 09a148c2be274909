"""`roost quarantine`: which models are kept from all workers, and letting them back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from roost.client import RoostClient
from roost.trust import add_gateway
from shared.errors import Conflict


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "quarantine",
        help="models that ended engines and are kept from them",
        description="A version that ends engines, as it is loaded or by its requests, is kept "
        "from all workers and answers 'quarantined' until it is released.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser("ls", help="which, why, since when")
    ls.add_argument("--json", action="store_true", help="as the gateway gives it")
    ls.set_defaults(run=run_ls)
    release = actions.add_parser("release", help="let a model be loaded again")
    release.add_argument("model", metavar="MODEL[/VERSION]", help="without VERSION: all of them")
    release.set_defaults(run=run_release)
    for action in (ls, release):
        add_gateway(action, url)


def run_ls(arguments: argparse.Namespace) -> int:
    with RoostClient(arguments.url) as client:
        found = client.quarantined()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(map(line, found)) or "nothing is quarantined")
    return 0


def run_release(arguments: argparse.Namespace) -> int:
    name, slash, version = arguments.model.partition("/")
    with RoostClient(arguments.url) as client:
        released = client.release(name, version if slash else None)
    if not released:
        raise Conflict(f"{arguments.model} is not quarantined")
    print("\n".join(released))
    return 0


def line(held: Mapping[str, Any]) -> str:
    """One version for people to read."""
    since = datetime.fromtimestamp(held["since"], UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return f"{held['model']}  since {since}, seen by {held['worker']}: {held['reason']}"
