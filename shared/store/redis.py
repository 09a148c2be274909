"""The store on Redis 7 and newer, and on Valkey.

Keys (all under one prefix; `{w:<id>}` keeps what one script touches in one cluster slot):

    <prefix>workers                  zset   worker → Unix ms until which its report counts
    <prefix>{w:<id>}:report          string a report, msgpack, with PX
    <prefix>{w:<id>}:assignment      hash   fence, generation, body, with PEXPIRE: renewed by
                                            each writing of it and of the worker's report
    <prefix>gateways                 zset   gateway → Unix ms until which its tallies count
    <prefix>{g:<id>}:tallies         hash   model → what this gateway counted, with PEXPIRE
    <prefix>{pl}:lease               string holder, with PX
    <prefix>{pl}:fence               hash   last, holder
    <prefix>{pl}:active              set    model ids whose queues exist
    <prefix>epoch                    string random, set when absent: tells a flush

Every write is idempotent (absolute values, or scripts that compare), because the client
repeats commands whose reply was lost. Hints are pub/sub and may be lost; nobody depends on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import structlog
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shared import control
from shared.control import Assignment, Report
from shared.names import ModelId
from shared.store.port import ASSIGNMENT_TTL_S, StoreUnavailable
from shared.tls import SYSTEM, ClientTls, TlsError, explain

log = structlog.get_logger(__name__)

_PUT_ASSIGNMENT = """
local fence = tonumber(redis.call('HGET', KEYS[1], 'fence') or '-1')
local generation = tonumber(redis.call('HGET', KEYS[1], 'generation') or '-1')
local f, g = tonumber(ARGV[1]), tonumber(ARGV[2])
if f < fence or (f == fence and g < generation) then return 0 end
if f == fence and g == generation and redis.call('HGET', KEYS[1], 'body') ~= ARGV[3] then
  return 0
end
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'generation', ARGV[2], 'body', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""

# The fence is max(last + 1, the server's clock in µs): a bare counter would start again at 1
# when Redis loses its content, and a stale placer could then overrule a fresh one. In ms, a
# lease taken just before a flush and one taken just after could bear the same number.
_ACQUIRE_LEASE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return false end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if holder and redis.call('HGET', KEYS[2], 'holder') == ARGV[1] then
  return redis.call('HGET', KEYS[2], 'last')
end
local t = redis.call('TIME')
local us = tonumber(t[1]) * 1000000 + tonumber(t[2])
local last = tonumber(redis.call('HGET', KEYS[2], 'last') or '0')
local fence = math.max(us, last + 1)
local text = string.format('%.0f', fence)
redis.call('HSET', KEYS[2], 'last', text, 'holder', ARGV[1])
return text
"""

_RELEASE_LEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
"""

_TIMEOUT_S = 2.0
"""For one command. A store that does not answer for so long counts as away; whoever asked
goes on with what is known, and asks again."""
_DECODED_AT_ONCE = 256
"""Reports of a large fleet do not hold up whoever shares the event loop."""


class RedisStore:
    """One service's access to the store. See `shared.store.port.Store` for the laws."""

    def __init__(
        self,
        url: str,
        prefix: str = "roost:",
        assignment_ttl_s: float = ASSIGNMENT_TTL_S,
        tls: ClientTls = SYSTEM,
    ) -> None:
        """`tls` counts with `rediss://`; its files are read for each connection."""
        self._prefix = prefix
        self._assignment_ttl_ms = int(assignment_ttl_s * 1000)
        # redis-py's own retries are off: from_url and Redis() disagree on their number, and
        # every caller here has a loop that asks again anyway.
        options: dict[str, Any] = {
            "retry": Retry(NoBackoff(), 1),
            "socket_timeout": _TIMEOUT_S,
            "socket_connect_timeout": _TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 15,
        }
        self._decoded: dict[str, tuple[bytes, Report]] = {}
        """Reports as read last, by worker."""
        pool = BlockingConnectionPool.from_url(
            url, max_connections=16, timeout=_TIMEOUT_S, **options
        )
        # A subscription waits without end, so its socket must not time out.
        listening = ConnectionPool.from_url(
            url, **options | {"socket_timeout": None, "health_check_interval": 5}
        )
        if url.startswith("rediss:"):
            for each in (pool, listening):
                each.connection_class = _TlsConnection
                each.connection_kwargs["tls"] = tls
        self._redis: Redis = Redis(connection_pool=pool)
        self._listener: Redis = Redis(connection_pool=listening)
        self._put_assignment = self._redis.register_script(_PUT_ASSIGNMENT)
        self._acquire_lease = self._redis.register_script(_ACQUIRE_LEASE)
        self._release_lease = self._redis.register_script(_RELEASE_LEASE)

    async def start(self) -> None:
        """Raises `StoreUnavailable` when Redis does not answer, or would evict our keys."""
        policy = await self._call(self._redis.config_get("maxmemory-policy"), optional=True)
        name = (policy or {}).get("maxmemory-policy", (policy or {}).get(b"maxmemory-policy"))
        if name and name not in {"noeviction", b"noeviction"}:
            log.warning("redis_may_evict", policy=name, want="maxmemory-policy noeviction")
        await self._call(self._redis.ping())

    async def close(self) -> None:
        for client in (self._redis, self._listener):
            with contextlib.suppress(exceptions.RedisError, OSError):
                await client.aclose()
            await client.connection_pool.disconnect()

    # --- reports ---------------------------------------------------------------------------

    async def put_report(self, report: Report, ttl_s: float) -> None:
        ttl_ms = max(1, int(ttl_s * 1000))
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(self._worker_key(report.worker, "report"), control.encode(report), px=ttl_ms)
        pipe.pexpire(self._worker_key(report.worker, "assignment"), self._assignment_ttl_ms)
        pipe.zadd(self._key("workers"), {report.worker: int(time.time() * 1000) + ttl_ms})
        await self._call(pipe.execute())

    async def remove_report(self, worker: str) -> None:
        pipe = self._redis.pipeline(transaction=False)
        pipe.delete(self._worker_key(worker, "report"), self._worker_key(worker, "assignment"))
        pipe.zrem(self._key("workers"), worker)
        await self._call(pipe.execute())

    async def reports(self) -> list[Report]:
        members = await self._call(self._redis.zrange(self._key("workers"), 0, -1))
        workers = [name.decode() for name in members]
        if not workers:
            return []
        pipe = self._redis.pipeline(transaction=False)
        for worker in workers:
            pipe.get(self._worker_key(worker, "report"))
        found = []
        gone = []
        before, decoded = self._decoded, dict[str, tuple[bytes, Report]]()
        stored = await self._call(pipe.execute())
        for number, (worker, data) in enumerate(zip(workers, stored, strict=True)):
            if number % _DECODED_AT_ONCE == _DECODED_AT_ONCE - 1:
                await asyncio.sleep(0)
            if data is None:
                gone.append(worker)
                continue
            known = before.get(worker)
            try:
                # The same bytes are the same object: who looks often need not compare.
                report = known[1] if known and known[0] == data else control.decode_report(data)
                decoded[worker] = (data, report)
                found.append(report)
            except (ValueError, RecursionError) as error:  # msgspec's, and no UTF-8
                log.warning("report_undecodable", worker=worker, error=str(error))
        self._decoded = decoded
        if gone:
            # Members outlive their reports; those long past are dropped from the set. One that
            # reports at this very moment puts itself back with its next heartbeat.
            await self._call(
                self._redis.zremrangebyscore(
                    self._key("workers"), "-inf", int(time.time() * 1000) - 60_000
                )
            )
        return found

    # --- assignments -----------------------------------------------------------------------

    async def put_assignment(self, assignment: Assignment) -> bool:
        stored = await self._call(
            self._put_assignment(
                keys=[self._worker_key(assignment.worker, "assignment")],
                args=[
                    assignment.fence,
                    assignment.generation,
                    control.encode(assignment),
                    self._assignment_ttl_ms,
                ],
            )
        )
        return bool(stored)

    async def assignment(self, worker: str) -> Assignment | None:
        data = await self._call(self._redis.hget(self._worker_key(worker, "assignment"), "body"))
        if data is None:
            return None
        try:
            return control.decode_assignment(data)
        except (ValueError, RecursionError) as error:
            log.warning("assignment_undecodable", worker=worker, error=str(error))
            return None

    # --- hints -----------------------------------------------------------------------------

    async def hint(self, topic: str) -> None:
        await self._call(self._redis.publish(self._key(f"hint:{topic}"), b""))

    async def hints(self, *topics: str) -> AsyncIterator[str]:
        channels = {self._key(f"hint:{topic}").encode(): topic for topic in topics}
        names = [name.decode() for name in channels]
        async with contextlib.aclosing(self._listen(names)) as messages:
            async for message in messages:
                # A "subscribe" message comes at the start and after each silent reconnect of
                # the client: hints may have been lost before it.
                if message["type"] in {"message", "subscribe"}:
                    yield channels[message["channel"]]

    async def note(self, topic: str, data: bytes) -> None:
        await self._call(self._redis.publish(self._key(f"note:{topic}"), data))

    async def notes(self, topic: str) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._listen([self._key(f"note:{topic}")])) as messages:
            async for message in messages:
                if message["type"] == "message":
                    yield message["data"]

    async def _listen(self, names: list[str]) -> AsyncGenerator[dict[str, Any], None]:
        pause_s = 0.05
        while True:
            try:
                async with self._listener.pubsub() as pubsub:
                    await pubsub.subscribe(*names)
                    async for message in pubsub.listen():
                        pause_s = 0.05
                        yield message
            except (exceptions.RedisError, OSError, TimeoutError) as error:
                log.debug("listening_interrupted", error=str(error))
            await asyncio.sleep(pause_s * (0.5 + random.random()))  # noqa: S311 - jitter
            pause_s = min(pause_s * 2, 2.0)

    # --- tallies -----------------------------------------------------------------------------

    async def put_tallies(
        self, gateway: str, tallies: Mapping[ModelId, bytes], ttl_s: float
    ) -> None:
        ttl_ms = max(1, int(ttl_s * 1000))
        now_ms = int(time.time() * 1000)
        key = self._tallies_key(gateway)
        pipe = self._redis.pipeline(transaction=False)
        if tallies:
            fields: dict[Any, Any] = dict(tallies)
            pipe.hset(key, mapping=fields)
        pipe.pexpire(key, ttl_ms)
        pipe.zadd(self._key("gateways"), {gateway: now_ms + ttl_ms})
        # Here and not where they are read: gateways come and go, also when nobody asks.
        pipe.zremrangebyscore(self._key("gateways"), "-inf", now_ms)
        await self._call(pipe.execute())

    async def tallies(self, models: Sequence[ModelId]) -> dict[str, dict[ModelId, bytes]]:
        members = await self._call(
            self._redis.zrangebyscore(self._key("gateways"), int(time.time() * 1000), "+inf")
        )
        gateways = [name.decode() for name in members]
        if not gateways or not models:
            return {}
        pipe = self._redis.pipeline(transaction=False)
        for gateway in gateways:
            pipe.hmget(self._tallies_key(gateway), list(models))
        return {
            gateway: {
                model: data for model, data in zip(models, found, strict=True) if data is not None
            }
            for gateway, found in zip(gateways, await self._call(pipe.execute()), strict=True)
        }

    # --- the placer's lease ------------------------------------------------------------------

    async def acquire_lease(self, holder: str, ttl_s: float) -> int | None:
        fence = await self._call(
            self._acquire_lease(
                keys=[self._key("{pl}:lease"), self._key("{pl}:fence")],
                args=[holder, max(1, int(ttl_s * 1000))],
            )
        )
        return None if fence is None else int(fence)

    async def release_lease(self, holder: str) -> None:
        await self._call(self._release_lease(keys=[self._key("{pl}:lease")], args=[holder]))

    # --- active queues -----------------------------------------------------------------------

    async def add_active(self, model: ModelId) -> None:
        await self._call(self._redis.sadd(self._key("{pl}:active"), model))

    async def remove_active(self, model: ModelId) -> None:
        await self._call(self._redis.srem(self._key("{pl}:active"), model))

    async def active(self) -> set[ModelId]:
        members = await self._call(self._redis.smembers(self._key("{pl}:active")))
        return {ModelId(member.decode()) for member in members}

    async def epoch(self) -> str:
        key = self._key("epoch")
        await self._call(self._redis.set(key, uuid.uuid4().hex, nx=True))
        value: bytes | None = await self._call(self._redis.get(key))
        return (value or b"").decode()

    # --- helpers -----------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _worker_key(self, worker: str, name: str) -> str:
        return f"{self._prefix}{{w:{worker}}}:{name}"

    def _tallies_key(self, gateway: str) -> str:
        return f"{self._prefix}{{g:{gateway}}}:tallies"

    async def _call(self, command: Any, *, optional: bool = False) -> Any:
        """Awaits one command; the driver's errors become `StoreUnavailable`.

        redis-py types each command for its synchronous and asynchronous client at once, hence
        Any. `optional`: a refused command (some hosts forbid CONFIG) gives None instead.
        """
        task = asyncio.current_task()
        cancelled = task.cancelling() if task else 0
        try:
            answer = await command
            # redis-py 8.1 swallows a cancellation that comes while it waits for an answer: the
            # command simply completes. An eternal task would go on for ever after its cancel.
            if task and task.cancelling() > cancelled:
                raise asyncio.CancelledError
            return answer
        except exceptions.ResponseError as error:
            # LOADING, READONLY and the like: the server is there but cannot serve us now.
            if optional:
                return None
            raise StoreUnavailable(f"the store refused a command: {error}") from error
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            said = explain(error) or error
            raise StoreUnavailable(f"the store cannot be reached: {said}") from error


class _TlsConnection(SSLConnection):
    """The driver keeps a context for as long as its pool lives, and has its own way with files."""

    def __init__(self, *, tls: ClientTls, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls

    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = dict(super(SSLConnection, self)._connection_arguments())
        try:
            arguments["ssl"] = self._tls.context()
        except TlsError as error:
            raise exceptions.ConnectionError(str(error)) from None
        return arguments
