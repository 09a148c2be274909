"""`roost infer`: ask a model from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from roost.calls import authorization, translate_error
from roost.trust import add_ca_file, verify, why
from shared import v2
from shared.errors import InvalidRequest, Unavailable
from shared.names import HEADER_LENGTH
from shared.tensors import Tensor, split_bytes, to_numpy


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "infer",
        help="send one request to a model",
        description="Sends one Open Inference Protocol v2 request and prints the response. "
        "Inputs are NAME=JSON, e.g. 'x=[[1.0, 2.0]]'; datatype and shape follow from the "
        "model's metadata, or stand before the value: 'x:INT64:1,2=[[1, 2]]'. With --json FILE "
        "a whole request body is sent as it is ('-' reads standard input).",
    )
    parser.add_argument("name")
    parser.add_argument("inputs", nargs="*", metavar="NAME[:DATATYPE[:SHAPE]]=JSON")
    parser.add_argument("--version")
    parser.add_argument("--json", metavar="FILE", help="a v2 request body")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds (default 60)")
    parser.add_argument("--url", default=url, help=f"the gateway (default {url}, or $ROOST_URL)")
    add_ca_file(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if bool(arguments.inputs) == bool(arguments.json):
        raise InvalidRequest("give inputs as NAME=JSON, or --json FILE, and not both")
    model = f"{arguments.url.rstrip('/')}/v2/models/{arguments.name}"
    if arguments.version:
        model += f"/versions/{arguments.version}"
    try:
        with httpx.Client(
            timeout=arguments.timeout + 5,
            trust_env=False,
            verify=verify(model),
            headers=authorization(),
        ) as client:
            if arguments.json:
                body = _read(arguments.json)
            else:
                metadata = client.get(model)
                if metadata.status_code != httpx.codes.OK:
                    raise translate_error(metadata)
                known = {spec["name"]: spec for spec in metadata.json().get("inputs", [])}
                inputs = [_input(text, known) for text in arguments.inputs]
                timeout_us = int(arguments.timeout * 1e6)
                body = json.dumps(
                    {"inputs": inputs, "parameters": {"timeout": timeout_us}}
                ).encode()
            answer = client.post(f"{model}/infer", content=body)
    except httpx.HTTPError as error:
        raise Unavailable(f"no answer from {arguments.url}: {why(model, error)}") from error
    if answer.status_code != httpx.codes.OK:
        raise translate_error(answer)
    length = v2.parse_header_length(answer.headers.get(HEADER_LENGTH))
    shown = answer.json() if length is None else readable(answer.content, length)
    print(json.dumps(shown, indent=2))
    return 0


def readable(body: bytes, header_length: int) -> dict[str, Any]:
    """A response with raw tensors in the form of one without, for people: what JSON has no
    form for becomes the next best (half floats as numbers, bytes as text)."""
    response = v2.decode_response(body, header_length)
    named = {"model_name": response.model_name, "model_version": response.model_version}
    optional = {"id": response.id, "parameters": response.parameters}
    return {
        **named,
        **{key: value for key, value in optional.items() if value},
        "outputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.shape),
                "data": _values(tensor),
            }
            for tensor in response.outputs
        ],
    }


def _values(tensor: Tensor) -> list[Any]:
    if tensor.datatype == "BYTES":
        return [item.decode(errors="replace") for item in split_bytes(tensor.data)]
    values: list[Any] = to_numpy(tensor).ravel().tolist()
    return values


def _input(text: str, known: dict[str, dict[str, object]]) -> dict[str, object]:
    head, equals, value = text.partition("=")
    name, _, rest = head.partition(":")
    datatype, _, shape_text = rest.partition(":")
    try:
        data = json.loads(value)
    except ValueError as error:
        raise InvalidRequest(f"{text[:60]!r}: what follows '=' is not JSON: {error}") from error
    if not name or not equals:
        raise InvalidRequest(f"{text[:60]!r} is not NAME=JSON")
    datatype = datatype or str(known.get(name, {}).get("datatype", ""))
    if not datatype:
        raise InvalidRequest(
            f"the datatype of {name!r} is not known: write {name}:FP32=… (or INT64, BYTES, …)"
        )
    try:
        shape = [int(d) for d in shape_text.split(",")] if shape_text else _shape_of(data)
    except ValueError as error:
        raise InvalidRequest(f"{shape_text!r} is not a shape such as 1,16") from error
    return {
        "name": name,
        "datatype": datatype,
        "shape": shape,
        "data": data if isinstance(data, list) else [data],
    }


def _shape_of(data: object) -> list[int]:
    shape = []
    while isinstance(data, list):
        shape.append(len(data))
        if not data:
            break
        data = data[0]
    return shape


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {name}: {error.strerror}") from error
