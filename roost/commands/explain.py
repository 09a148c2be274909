"""`roost explain`: why a model is where it is."""

from __future__ import annotations

import argparse
import json

import httpx

from roost.calls.answers import translate_error
from roost.calls.sending import authorization
from roost.trust import add_ca_file, verify, why
from shared.aliases import check_address
from shared.errors import Unavailable
from shared.names import check_name


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "explain",
        help="why a model is where it is",
        description="Prints the placer's own account of one model: demand, bindings with their "
        "reasons, refusals with their numbers, and what happened last.",
    )
    parser.add_argument("name")
    parser.add_argument("--version", help="or an alias; default: what the bare name means")
    parser.add_argument("--json", action="store_true", help="as the placer gives it")
    parser.add_argument(
        "--placer-url", default=url, help=f"the placer (default {url}, or $ROOST_PLACER_URL)"
    )
    add_ca_file(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    path = f"{arguments.placer_url.rstrip('/')}/explain/{check_name(arguments.name)}"
    if arguments.version:
        path += f"/{check_address(arguments.version)}"
    try:
        answer = httpx.get(
            path, timeout=10, trust_env=False, verify=verify(path), headers=authorization()
        )
    except httpx.HTTPError as error:
        raise Unavailable(f"no answer from {arguments.placer_url}: {why(path, error)}") from error
    if answer.status_code != httpx.codes.OK:
        raise translate_error(answer)
    story = answer.json()
    if arguments.json:
        print(json.dumps(story, indent=2))
    else:
        print("\n".join(tell(story)))
    return 0


def tell(value: object, indent: str = "") -> list[str]:
    """Any JSON as plain indented lines, in the order in which it came."""
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                lines += [f"{indent}{key}:", *tell(item, indent + "  ")]
            else:
                lines.append(f"{indent}{key}: {_plain(item)}")
        return lines
    if isinstance(value, list):
        lines = []
        for item in value:
            inner = tell(item, indent + "  ")
            lines += [f"{indent}- {inner[0].strip()}", *inner[1:]] if inner else []
        return lines
    return [f"{indent}{_plain(value)}"]


def _plain(value: object) -> str:
    if value is None or value in ([], {}):
        return "none"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)
