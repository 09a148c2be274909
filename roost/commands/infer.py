"""`roost infer`: ask a model from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import httpx

from roost.calls.answers import checked
from roost.calls.bodies import Body
from roost.calls.calls import Calls
from roost.calls.sending import Sender
from roost.trust import add_gateway
from shared import v2
from shared.errors import InvalidRequest
from shared.names import HEADER_LENGTH
from shared.tensors import Tensor, split_bytes, to_numpy

HOW = (
    "Inputs are NAME=JSON, e.g. 'x=[[1.0, 2.0]]'; datatype and shape follow from the model's "
    "metadata, or stand before the value: 'x:INT64:1,2=[[1, 2]]'. With --json FILE a whole request "
    "body is sent as it is ('-' reads standard input)."
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "infer",
        help="send one request to a model",
        description="Sends one Open Inference Protocol v2 request and prints the response. " + HOW,
    )
    add_request(parser)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds (default 60)")
    add_gateway(parser, url)
    parser.set_defaults(run=run)


def add_request(parser: argparse.ArgumentParser) -> None:
    """What is asked, of which model; `request_of` reads it."""
    parser.add_argument("name")
    parser.add_argument("inputs", nargs="*", metavar="NAME[:DATATYPE[:SHAPE]]=JSON")
    parser.add_argument("--version")
    parser.add_argument("--json", metavar="FILE", help="a v2 request body")


def run(arguments: argparse.Namespace) -> int:
    calls, timeout_s = Calls(arguments.url), arguments.timeout
    with Sender(arguments.url) as gateway:
        body = request_of(arguments, calls, gateway, timeout_s)
        version = arguments.version or None
        answer = gateway.do(calls.infer_with(arguments.name, version, body, timeout_s, checked))
    show(answer)
    return 0


def request_of(
    arguments: argparse.Namespace, calls: Calls, gateway: Sender, timeout_s: float | None
) -> Body:
    """The request that was asked for; a file's as it is. Asks the gateway for the model's metadata
    to make one of NAME=JSON."""
    if bool(arguments.inputs) == bool(arguments.json):
        raise InvalidRequest("give inputs as NAME=JSON, or --json FILE, and not both")
    if arguments.json:
        return Body(_read(arguments.json))
    metadata = gateway.do(calls.metadata(arguments.name, arguments.version or None))
    known = {spec["name"]: spec for spec in metadata.get("inputs", [])}
    request: dict[str, Any] = {"inputs": [_input(text, known) for text in arguments.inputs]}
    if timeout_s is not None:
        request["parameters"] = {"timeout": int(timeout_s * 1e6)}
    return Body(json.dumps(request).encode())


def show(answer: httpx.Response) -> None:
    """Prints a v2 response as JSON."""
    length = v2.parse_header_length(answer.headers.get(HEADER_LENGTH))
    shown = answer.json() if length is None else readable(answer.content, length)
    print(json.dumps(shown, indent=2))


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
