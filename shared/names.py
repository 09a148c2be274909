"""Every name that two services must agree on: models, exchanges, queues, headers, keys.

Producers address a *model* (a routing key on one exchange), never a queue. The queue of a
model exists only while the model is active; what no queue matches falls through the
alternate exchange into `UNROUTED_QUEUE`, where the placer finds it.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from shared.errors import InvalidRequest

ModelId = NewType("ModelId", str)
"""`"<name>/<version>"`: one immutable version of one model, as it stands in reports,
assignments and routing keys."""

MAX_VERSION: Final = 2**31 - 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,9}\Z")


def is_name(text: str) -> bool:
    """Whether `check_name` takes it."""
    return _NAME.match(text) is not None and ".." not in text


def check_name(name: str) -> str:
    """Returns `name`, or raises `InvalidRequest` when it is not a model name.

    A name is 1 to 128 of letters, digits, `.`, `_` and `-`, beginning with a letter or digit:
    safe as a path segment, an AMQP queue name, a Redis key and a Prometheus label.
    """
    if not is_name(name):
        raise InvalidRequest(
            f"{name[:40]!r} is not a model name: 1 to 128 of A-Z a-z 0-9 . _ -, "
            "beginning with a letter or digit, without '..'"
        )
    return name


def check_version(version: str | int) -> int:
    """Returns the version as a number, or raises `InvalidRequest`. Versions are 1 … 2³¹-1."""
    text = str(version) if not isinstance(version, bool) else "bool"
    if not _VERSION.match(text) or int(text) > MAX_VERSION:
        raise InvalidRequest(f"{text[:40]!r} is not a model version: a whole number from 1")
    return int(text)


def model_id(name: str, version: int) -> ModelId:
    """The id of a version. The parts are taken as checked."""
    return ModelId(f"{name}/{version}")


def split_model_id(model: ModelId | str) -> tuple[str, int]:
    """Name and version of an id; raises `InvalidRequest` when either is not one."""
    name, slash, version = model.partition("/")
    if not slash:
        raise InvalidRequest(f"{model[:40]!r} is not a model id: '<name>/<version>'")
    return check_name(name), check_version(version)


# --- RabbitMQ ---------------------------------------------------------------------------

INFER_EXCHANGE: Final = "roost.infer"
"""Durable, direct. Routing key: `<model>` (its default version) or `<model>/<version>`."""
UNROUTED: Final = "roost.unrouted"
"""Alternate exchange (fanout) of `INFER_EXCHANGE`, and the queue behind it."""
DEAD: Final = "roost.dead"
"""Exchange (fanout) and queue of what could not be served, with the reason in a header."""
MODEL_QUEUE_PREFIX: Final = "roost.model."
REPLY_QUEUE_PREFIX: Final = "roost.reply."
"""Reply queues must begin with this (or be RabbitMQ's direct reply-to): a worker that replied
wherever it is told would be a confused deputy."""
DIRECT_REPLY_PREFIX: Final = "amq.rabbitmq.reply-to"
JOB_QUEUE_PREFIX: Final = "roost.jobs."
"""Queues in which accepted jobs wait for a gateway to give them their turn."""


def model_queue(model: ModelId) -> str:
    """The queue of one model version, e.g. `roost.model.bert-07.1`."""
    name, version = split_model_id(model)
    return f"{MODEL_QUEUE_PREFIX}{name}.{version}"


def reply_to_allowed(reply_to: str) -> bool:
    """Whether a worker may answer to this queue."""
    return 0 < len(reply_to.encode()) <= 255 and reply_to.startswith(
        (REPLY_QUEUE_PREFIX, DIRECT_REPLY_PREFIX)
    )


# AMQP headers. The first is the Open Inference Protocol's own HTTP header, kept as it is.
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
"""Bytes of JSON before the raw tensors. Absent: the whole body is JSON."""
HEADER_DEADLINE: Final = "roost-deadline-ms"
"""Absolute deadline, Unix time in milliseconds. Nothing expired is computed."""
HEADER_SPLIT_KEY: Final = "roost-split-key"
"""Of an HTTP or gRPC request. Requests with the same one get the same version, where an alias
splits them between several."""
HEADER_IDEMPOTENCY_KEY: Final = "Idempotency-Key"
"""Of a job that is submitted over HTTP: the same one again is the same job."""
IDEMPOTENCY_KEY_CHARS: Final = 255
IDEMPOTENCY_KEY: Final = rf"[!-~]{{1,{IDEMPOTENCY_KEY_CHARS}}}"
"""What may stand there: visible ASCII, quotes around it not counted."""
HEADER_CODE: Final = "roost-code"
"""In a reply: `ok`, or the error's code (shared.errors)."""
HEADER_STATUS: Final = "roost-status"
"""In a reply: the code as an HTTP status."""
HEADER_RETRYABLE: Final = "roost-retryable"
"""In an error reply: whether the same request can succeed later."""
HEADER_QUEUE_US: Final = "roost-queue-us"
"""In a reply: microseconds from the worker's receipt until the batch began."""
HEADER_COMPUTE_US: Final = "roost-compute-us"
"""In a reply: microseconds the batch took on the device."""
HEADER_BATCH: Final = "roost-batch-size"
"""In a reply: rows of the batch in which the request ran."""
HEADER_MEMBERS: Final = "roost-members"
"""In a pack (shared.packs): how many requests or replies it holds."""
HEADER_PACKS: Final = "roost-packs"
"""In a request: whoever asks understands replies that come in packs."""
HEADER_DEAD_REASON: Final = "roost-dead-reason"
HEADER_DEAD_QUEUE: Final = "roost-dead-queue"
HEADER_DEAD_ROUTING_KEY: Final = "roost-dead-routing-key"
HEADER_DEAD_AT: Final = "roost-dead-at-ms"
"""Unix time in milliseconds at which a message became a dead letter."""
HEADER_RAW_PROPERTIES: Final = "roost-raw-properties"
"""In a dead letter whose properties could not be decoded: those bytes, base64."""
HEADER_CLIENT_MESSAGE_ID: Final = "roost-client-message-id"
"""The producer's own `message_id`, kept when Roost publishes the message again: the AMQP
property must be fresh for each publish, since a basic.return is matched by it."""
