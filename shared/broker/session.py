"""One supervised connection to RabbitMQ.

Not `connect_robust`: it restores every queue one after the other, drops the new connection
when one of them has changed, and declares again what was deleted on purpose. A `Link` only
keeps one plain aio-pika connection up; who uses it builds anew from what is wanted now.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import aio_pika
import aiormq.exceptions
import structlog
from aiormq.abc import AbstractChannel
from aiormq.connection import Connection
from yarl import URL

from shared.broker import channels, frames
from shared.broker.port import BrokerUnavailable, QueueMissing
from shared.errors import RoostError
from shared.tls import SYSTEM, ClientTls, TlsError, explain

log = structlog.get_logger(__name__)
_T = TypeVar("_T")

HEARTBEAT_S: Final = 10
"""RabbitMQ gives a connection up after two of them without a word, aiormq after three: so long is
one half-open at most. Less would take a busy machine's pauses for a loss."""
RPC_TIMEOUT_S: Final = 10.0
_CONNECT_TIMEOUT_S: Final = 15.0
_CLOSE_TIMEOUT_S: Final = 5.0
_BACKOFF_FIRST_S: Final = 0.1
_BACKOFF_CAP_S: Final = 5.0
_IDLE_ADMIN_CHANNELS: Final = 8


def backoff_s(attempt: int) -> float:
    """Seconds to wait before attempt 1, 2, …: full jitter, so that a fleet does not return in
    step after the broker restarted."""
    ceiling = min(_BACKOFF_CAP_S, _BACKOFF_FIRST_S * 2 ** min(attempt, 10))
    return random.uniform(0.02, ceiling)  # noqa: S311 - jitter, not a secret


class Refused(BrokerUnavailable):
    """The broker closed the channel over this request: 403, 405 or (`Precondition`) 406."""

    retryable = False


class Precondition(Refused):
    """What is there differs from what was asked for: arguments, not empty, in use."""


async def asked(request: Awaitable[_T], timeout_s: float = RPC_TIMEOUT_S) -> _T:
    """The broker's answer to one request on a channel. Raises `QueueMissing`, `Refused`, or
    `BrokerUnavailable`; after any of them the channel is closed."""
    task = asyncio.current_task()
    cancelled = 0 if task is None else task.cancelling()
    try:
        return await _answer(request, timeout_s)
    except RoostError:
        if task is not None and task.cancelling() > cancelled:
            # aiormq has answered our own cancellation with an error of its own; passed on as
            # such, whoever tries again would do so for ever, and whoever waits for its end too.
            raise asyncio.CancelledError from None
        raise


async def _answer(request: Awaitable[_T], timeout_s: float) -> _T:
    try:
        async with asyncio.timeout(timeout_s):
            return await request
    except aiormq.exceptions.ChannelNotFoundEntity as error:
        raise QueueMissing(str(error)) from error
    except aiormq.exceptions.ChannelPreconditionFailed as error:
        raise Precondition(f"the broker refused: {error}") from error
    except aiormq.exceptions.AMQPChannelError as error:
        raise Refused(f"the broker refused: {error}") from error
    except (
        TimeoutError,
        aiormq.exceptions.AMQPError,
        OSError,
        RuntimeError,
        StopAsyncIteration,  # aiormq's word for a connection that ends in its handshake
    ) as error:
        raise BrokerUnavailable(
            f"the broker did not answer: {explain(error) or repr(error)}"
        ) from error
    except asyncio.CancelledError as error:
        # aiormq ends what waits on a dying connection with CancelledError, though nobody
        # cancelled us; passed on, it would silently end a task group's member.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise BrokerUnavailable("the connection to the broker was lost") from error


class Session:
    """One established connection, until it is lost."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.outbox = channels.Outbox(connection)
        self.lost = asyncio.Event()
        self._idle: list[AbstractChannel] = []
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[AbstractChannel]:
        """A channel for declarations. It is used again unless the block raised: a refusal or
        a time-out closes it, and nobody else shall notice."""
        while self._idle and self._idle[-1].is_closed:
            self._idle.pop()
        channel = self._idle.pop() if self._idle else None
        if channel is None:
            channel = await asked(channels.open_admin(self.connection))
        try:
            yield channel
        except BaseException:
            if not channel.is_closed:
                closing = asyncio.create_task(_close(channel))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
            raise
        if len(self._idle) < _IDLE_ADMIN_CHANNELS:
            self._idle.append(channel)
        else:
            await _close(channel)

    def end(self) -> None:
        self.lost.set()
        self.outbox.close()


async def _close(channel: AbstractChannel) -> None:
    with suppress(Exception):
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await channel.close()


class Link:
    """Keeps one connection up: connects, waits for its loss, backs off, connects again."""

    def __init__(
        self,
        url: str,
        name: str,
        prepare: Callable[[Session], Awaitable[None]],
        tls: ClientTls = SYSTEM,
    ) -> None:
        """`name` is shown in the broker's list of connections. `prepare` runs on each new
        connection before it counts as up; when it raises, the connection is given up. `tls`
        counts with `amqps://`; its files are read for each connection."""
        self._url = URL(url)
        self._tls = tls
        self._name = name
        self._prepare = prepare
        self._task: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._failure: Exception | None = None
        self._has_been_up = False
        self.session: Session | None = None
        """None while there is no connection."""
        self.blocked: str | None = None
        """Why the broker takes no publishes now (its alarm), if so."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"amqp {self._name}")

    async def up(self) -> Session:
        """Waits until there is a connection."""
        while self.session is None:
            await self._up.wait()
            if self._failure is not None:
                raise self._failure
        return self.session

    def now(self) -> Session:
        """The connection, or `BrokerUnavailable`."""
        if self.session is None or self.session.lost.is_set():
            raise BrokerUnavailable("no connection to the broker")
        return self.session

    async def close(self) -> None:
        task, self._task = self._task, None
        while task is not None and not task.done():
            task.cancel()
            # Not once for all: the driver's own error may have come in the cancellation's place.
            await asyncio.wait((task,), timeout=_CLOSE_TIMEOUT_S + 1.0)

    async def _keep(self) -> None:
        attempt = 0
        while True:
            try:
                async with self._connected() as session:
                    await self._prepare(session)
                    self.session = session
                    self._up.set()
                    self._has_been_up = True
                    attempt = 0
                    log.info("connected to the broker", connection=self._name)
                    await session.lost.wait()
            except (RoostError, aiormq.exceptions.AMQPError, OSError) as error:
                log.warning("no connection to the broker", connection=self._name, error=str(error))
            except Exception as error:
                # A fault of ours, which trying again will not mend: whoever waits shall know.
                if not self._has_been_up:
                    log.exception("the broker's connection is given up", connection=self._name)
                    self._failure = error
                    self._up.set()
                    return
                # What has worked may again: a service that only seemed alive would be worse.
                log.exception("the broker's connection failed", connection=self._name)
            else:
                log.warning("lost the connection to the broker", connection=self._name)
            attempt += 1
            await asyncio.sleep(backoff_s(attempt))

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Session]:
        self.blocked = None
        tap = frames.Tap(self._on_blocked)
        frames.install()
        token = frames.tap.set(tap)
        try:
            opened = await asked(self._dial(), _CONNECT_TIMEOUT_S)
        finally:
            frames.tap.reset(token)
        session: Session | None = None
        try:
            if not tap.attached:
                raise RuntimeError(
                    "this aiormq does not use shared.broker.frames: one malformed message "
                    "would close the connection"
                )
            connection = opened.transport.connection  # type: ignore[union-attr]
            assert isinstance(connection, Connection)
            session = Session(connection)
            connection.closing.add_done_callback(lambda _: session.end())
            yield session
        finally:
            self.session = None
            self.blocked = None
            self._up.clear()
            if session is not None:
                session.end()
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await opened.close()

    async def _dial(self) -> aio_pika.abc.AbstractConnection:
        url = self._url
        if "heartbeat" not in url.query:
            url = url.update_query(heartbeat=HEARTBEAT_S)
        context = None
        if url.scheme == "amqps":
            try:
                # In a thread: the system's authorities are a hundred files.
                context = await asyncio.to_thread(self._tls.context)
            except TlsError as error:
                raise BrokerUnavailable(str(error)) from None
        try:
            return await aio_pika.connect(
                url,
                ssl_context=context,
                client_properties={"connection_name": self._name},
                timeout=_CONNECT_TIMEOUT_S,
            )
        except aiormq.exceptions.AMQPConnectionError as error:
            # With TLS 1.3 we are through before the broker has looked at our certificate: its
            # refusal is a lost connection, or nothing at all.
            lost = "Server connection" in str(error)
            if context is None or not lost or self._tls.cert_file or explain(error):
                raise
            raise BrokerUnavailable(
                "the broker ended the connection; it may ask for a client certificate "
                f"({self._tls.setting}_CERT_FILE)"
            ) from error

    def _on_blocked(self, reason: str | None) -> None:
        self.blocked = reason
        log.warning("the broker blocks publishers" if reason else "the broker takes publishes",
                    connection=self._name, reason=reason)  # fmt: skip
