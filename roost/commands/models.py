"""`roost push`, `roost ls`, `roost rm`, `roost import`: what is registered."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from roost.client import RoostClient
from roost.trust import add_gateway
from shared.errors import InvalidRequest
from shared.models import ModelSpec
from shared.units import show_bytes


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    push = commands.add_parser(
        "push",
        help="register a model",
        description="Registers a TorchScript file, a torch.export program or an AOTInductor "
        "package under a name. Nothing else need be known of it; a manifest adds what is: inputs, "
        "outputs, batching, target latency.",
    )
    push.add_argument("name")
    push.add_argument("file", type=Path, metavar="FILE.pt|FILE.pt2")
    push.add_argument("--manifest", type=Path, metavar="model.json", help="see docs/models.md")
    push.add_argument("--version", help="default: one above the highest")
    add_gateway(push, url)
    push.set_defaults(run=run_push)

    ls = commands.add_parser("ls", help="list registered models and where they are")
    ls.add_argument("--json", action="store_true", help="the repository index as it is")
    add_gateway(ls, url)
    ls.set_defaults(run=run_ls)

    rm = commands.add_parser("rm", help="remove a model, or one version of it")
    rm.add_argument("name")
    rm.add_argument("--version", help="default: all versions")
    add_gateway(rm, url)
    rm.set_defaults(run=run_rm)

    bring = commands.add_parser(
        "import",
        help="import a Triton model repository",
        description="Copies every TorchScript model of a Triton model repository into a Roost "
        "repository directory or fsspec URL. Services notice by themselves.",
    )
    bring.add_argument("triton", type=Path, metavar="TRITON_REPOSITORY")
    bring.add_argument("--repository", default=".roost/repository", metavar="DIR_OR_URL")
    bring.set_defaults(run=run_import)


def run_push(arguments: argparse.Namespace) -> int:
    spec = _read_spec(arguments.manifest) if arguments.manifest else None
    if not arguments.file.is_file():
        raise InvalidRequest(f"there is no file {arguments.file}")
    with RoostClient(arguments.url) as client:
        manifest = client.push(arguments.name, arguments.file, version=arguments.version, spec=spec)
    print(f"{manifest.id}  {show_bytes(manifest.size_bytes)}  {manifest.digest}")
    return 0


def run_ls(arguments: argparse.Namespace) -> int:
    with RoostClient(arguments.url) as client:
        index = client.list()
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(index), indent=2).decode())
        return 0
    for line in table(index):
        print(line)
    return 0


def table(index: Sequence[Mapping[str, Any]]) -> list[str]:
    """The repository index for people to read. OWN is what only this version has, SHARED is in
    tensors that another has too; together they are SIZE."""
    rows: list[tuple[str, ...]] = [("MODEL", "VERSION", "STATE", "SIZE", "OWN", "SHARED", "WHERE")]
    for item in index:
        sizes = (item.get(name) for name in ("size_bytes", "own_bytes", "shared_bytes"))
        rows.append(
            (
                str(item["name"]),
                str(item.get("version", "")),
                str(item.get("state", "")),
                *("" if size is None else show_bytes(float(size)) for size in sizes),
                str(item.get("reason", "")),
            )
        )
    return aligned(rows)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of text, their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def run_rm(arguments: argparse.Namespace) -> int:
    with RoostClient(arguments.url) as client:
        client.remove(arguments.name, arguments.version)
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    from shared.imports import import_triton
    from shared.repository import Repository

    if not arguments.triton.is_dir():
        raise InvalidRequest(f"there is no directory {arguments.triton}")
    manifests, errors = import_triton(Repository(arguments.repository), str(arguments.triton))
    for manifest in manifests:
        print(f"{manifest.id}  {show_bytes(manifest.size_bytes)}  {manifest.digest}")
    for name, error in errors.items():
        print(f"roost: {name}: {error}", file=sys.stderr)
    return 1 if errors else 0


def _read_spec(path: Path) -> ModelSpec:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelSpec)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not a model manifest: {error}") from error
