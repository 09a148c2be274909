"""The adapter for a URL. Drivers are imported only where one is really opened."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs, urlsplit

from shared.broker.port import Broker
from shared.config import ConfigError, redact
from shared.store.port import Store
from shared.tls import SYSTEM, ClientTls

_AMQP_OPTIONS: Final = ("cafile", "capath", "cadata", "certfile", "keyfile", "no_verify_ssl")
_REDIS_OPTIONS: Final = ("ssl_",)
"""What the drivers take in a URL for TLS."""


def open_broker(url: str, name: str, tls: ClientTls = SYSTEM) -> Broker:
    """A broker, not yet started. `name` is what the broker's own tools show for the connection;
    `tls` counts with `amqps://`. Raises `ConfigError` for a URL that no adapter takes."""
    if urlsplit(url).scheme in {"amqp", "amqps"}:
        _refuse_options(url, _AMQP_OPTIONS, "ROOST_AMQP_CA_FILE")
        from shared.broker.amqp import AmqpBroker

        return AmqpBroker(url, name, tls)
    raise ConfigError(f"no message broker for {redact(url)!r}: amqp:// or amqps:// is expected")


def open_store(url: str, tls: ClientTls = SYSTEM) -> Store:
    """A store, not yet started; `tls` counts with `rediss://`. Raises `ConfigError` for a URL that
    no adapter takes."""
    if urlsplit(url).scheme in {"redis", "rediss"}:
        _refuse_options(url, _REDIS_OPTIONS, "ROOST_REDIS_CA_FILE")
        from shared.store.redis import RedisStore

        return RedisStore(url, tls=tls)
    raise ConfigError(f"no store for {redact(url)!r}: redis:// or rediss:// is expected")


def _refuse_options(url: str, options: tuple[str, ...], setting: str) -> None:
    """Ours replace them: one that were ignored could mean that nothing is verified, or less."""
    for name in parse_qs(urlsplit(url).query, keep_blank_values=True):
        if name.startswith(options):
            raise ConfigError(f"{redact(url)!r}: {name} is not taken from a URL; see {setting}")
