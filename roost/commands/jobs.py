"""`roost job`: submit a request, and come back for its answer."""

from __future__ import annotations

import argparse
import json
import sys

from roost.calls.answers import checked
from roost.calls.calls import Calls
from roost.calls.sending import Sender
from roost.client import RoostClient
from roost.commands.explain import tell
from roost.commands.infer import HOW, add_request, request_of, show
from roost.trust import add_gateway
from shared.errors import InvalidRequest


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser], url: str) -> None:
    parser = commands.add_parser(
        "job",
        help="requests whose answers are fetched later",
        description="A job is a request that nobody waits for. Once it is accepted it is on disk, "
        "and runs whatever is restarted meanwhile (docs/jobs.md).",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    submit = actions.add_parser(
        "submit",
        help="submit one, and print its id",
        description="Submits one Open Inference Protocol v2 request as a job and prints the job's "
        "id. " + HOW,
    )
    add_request(submit)
    submit.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="the job's deadline (default: as the gateway is set, a day as a rule)",
    )
    submit.add_argument(
        "--idempotency-key",
        metavar="KEY",
        help="the same request with the same key again is the same job (default: a new key)",
    )
    submit.add_argument(
        "--wait",
        action="store_true",
        help="until it has ended, and print its result; the id goes to standard error",
    )
    submit.set_defaults(run=run_submit)
    look = actions.add_parser("show", help="how a job stands")
    look.add_argument("id")
    look.add_argument("--json", action="store_true", help="as the gateway gives it")
    look.set_defaults(run=run_show)
    result = actions.add_parser(
        "result",
        help="what 'roost infer' would have printed",
        description="Prints a job's result, or why it has none. A job that has not ended is no "
        "failure of the job: exit status 1, unless --wait is given.",
    )
    result.add_argument("id")
    result.add_argument("--wait", action="store_true", help="until the job has ended")
    result.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="with --wait: for no longer than this"
    )
    result.set_defaults(run=run_result)
    cancel = actions.add_parser(
        "cancel", help="cancel jobs that have not ended; remove those that have"
    )
    cancel.add_argument("id", nargs="+")
    cancel.set_defaults(run=run_cancel)
    for action in (submit, look, result, cancel):
        add_gateway(action, url)


def run_submit(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.timeout is not None:
        raise InvalidRequest("a --json body names its own timeout, in microseconds")
    calls = Calls(arguments.url)
    with Sender(arguments.url) as gateway:
        body = request_of(arguments, calls, gateway, arguments.timeout)
        version, key = arguments.version or None, arguments.idempotency_key
        id_ = gateway.do(calls.submit_with(arguments.name, version, body, key))["id"]
        if not arguments.wait:
            print(id_)
            return 0
        print(f"job {id_}", file=sys.stderr, flush=True)
        _show_result(calls, gateway, id_, None)
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    with RoostClient(arguments.url) as client:
        told = client.job(arguments.id)
    print(json.dumps(told, indent=2) if arguments.json else "\n".join(tell(told)))
    return 0


def run_result(arguments: argparse.Namespace) -> int:
    if arguments.timeout is not None and not arguments.wait:
        raise InvalidRequest("--timeout goes with --wait")
    with Sender(arguments.url) as gateway:
        wait_s = arguments.timeout if arguments.wait else 0
        _show_result(Calls(arguments.url), gateway, arguments.id, wait_s)
    return 0


def run_cancel(arguments: argparse.Namespace) -> int:
    with RoostClient(arguments.url) as client:
        for id_ in arguments.id:
            client.cancel(id_)
    return 0


def _show_result(calls: Calls, gateway: Sender, id_: str, wait_s: float | None) -> None:
    show(gateway.wait(calls.result_with(id_, checked), wait_s))
