"""`roost key` and `roost tenant`: who may ask, push and administrate, and how much of the fleet
each may take.

Both work on the repository itself, since the first key is made before any gateway would take it;
with --url they ask a gateway instead, with an admin key of $ROOST_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, cast

import msgspec

from roost.client import RoostClient
from roost.commands.dead import parse_age
from roost.commands.models import aligned
from roost.trust import add_ca_file
from shared.config import CommonConfig
from shared.errors import InvalidRequest, ModelNotFound
from shared.keys import SCOPES, Key, Scope, new_key
from shared.repository import Repository
from shared.tenants import Quota
from shared.units import parse_bytes, show_bytes

_BOUNDS: Final = ("requests_per_s", "concurrency", "request_bytes", "device_bytes")


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_key(commands)
    _add_tenant(commands)


def _add_key(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "key",
        help="API keys: make, list, revoke",
        description="As soon as there is one, services ask for keys, within two seconds, and go on "
        "doing so when all are revoked (docs/security.md).",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make one, and print it this once")
    create.add_argument("--tenant", default="", help="whose it is (default: nobody's; all models)")
    create.add_argument(
        "--scope", action="append", choices=SCOPES, dest="scopes", metavar="SCOPE",
        help=f"of {', '.join(SCOPES)}; may be repeated (default infer)",
    )  # fmt: skip
    create.add_argument(
        "--expires", type=parse_age, metavar="AGE", help="as 30m or 90d (default: never)"
    )
    create.add_argument("--note", default="", help="for people")
    create.set_defaults(run=create_key)
    ls = actions.add_parser("ls", help="which there are; never the keys themselves")
    ls.add_argument("--json", action="store_true")
    ls.set_defaults(run=list_keys)
    revoke = actions.add_parser("revoke", help="let some be worth nothing")
    revoke.add_argument("id", nargs="+", help="as ls shows it")
    revoke.set_defaults(run=revoke_keys)
    _say_where(create, ls, revoke)


def _add_tenant(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tenant",
        help="what tenants may take",
        description="A tenant of which nothing is said has no bounds but the gateway's own, and "
        "the share of everybody else. Bounds on requests hold at each gateway for itself.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    put = actions.add_parser("set", help="what is not named stays as it is")
    put.add_argument("name")
    put.add_argument("--requests-per-s", type=_bound(float), metavar="N", help="or none")
    put.add_argument("--concurrency", type=_bound(int), metavar="N", help="at once, or none")
    put.add_argument("--request-bytes", type=_bound(parse_bytes), metavar="SIZE", help="or none")
    put.add_argument("--device-bytes", type=_bound(parse_bytes), metavar="SIZE", help="or none")
    put.add_argument("--share", type=float, metavar="WEIGHT", help="of device time (default 1)")
    put.set_defaults(run=set_tenant)
    ls = actions.add_parser("ls", help="of whom something is said")
    ls.add_argument("--json", action="store_true")
    ls.set_defaults(run=list_tenants)
    rm = actions.add_parser("rm", help="no bounds any more; models and keys stay")
    rm.add_argument("name")
    rm.set_defaults(run=remove_tenant)
    _say_where(put, ls, rm)


def _say_where(*parsers: argparse.ArgumentParser) -> None:
    for parser in parsers:
        where = parser.add_mutually_exclusive_group()
        where.add_argument(
            "--repository",
            metavar="DIR_OR_URL",
            help="default $ROOST_REPOSITORY_URL or .roost/repository",
        )
        where.add_argument("--url", help="ask this gateway instead, with $ROOST_API_KEY")
        add_ca_file(parser)


def create_key(arguments: argparse.Namespace) -> int:
    scopes = tuple(dict.fromkeys(arguments.scopes or ["infer"]))
    if arguments.url:
        with RoostClient(arguments.url) as client:
            token = client.create_key(
                arguments.tenant, scopes, lifetime_s=arguments.expires, note=arguments.note
            )["key"]
    else:
        key, token = new_key(
            arguments.tenant,
            cast("tuple[Scope, ...]", scopes),
            lifetime_s=arguments.expires,
            note=arguments.note,
        )
        _repository(arguments).keys.add(key)
        print(f"in {_where(arguments)}; it is not shown again:", file=sys.stderr)
    print(token)
    return 0


def list_keys(arguments: argparse.Namespace) -> int:
    if arguments.url:
        with RoostClient(arguments.url) as client:
            keys = [_told(found) for found in client.list_keys()]
    else:
        keys = list(_repository(arguments).keys.look().keys.values())
    keys.sort(key=lambda key: (key.created, key.id))
    if arguments.json:
        told = [msgspec.to_builtins(key) for key in keys]
        print(json.dumps([{k: v for k, v in t.items() if k != "sha256"} for t in told], indent=2))
        return 0
    rows: list[tuple[str, ...]] = [
        ("ID", "TENANT", "SCOPES", "STATE", "CREATED", "EXPIRES", "NOTE")
    ]
    rows += [key_row(key, datetime.now(UTC).timestamp()) for key in keys]
    print("\n".join(aligned(rows)) if keys else "no keys: services on loopback ask for none")
    return 0


def key_row(key: Key, now: float) -> tuple[str, ...]:
    """One key for people to read."""
    return (
        key.id,
        key.tenant or "-",
        ",".join(key.scopes),
        key.state(now),
        _when(key.created),
        "never" if key.expires is None else _when(key.expires),
        key.note,
    )


def revoke_keys(arguments: argparse.Namespace) -> int:
    for id_ in arguments.id:
        if arguments.url:
            with RoostClient(arguments.url) as client:
                client.revoke_key(id_)
        else:
            _repository(arguments).keys.revoke(id_)
        print(f"{id_} revoked")
    return 0


def set_tenant(arguments: argparse.Namespace) -> int:
    said = {name: getattr(arguments, name) for name in (*_BOUNDS, "share")}
    changes = {name: value for name, value in said.items() if value is not None}
    if not changes:
        raise InvalidRequest("which bound? Name at least one")
    present = _quotas(arguments).get(arguments.name, Quota())
    quota = msgspec.structs.replace(
        present, **{name: None if value == "none" else value for name, value in changes.items()}
    )
    if arguments.url:
        with RoostClient(arguments.url) as client:
            client.set_tenant(arguments.name, quota)
    else:
        _repository(arguments).tenants.put(arguments.name, quota)
    print("\n".join(table({arguments.name: quota})))
    return 0


def list_tenants(arguments: argparse.Namespace) -> int:
    quotas = _quotas(arguments)
    if arguments.json:
        print(json.dumps({name: msgspec.to_builtins(q) for name, q in quotas.items()}, indent=2))
        return 0
    print("\n".join(table(quotas)) if quotas else "nothing is said of any tenant")
    return 0


def remove_tenant(arguments: argparse.Namespace) -> int:
    if arguments.url:
        with RoostClient(arguments.url) as client:
            client.remove_tenant(arguments.name)
    elif not _repository(arguments).tenants.remove(arguments.name):
        raise ModelNotFound(f"nothing is said of tenant {arguments.name!r}")
    return 0


def table(quotas: Mapping[str, Quota]) -> list[str]:
    """Tenants for people to read."""
    rows: list[tuple[str, ...]] = [
        ("TENANT", "REQUESTS/S", "CONCURRENCY", "REQUEST BYTES", "DEVICE BYTES", "SHARE")
    ]
    for name in sorted(quotas):
        quota = quotas[name]
        sizes = (quota.request_bytes, quota.device_bytes)
        rows.append(
            (
                name,
                *(
                    "-" if n is None else f"{n:g}"
                    for n in (quota.requests_per_s, quota.concurrency)
                ),
                *("-" if size is None else show_bytes(size) for size in sizes),
                f"{quota.share:g}",
            )
        )
    return aligned(rows)


def _quotas(arguments: argparse.Namespace) -> dict[str, Quota]:
    if not arguments.url:
        return _repository(arguments).tenants.quotas()
    with RoostClient(arguments.url) as client:
        found: Sequence[Mapping[str, Any]] = client.tenants()
    return {told["tenant"]: msgspec.convert(told["quota"], Quota) for told in found}


def _told(found: Mapping[str, Any]) -> Key:
    """What a gateway tells of a key, which is all but its digest."""
    return msgspec.convert({**found, "sha256": "0" * 64}, Key)


def _where(arguments: argparse.Namespace) -> str:
    url: str = arguments.repository or os.environ.get("ROOST_REPOSITORY_URL", "")
    url = url or CommonConfig().repository_url
    return url if "://" in url else os.path.abspath(url)  # noqa: PTH100  (text, as it is told)


def _repository(arguments: argparse.Namespace) -> Repository:
    return Repository(_where(arguments))


def _bound(parse: Any) -> Any:
    """An argparse type: `none`, or what `parse` makes of the text."""

    def bound(text: str) -> Any:
        return "none" if text == "none" else parse(text)

    bound.__name__ = "bound"
    return bound


def _when(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
