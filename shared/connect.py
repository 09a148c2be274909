"""The adapter for a URL. Drivers are imported only where one is really opened."""

from __future__ import annotations

from urllib.parse import urlsplit

from shared.broker.port import Broker
from shared.config import ConfigError, redact
from shared.store.port import Store


def open_broker(url: str, name: str) -> Broker:
    """A broker, not yet started. `name` is what the broker's own tools show for the connection.
    Raises `ConfigError` for a URL that no adapter takes."""
    if urlsplit(url).scheme in {"amqp", "amqps"}:
        from shared.broker.amqp import AmqpBroker

        return AmqpBroker(url, name)
    raise ConfigError(f"no message broker for {redact(url)!r}: amqp:// or amqps:// is expected")


def open_store(url: str) -> Store:
    """A store, not yet started. Raises `ConfigError` for a URL that no adapter takes."""
    if urlsplit(url).scheme in {"redis", "rediss"}:
        from shared.store.redis import RedisStore

        return RedisStore(url)
    raise ConfigError(f"no store for {redact(url)!r}: redis:// or rediss:// is expected")
