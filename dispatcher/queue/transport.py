"""Connections that lead to a master, and leave a server that is none any more.

redis-py 8.1 has connections that follow a master (``redis.asyncio.sentinel``), but no pool of
them that waits for a free one, and they overlook a demotion that Redis before 7 tells from within
a script. So the pool here is redis-py's blocking one, and the connections are these.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from redis import exceptions
from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection

from dispatcher.queue.batch import Batch
from dispatcher.redis_url import SentinelUrl

#: Seconds for a sentinel's connection or reply: one that is gone must not hold up the others.
SENTINEL_TIMEOUT = 1.0
#: Connections served by one question to the sentinels.
ASKERS = 1_000
#: What a server answers that has become a replica. Redis before 7 wraps what a script met.
_REPLICA = re.compile(r"(?:Error running script .* -READONLY|UNBLOCKED)\b")


class LeavesReplicas(AbstractConnection):
    """Is closed by an answer that only a replica gives, or a master that became one.

    The next use connects anew: by the sentinels, or by a name that points to the new master.
    """

    async def read_response(self, *args: Any, **options: Any) -> Any:
        """See ``AbstractConnection``."""
        try:
            return await super().read_response(*args, **options)
        except exceptions.ResponseError as error:
            if isinstance(error, exceptions.ReadOnlyError | exceptions.MasterDownError) or _REPLICA.match(
                str(error)
            ):
                await self.disconnect(nowait=True)
            raise


class TcpConnection(LeavesReplicas, Connection):
    """redis://"""


class TlsConnection(LeavesReplicas, SSLConnection):
    """rediss://"""


class SocketFileConnection(LeavesReplicas, UnixDomainSocketConnection):
    """unix://"""


class MasterConnection(TcpConnection):
    """redis+sentinel:// - asks the sentinels each time it connects."""

    def __init__(self, *, sentinels: Sentinels, **options: Any) -> None:
        super().__init__(**options)
        self._sentinels = sentinels

    async def connect(self) -> None:
        """Connect if need be, also because the master is known to be elsewhere by now."""
        if self.is_connected and self._sentinels.master not in {None, (self.host, self.port)}:
            await self.disconnect(nowait=True)
        await super().connect()  # type: ignore[no-untyped-call]

    async def _connect(self) -> None:
        self.host, self.port = await self._sentinels.ask()
        await super()._connect()  # type: ignore[no-untyped-call]

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, and see that it is a master: in a failover a sentinel's word may be behind."""
        await super().on_connect_check_health(check_health=check_health)
        await self.send_command("ROLE", check_health=False)
        try:
            role = (await self.read_response())[0]
        except exceptions.NoPermissionError:
            return  # then a write will tell
        if role != b"master":
            raise exceptions.ConnectionError(f"{self.host}:{self.port} is not the master any more")


class Sentinels:
    """Where the master is. No connection to a sentinel outlives a question."""

    def __init__(self, url: SentinelUrl, **options: Any) -> None:
        """``options`` are for the connections to the sentinels."""
        self._name = url.master
        #: Who answered last goes first.
        self._addresses = list(url.sentinels)
        self._options = {"username": url.sentinel_username, "password": url.sentinel_password, **options}
        self._questions = Batch(self._answer, ASKERS)
        #: What was answered last.
        self.master: tuple[str, int] | None = None

    async def ask(self) -> tuple[str, int]:
        """Host and port of the master. Raises ConnectionError if no sentinel tells."""
        return await self._questions.call(None)

    async def _answer(self, askers: Sequence[None]) -> list[tuple[str, int]]:
        silent: list[str] = []
        for address in list(self._addresses):
            try:
                master = await self._one(*address)
            except (exceptions.RedisError, OSError) as error:
                silent.append(f"{address[0]}:{address[1]}: {error}")
                continue
            if master is None:
                silent.append(f"{address[0]}:{address[1]}: it knows no master of this name")
                continue
            self._addresses.remove(address)
            self._addresses.insert(0, address)
            self.master = master
            return [master] * len(askers)
        raise exceptions.ConnectionError(
            f"no sentinel tells where the master {self._name!r} is; {'; '.join(silent)}"
        )

    async def _one(self, host: str, port: int) -> tuple[str, int] | None:
        sentinel = Redis(
            host=host,
            port=port,
            socket_timeout=SENTINEL_TIMEOUT,
            socket_connect_timeout=SENTINEL_TIMEOUT,
            **self._options,
        )
        try:
            # In two words: redis-py then leaves the reply as it is.
            ask = cast(Callable[..., Awaitable[Any]], sentinel.execute_command)
            reply = await ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)
        finally:
            await sentinel.aclose()
        return (reply[0].decode(), int(reply[1])) if reply else None
