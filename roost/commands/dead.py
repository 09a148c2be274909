"""`roost dead`: requests that could not be served, kept with the reason."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from roost.client import RoostClient
from roost.commands.models import aligned
from roost.deadletters import MAX_LETTERS, Letter, header_of, held, original, properties_of
from roost.trust import add_ca_file
from shared import logs
from shared.broker.port import Broker
from shared.config import CommonConfig, ConfigError, redact
from shared.connect import open_broker
from shared.errors import Conflict, InvalidRequest, ModelNotFound, RoostError, Unavailable
from shared.tls import ClientTls, TlsError
from shared.units import show_bytes

_START_S: Final = 10.0
_LIMIT: Final = 500
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGE: Final = re.compile(r"(\d{1,9})([smhd])\Z")

Work = Callable[[Broker, argparse.Namespace], Awaitable[int]]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "dead",
        help="requests that could not be served, and why",
        description="Looks at the queue of dead letters over AMQP ($ROOST_AMQP_URL). Letters are "
        "held while a command runs, and go back to their places when it ends, however it ends.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    ls = actions.add_parser("ls", help="list them, the oldest first")
    show = actions.add_parser("show", help="reason, properties and the request's JSON of some")
    show.add_argument("--save", type=Path, metavar="FILE", help="write the body of one there")
    replay = actions.add_parser(
        "replay",
        help="send some again",
        description="Publishes them again as they were, but for their deadlines, and takes them "
        "out of the queue once the broker has confirmed that.",
    )
    replay.add_argument("--all", action="store_true", help="all that are looked at")
    replay.add_argument("--force", action="store_true", help="also to a model that is quarantined")
    replay.add_argument("--url", default=url, help="the gateway, which knows what is quarantined")
    add_ca_file(replay)
    purge = actions.add_parser("purge", help="remove some for good")
    purge.add_argument("--yes", action="store_true", help="all that are looked at")
    for action, work in ((ls, list_letters), (show, show_letters), (replay, replay_letters),
                         (purge, purge_letters)):  # fmt: skip
        action.add_argument("id", nargs="*", help="as ls shows it, or its beginning")
        action.add_argument("--model", metavar="MODEL[/VERSION]", help="those of a model")
        action.add_argument("--reason", metavar="TEXT", help="those whose reason has this text")
        action.add_argument(
            "--older-than", type=parse_age, metavar="AGE", help="as 90s, 15m, 2h or 7d"
        )
        action.add_argument(
            "--limit",
            type=_limit,
            default=_LIMIT,
            help=f"look at the oldest so many (default {_LIMIT}); all are held in memory at once",
        )
        action.add_argument("--amqp-url", help="default $ROOST_AMQP_URL")
        action.set_defaults(run=run, work=work)
    for action in (ls, show):
        action.add_argument("--json", action="store_true")


def parse_age(text: str) -> float:
    """Seconds. Raises what argparse tells as a usage error."""
    match = _AGE.match(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: as 90s, 15m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def _limit(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MAX_LETTERS:
        raise argparse.ArgumentTypeError(f"from 1 to {MAX_LETTERS}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    # The connection is tried again and again, which is nobody's news here: one line says so.
    logs.configure("roost", level="error")
    logging.disable(logging.ERROR)
    url = arguments.amqp_url or os.environ.get("ROOST_AMQP_URL") or CommonConfig().amqp_url
    return asyncio.run(_run(url, arguments))


async def _run(url: str, arguments: argparse.Namespace) -> int:
    tls = ClientTls(
        setting="ROOST_AMQP",
        ca_file=os.environ.get("ROOST_AMQP_CA_FILE", ""),
        cert_file=os.environ.get("ROOST_AMQP_CERT_FILE", ""),
        key_file=os.environ.get("ROOST_AMQP_KEY_FILE", ""),
    )
    try:
        tls.context()
        broker = open_broker(url, "roost dead", tls)
    except (ConfigError, TlsError) as error:
        raise InvalidRequest(str(error)) from None
    try:
        try:
            async with asyncio.timeout(_START_S):
                await broker.start()
        except TimeoutError:
            raise Unavailable(
                f"no session with {redact(url)} within {_START_S:.0f} s: address, user and "
                "password are those of --amqp-url or $ROOST_AMQP_URL"
            ) from None
        work: Work = arguments.work
        return await work(broker, arguments)
    finally:
        await broker.close()


async def list_letters(broker: Broker, arguments: argparse.Namespace) -> int:
    async with held(broker, arguments.limit) as (letters, there):
        found = chosen(letters, arguments)
        if arguments.json:
            print(json.dumps([_summary(letter) for letter in found], indent=2))
            return 0
        rows: list[tuple[str, ...]] = [("ID", "DIED", "MODEL", "SIZE", "CORRELATION", "REASON")]
        rows += [_row(letter) for letter in found]
        print("\n".join(aligned(rows)) if found else "no dead letters")
        if there > len(letters):
            print(f"looked at the oldest {len(letters)} of {there}")
    return 0


async def show_letters(broker: Broker, arguments: argparse.Namespace) -> int:
    _insist(arguments, "which ones? Give their ids, --model, --reason or --older-than")
    async with held(broker, arguments.limit) as (letters, _):
        found = _some(letters, arguments)
        if arguments.save is not None:
            if len(found) != 1:
                raise InvalidRequest(f"--save takes one letter, and these are {len(found)}")
            body = found[0].message.body
            await asyncio.to_thread(_save, arguments.save, body)
        told = [
            _summary(letter)
            | {"properties": properties_of(letter.message), "request": header_of(letter.message)}
            for letter in found
        ]
    # Escaped: what strangers wrote must not reach a terminal as it is.
    print("\n".join(json.dumps(each, indent=2) for each in told) if not arguments.json
          else json.dumps(told, indent=2))  # fmt: skip
    return 0


async def replay_letters(broker: Broker, arguments: argparse.Namespace) -> int:
    if not arguments.all:
        _insist(arguments, "which ones? Give their ids, --model, --reason, --older-than or --all")
    async with held(broker, arguments.limit) as (letters, _):
        found = _some(letters, arguments)
        quarantined: frozenset[str] = frozenset()
        if not arguments.force:
            quarantined = await asyncio.to_thread(_quarantined, arguments.url)
        failed = 0
        for letter in found:
            try:
                _check_runnable(letter, quarantined)
                exchange, key, message = original(letter)
                await broker.publish(exchange, key, message)
            except RoostError as error:
                failed += 1
                print(f"{letter.id}  stays: {plain(str(error))}")
                continue
            # Only now: a crash before leaves it here, and perhaps there too.
            await letter.delivery.ack()
            print(f"{letter.id}  sent to {plain(key)}")
    return 1 if failed else 0


async def purge_letters(broker: Broker, arguments: argparse.Namespace) -> int:
    if not arguments.yes:
        _insist(arguments, "that removes all of them: give --yes, or say which")
    async with held(broker, arguments.limit) as (letters, _):
        found = _some(letters, arguments)
        for letter in found:
            await letter.delivery.ack()
    print(f"removed {len(found)} of {len(letters)} that were looked at")
    return 0


def chosen(letters: Iterable[Letter], arguments: argparse.Namespace) -> list[Letter]:
    """Those that suit all that was asked for."""
    return [letter for letter in letters if _suits(letter, arguments, time.time())]


def _suits(letter: Letter, asked: argparse.Namespace, now: float) -> bool:
    if asked.id and not any(letter.id.startswith(each) for each in asked.id):
        return False
    if asked.model and not letter.is_of(asked.model):
        return False
    if asked.reason and asked.reason not in letter.reason:
        return False
    if asked.older_than is None:
        return True
    return letter.at is not None and now - letter.at > asked.older_than


def _some(letters: list[Letter], arguments: argparse.Namespace) -> list[Letter]:
    found = chosen(letters, arguments)
    if not found:
        raise ModelNotFound(f"none of the {len(letters)} letters that were looked at is meant")
    return found


def _insist(asked: argparse.Namespace, otherwise: str) -> None:
    if not (asked.id or asked.model or asked.reason or asked.older_than is not None):
        raise InvalidRequest(otherwise)
    if any(not each for each in asked.id):
        raise InvalidRequest("an empty id would mean all")


def _quarantined(url: str) -> frozenset[str]:
    try:
        with RoostClient(url) as client:
            return frozenset(str(held["model"]) for held in client.quarantined())
    except Unavailable as error:
        raise Unavailable(
            f"nobody says what is quarantined ({error}); --force sends them regardless"
        ) from None


def _check_runnable(letter: Letter, quarantined: frozenset[str]) -> None:
    # A bare name may mean any of its versions.
    for model in quarantined:
        if letter.model in {model, model.partition("/")[0]}:
            raise Conflict(f"{model} is quarantined: it would only be refused")


def _summary(letter: Letter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "died_at": None if letter.at is None else _when(letter.at),
        "model": letter.model or None,
        "reason": letter.reason,
        "queue": letter.queue,
        "routing_key": letter.routing_key,
        "correlation_id": letter.message.correlation_id,
        "size_bytes": len(letter.message.body),
    }


def _row(letter: Letter) -> tuple[str, ...]:
    return (
        letter.id,
        "?" if letter.at is None else _when(letter.at),
        letter.model or "?",
        show_bytes(float(len(letter.message.body))),
        plain(letter.message.correlation_id or "-")[:40],
        plain(letter.reason)[:120],
    )


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plain(text: str) -> str:
    """Without what would move a terminal's cursor."""
    return "".join(each if each.isprintable() else "�" for each in text)


def _save(path: Path, body: bytes) -> None:
    try:
        path.write_bytes(body)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from error
