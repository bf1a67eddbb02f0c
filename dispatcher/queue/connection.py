"""Connections to Redis, and the sorting of what goes wrong with them.

redis-py by default waits 5 s and repeats a command ten times; repeated blindly, a command
whose reply was lost is done twice. So no connection of ours repeats anything by itself:
``dispatcher.queue.store`` repeats scripts, which recognise a repetition.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from random import uniform
from typing import Any, cast

import anyio
from redis import DriverInfo, exceptions
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dispatcher import __version__
from dispatcher.errors import ConfigurationError, QueueRefused, QueueUnavailable
from dispatcher.queue.transport import (
    MasterConnection,
    Sentinels,
    SocketFileConnection,
    TcpConnection,
    TlsConnection,
)
from dispatcher.redis_url import SENTINEL_SCHEME, parse_sentinel

#: Who we are in CLIENT LIST. Left to itself, redis-py reads its own version from disk for every
#: new connection, in the middle of the event loop.
_DRIVER = DriverInfo().add_upstream_driver("dispatcher", __version__)
#: Seconds for a connection or a reply. A command that takes longer is not one of ours.
SOCKET_TIMEOUT = 5.0
#: Seconds a waiting client bears Redis' absence: a restart, a failover.
RECONNECT_SECONDS = 30.0
#: Seconds a blocking read may block: below the socket timeout, or every quiet spell would
#: look like a dead connection.
BLOCK_TIMEOUT = 2.0
#: Seconds that a call waits for one of its pool's connections: several blocking reads.
POOL_TIMEOUT = 20.0
#: Replies that stand for a state of the server which passes or which an operator mends.
#: Redis before 7 wraps what a script met: "Error running script (…): … -OOM command not allowed …".
_PASSING = re.compile(
    r"(?:Error running script .* -)?"
    r"(?:LOADING|BUSY|MISCONF|OOM|READONLY|UNBLOCKED|NOREPLICAS)\b"
)


def connect(url: str, *, max_connections: int) -> Redis:
    """A client of its own pool; nothing is sent yet.

    Raises ConfigurationError for a URL that can't be understood.
    """
    ours: dict[str, Any] = {
        "decode_responses": False,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "driver_info": _DRIVER,
    }
    try:
        where = _by_sentinels(url, ours) if url.startswith(f"{SENTINEL_SCHEME}:") else _directly(url)
        pool = BlockingConnectionPool(
            **{
                "socket_timeout": SOCKET_TIMEOUT,
                "socket_connect_timeout": SOCKET_TIMEOUT,
                "max_connections": max_connections,
                "timeout": POOL_TIMEOUT,
                **ours,
                **where,
            }
        )
    except ValueError as error:
        raise ConfigurationError([f"REDIS_URL: {error}"]) from error
    return Redis.from_pool(pool)


def _directly(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {**parse_url(url)}
    kind = options.get("connection_class")
    if kind is UnixDomainSocketConnection:
        return {**options, "connection_class": SocketFileConnection}
    # A TCP connection cut without a word is found by its keep-alive; a socket file has none.
    secure = kind is SSLConnection
    return {
        "socket_keepalive": True,
        **options,
        "connection_class": TlsConnection if secure else TcpConnection,
    }


def _by_sentinels(url: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    parsed = parse_sentinel(url)
    return {
        "connection_class": MasterConnection,
        "sentinels": Sentinels(parsed, **ours),
        "socket_keepalive": True,
        "db": parsed.database,
        "username": parsed.username,
        "password": parsed.password,
    }


class Patience:
    """How long a program that waits for something bears Redis' absence, once it was there."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._was_there = False

    def answered(self) -> None:
        """Redis is there."""
        self._was_there, self._since = True, None

    async def bear(self, error: QueueUnavailable) -> None:
        """Pause for a moment. Raises ``error`` when patience is at its end."""
        self._since = time.monotonic() if self._since is None else self._since
        if not self._was_there or time.monotonic() - self._since > self._seconds:
            raise error
        await anyio.sleep(uniform(0.25, 0.5))  # noqa: S311 - jitter, not a secret


@contextmanager
def sorted_errors() -> Iterator[None]:
    """Turn every exception of redis-py into QueueUnavailable or QueueRefused."""
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
        raise QueueUnavailable(f"Redis refuses us: {error}") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise QueueUnavailable(f"Redis does not answer: {error or type(error).__name__}") from error
    except exceptions.ReadOnlyError as error:
        raise QueueUnavailable(f"Redis is a read-only replica: {error}") from error
    except (exceptions.ClusterDownError, exceptions.TryAgainError) as error:  # MASTERDOWN is one of them
        raise QueueUnavailable(f"Redis can't serve us now: {error}") from error
    except exceptions.OutOfMemoryError as error:
        raise QueueUnavailable(f"Redis is out of memory: {error}") from error
    except exceptions.RedisError as error:
        match = _PASSING.match(str(error))
        if match is None:
            raise QueueRefused(f"Redis refuses a command: {error}") from error
        if match[0].endswith("OOM"):
            raise QueueUnavailable(f"Redis is out of memory: {error}") from error
        raise QueueUnavailable(f"Redis can't serve us now: {error}") from error


async def command(redis: Redis, *parts: str | bytes | float) -> Any:
    """Send one command as it is written, e.g. ``command(redis, "XLEN", key)``.

    Replies are as RESP2 has them, put into tuples and dicts by redis-py. (Its own methods are
    typed for every protocol and decoding at once, and so hardly at all.)
    Raises QueueUnavailable, QueueRefused.
    """
    with sorted_errors():
        return await cast(Callable[..., Awaitable[Any]], redis.execute_command)(*parts)


async def read_after(
    redis: Redis, count: int, cursors: Mapping[str, str]
) -> list[tuple[str, str, dict[bytes, bytes]]]:
    """Up to ``count`` entries a stream after its cursor, as (key, entry id, fields).

    Blocks for BLOCK_TIMEOUT at most. Raises QueueUnavailable, QueueRefused.
    """
    block = int(BLOCK_TIMEOUT * 1000)
    reply = await command(
        redis, "XREAD", "COUNT", count, "BLOCK", block, "STREAMS", *cursors, *cursors.values()
    )
    pairs = reply.items() if isinstance(reply, dict) else reply or []
    return [
        (key.decode(), entry_id.decode(), fields or {})
        for key, entries in pairs
        for entry_id, fields in entries
    ]
