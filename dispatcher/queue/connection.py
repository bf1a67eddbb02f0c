"""Connections to Redis, and the sorting of what goes wrong with them.

redis-py by default waits 5 s and repeats a command ten times; repeated blindly, a command
whose reply was lost is done twice. So no connection of ours repeats anything by itself:
``dispatcher.queue.store`` repeats scripts, which recognise a repetition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dispatcher.errors import ConfigurationError, QueueUnavailable

#: Seconds for a connection or a reply. A command that takes longer is not one of ours.
SOCKET_TIMEOUT = 5.0
#: Seconds a blocking read may block: below the socket timeout, or every quiet spell would
#: look like a dead connection.
BLOCK_TIMEOUT = 2.0


def connect(url: str, *, max_connections: int) -> Redis:
    """A client of its own pool; nothing is sent yet.

    Raises ConfigurationError for a URL that redis-py does not understand.
    """
    # A TCP connection cut without a word is found by its keep-alive; a socket file has none.
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    try:
        return Redis.from_url(
            url,
            decode_responses=False,
            protocol=2,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=SOCKET_TIMEOUT,
            max_connections=max_connections,
            retry=Retry(NoBackoff(), 0),
            **keepalive,
        )
    except ValueError as error:
        raise ConfigurationError([f"REDIS_URL: {error}"]) from error


def masked(url: str) -> str:
    """The URL as it may be shown: without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user = parts.username or ""
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}:***@{host}"))


@contextmanager
def sorted_errors() -> Iterator[None]:
    """Turn redis-py's exceptions into ours. Programming errors (wrong type, script) pass as they are."""
    try:
        yield
    except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
        raise QueueUnavailable(f"Redis refuses us: {error}") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise QueueUnavailable(f"Redis does not answer: {error or type(error).__name__}") from error
    except exceptions.ReadOnlyError as error:
        raise QueueUnavailable(f"Redis is a read-only replica: {error}") from error
    except exceptions.OutOfMemoryError as error:
        raise QueueUnavailable(f"Redis is out of memory: {error}") from error
    except exceptions.ResponseError as error:
        if str(error).startswith(_PASSING):
            raise QueueUnavailable(f"Redis can't serve us now: {error}") from error
        raise


#: Replies that stand for a state of the server which passes or which an operator mends.
_PASSING = ("LOADING", "BUSY", "MISCONF", "OOM", "READONLY", "MASTERDOWN", "TRYAGAIN", "CLUSTERDOWN", "UNBLOCKED", "NOREPLICAS")
