"""RabbitMQ policies: the limits of the queues, set from outside of them.

A limit given as a queue's argument could never change again, and any difference would refuse
the next declaration. Policies are matched by name and change at once. Setting them takes the
management API, hence an operator or an installer; services run with or without them.
"""

from __future__ import annotations

import re
from typing import Final, Literal
from urllib.parse import quote, unquote, urlsplit

import httpx
import msgspec

from shared import names
from shared.errors import Unavailable
from shared.tls import SYSTEM, ClientTls, TlsError, explain

_TIMEOUT_S: Final = 10.0


class Policy(msgspec.Struct, frozen=True):
    """One policy on queues, named as RabbitMQ shows it."""

    name: str
    pattern: str
    """Regular expression on the queue's name."""
    max_length: int
    """Ready messages; what consumers hold is not counted."""
    overflow: Literal["reject-publish", "drop-head"]
    """RabbitMQ's own default, `drop-head`, silently loses the oldest."""


POLICIES: Final = (
    Policy("roost-models", "^" + re.escape(names.MODEL_QUEUE_PREFIX), 10_000, "reject-publish"),
    Policy("roost-unrouted", f"^{re.escape(names.UNROUTED)}$", 10_000, "reject-publish"),
    # Ids of some sixty bytes; the requests lie in the registry's storage.
    Policy("roost-jobs", "^" + re.escape(names.JOB_QUEUE_PREFIX), 100_000, "reject-publish"),
    # Evidence, not requests: the oldest goes, so that a flood of bad messages stops nobody.
    Policy("roost-dead", f"^{re.escape(names.DEAD)}$", 10_000, "drop-head"),
)


def apply_policies(
    management_url: str,
    vhost: str = "/",
    policies: tuple[Policy, ...] = POLICIES,
    tls: ClientTls = SYSTEM,
) -> None:
    """Sets the policies of a virtual host; idempotent, takes effect on existing queues at once.

    `management_url`: `http://user:password@host:15672`; `tls` counts with `https://`.
    Raises `Unavailable` when the API cannot be reached or refuses.
    """
    url = httpx.URL(management_url)
    # Out of the URL: an error shows that to whoever reads the log.
    auth = (url.username, url.password) if url.username else None
    base = url.copy_with(username=None, password=None)
    try:
        verify = tls.context() if url.scheme == "https" else False
        with httpx.Client(base_url=base, auth=auth, timeout=_TIMEOUT_S, verify=verify) as client:
            for policy in policies:
                path = f"/api/policies/{quote(vhost, safe='')}/{quote(policy.name, safe='')}"
                client.put(path, json=_definition(policy)).raise_for_status()
    except (httpx.HTTPError, TlsError) as error:
        said = explain(error) or error
        raise Unavailable(f"RabbitMQ's management API: {said}") from error


def vhost_of(amqp_url: str) -> str:
    """The virtual host that an AMQP URL names; `/` when it names none."""
    return unquote(urlsplit(amqp_url).path[1:]) or "/"


def _definition(policy: Policy) -> dict[str, object]:
    return {
        "pattern": policy.pattern,
        "apply-to": "queues",
        "priority": 0,
        "definition": {"max-length": policy.max_length, "overflow": policy.overflow},
    }
