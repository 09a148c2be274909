"""What both brokers do to a message on its way: the same rules, hence one place."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from shared import names
from shared.broker.port import HeaderValue, Message
from shared.errors import TooLarge

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
"""RabbitMQ 4's default limit. A larger publish would close the channel, and with it every
other publish under way; the services' own limit is lower."""
_MAX_REASON: Final = 500


def check_size(message: Message) -> None:
    """Raises `TooLarge` for what no broker would take."""
    if len(message.body) > MAX_BODY_BYTES:
        raise TooLarge(
            f"a message of {len(message.body)} bytes: the broker takes {MAX_BODY_BYTES} at most"
        )


def outgoing_headers(message: Message) -> dict[str, HeaderValue]:
    """The headers to publish with: the producer's message id moves here, since the property
    must be fresh for each publish (a basic.return is matched by it)."""
    if message.message_id is None or names.HEADER_CLIENT_MESSAGE_ID in message.headers:
        return message.headers
    return {**message.headers, names.HEADER_CLIENT_MESSAGE_ID: message.message_id}


def dead_letter(message: Message, queue: str, routing_key: str, reason: str) -> Message:
    """The message as it is laid into `names.DEAD`: never expiring, with when and why."""
    headers: dict[str, HeaderValue] = {
        **message.headers,
        names.HEADER_DEAD_REASON: reason[:_MAX_REASON],
        names.HEADER_DEAD_QUEUE: queue,
        names.HEADER_DEAD_ROUTING_KEY: routing_key,
        names.HEADER_DEAD_AT: int(time.time() * 1000),
    }
    return msgspec.structs.replace(message, headers=headers, expiration_ms=None, persistent=True)
