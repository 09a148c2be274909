"""`roost alias`: other names of versions, and where they lead."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from roost.client import RoostClient
from roost.trust import add_gateway
from shared.errors import Conflict, InvalidRequest, ModelNotFound
from shared.names import check_version

_LOOK_S = 0.25


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "alias",
        help="names for versions: where they lead, and let them lead elsewhere",
        description="Without VERSION or --split: where a model's aliases lead. With one of them: "
        "lets the alias lead there once as many workers have that as have what it leads to now, "
        "shows what it waits for, and ends when it has happened. Interrupted, or after --wait, it "
        "stays pending and still happens. The alias 'default' is what the bare name means.",
    )
    parser.add_argument("model")
    parser.add_argument("alias", nargs="?")
    parser.add_argument("version", nargs="?", help="where it is to lead")
    parser.add_argument(
        "--split", type=parse_split, metavar="V=WEIGHT,…", help="to several, e.g. 3=90,4=10"
    )
    parser.add_argument("--now", action="store_true", help="whatever is bound")
    parser.add_argument("--remove", action="store_true", help="remove the alias")
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="default: until it is done")
    parser.add_argument("--json", action="store_true", help="as the gateway gives it")
    add_gateway(parser, url)
    parser.set_defaults(run=run)


def parse_split(text: str) -> dict[int, int]:
    """`3=90,4=10`. Raises what argparse tells as a usage error."""
    split: dict[int, int] = {}
    for part in text.split(","):
        version, equals, weight = part.partition("=")
        if not equals or not weight.strip().isdigit():
            raise argparse.ArgumentTypeError(f"{part!r} is not VERSION=WEIGHT")
        try:
            number = check_version(version.strip())
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if number in split:
            raise argparse.ArgumentTypeError(f"version {number} is there twice")
        split[number] = int(weight)
    return split


def run(arguments: argparse.Namespace) -> int:
    changes = [arguments.version, arguments.split, arguments.remove or None]
    if sum(change is not None for change in changes) > 1:
        raise InvalidRequest("give one of VERSION, --split and --remove")
    with RoostClient(arguments.url) as client:
        if arguments.remove:
            if not arguments.alias:
                raise InvalidRequest("which alias is to be removed?")
            client.remove_alias(arguments.model, arguments.alias)
        elif arguments.version is not None or arguments.split is not None:
            return _lead(client, arguments)
        else:
            _show(client, arguments)
    return 0


def line(told: Mapping[str, Any]) -> str:
    """One alias for people to read."""
    text = f"{told['alias']}  ->  {show_split(told['split'])}"
    pending = told["pending"]
    if pending is None:
        given_up = told.get("given_up")
        if given_up is None:
            return text
        return f"{text}  (not to {show_split(given_up['split'])}: {given_up['why']})"
    waits = "; ".join(pending["waits_for"])
    return f"{text}  (to {show_split(pending['split'])}, waits for: {waits})"


def show_split(split: Mapping[str, int]) -> str:
    """E.g. `version 3`, or `3 (90 %), 4 (10 %)`."""
    if len(split) == 1:
        return f"version {next(iter(split))}"
    whole = sum(split.values())
    return ", ".join(
        f"{version} ({weight * 100 / whole:.3g} %)" for version, weight in split.items()
    )


def _show(client: RoostClient, arguments: argparse.Namespace) -> None:
    found = client.aliases(arguments.model)
    if arguments.alias:
        found = [told for told in found if told["alias"] == arguments.alias]
        if not found:
            raise ModelNotFound(f"model {arguments.model!r} has no alias {arguments.alias!r}")
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(map(line, found)) or "no aliases: the bare name means the newest version")


def _lead(client: RoostClient, arguments: argparse.Namespace) -> int:
    model, alias = arguments.model, arguments.alias
    to = arguments.version if arguments.split is None else arguments.split
    told = client.set_alias(model, alias, to, now=arguments.now)
    wished = told["split"] if told["pending"] is None else told["pending"]["split"]
    end = None if arguments.wait is None else time.monotonic() + arguments.wait
    told = _follow(lambda: _one(client, model, alias), told, end, shows=not arguments.json)
    if arguments.json:
        print(json.dumps(told, indent=2))
    if told["pending"] is not None:
        return 1
    if told["split"] != wished:
        given_up = told.get("given_up")
        if given_up is not None and given_up["split"] == wished:
            raise Conflict(f"it was given up: {given_up['why']}")
        raise Conflict(f"somebody else let it lead elsewhere: {line(told)}")
    return 0


def _follow(
    look: Callable[[], dict[str, Any]], told: dict[str, Any], end: float | None, *, shows: bool
) -> dict[str, Any]:
    """Shows each change, until nothing is pending or the time is over."""
    shown = ""
    while True:
        text = line(told)
        if shows and text != shown:
            print(text, flush=True)
        shown = text
        if told["pending"] is None or (end is not None and time.monotonic() >= end):
            return told
        time.sleep(_LOOK_S)
        told = look()


def _one(client: RoostClient, model: str, alias: str) -> dict[str, Any]:
    for told in client.aliases(model):
        if told["alias"] == alias:
            return told
    raise Conflict(f"somebody else removed the alias {alias!r}")
