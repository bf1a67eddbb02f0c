"""What is kept of tasks' output, and what runs by while somebody follows it.

All of this may be lost without losing a task, so it lives in STATE_REDIS_URL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from dispatcher.errors import OutputUnavailable, QueueUnavailable
from dispatcher.queue.connection import command, connect, read_after, sorted_errors
from dispatcher.queue.exchange import ms
from dispatcher.queue.scripts import SOURCES
from dispatcher.queue.store import Keys

#: Seconds a follower's interest lasts; it is renewed while it reads.
INTEREST_SECONDS = 15.0
#: Seconds that live output stays after it was last written to.
LIVE_SECONDS = 60.0
#: Pieces of live output that a slow follower may lag behind; a piece is at most 32 KiB.
LIVE_LENGTH = 256
#: Pieces of one read: 2 MiB at most.
LIVE_READ = 64


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of an attempt's output: the last ``len(data)`` of ``total`` bytes."""

    data: bytes
    total: int
    attempt: int
    #: What its asker said, if somebody asked for it while the task ran.
    asked: str = ""

    @property
    def dropped(self) -> int:
        """Bytes of the beginning that were not kept."""
        return self.total - len(self.data)

    def last(self, lines: int) -> bytes:
        """The last so many lines of ``data``."""
        kept = self.data.splitlines(keepends=True) if lines else []
        return b"".join(kept[-lines:])


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of live output that begins ``offset`` bytes into an attempt's output."""

    entry_id: str
    attempt: int
    offset: int
    data: bytes


@contextmanager
def _output_errors() -> Iterator[None]:
    """As ``sorted_errors``, and say that it is only output that is missing."""
    try:
        with sorted_errors():
            yield
    except QueueUnavailable as error:
        raise OutputUnavailable(
            f"the Redis that keeps tasks' output (STATE_REDIS_URL) is away; the tasks go on: {error}"
        ) from error


class Tails:
    """Log tails and live output. Every call may raise OutputUnavailable."""

    def __init__(
        self,
        url: str,
        stream: str,
        *,
        retention: float = 86_400,
        total_limit: int = 268_435_456,
        max_connections: int = 16,
    ) -> None:
        """``retention`` in seconds, ``total_limit`` in bytes."""
        self._keys = Keys(stream)
        self._retention = retention
        self._total_limit = total_limit
        self._redis = connect(url, max_connections=max_connections)
        self._keep = self._redis.register_script(SOURCES["keep_tail"])

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def keep(self, task_id: str, tail: Tail) -> None:
        """Keep the output of an ended attempt."""
        args: list[str | bytes] = [task_id, tail.data, str(tail.total), str(tail.attempt), tail.asked]
        args += [ms(self._retention), str(self._total_limit)]
        with _output_errors():
            await cast(Awaitable[Any], self._keep(keys=[self._keys.stream], args=args))

    async def get(self, task_id: str) -> Tail | None:
        """What was kept; None if nothing was."""
        r = await self._command("HGETALL", self._keys.of(f"tail:{task_id}"))
        return Tail(r[b"data"], int(r[b"total"]), int(r[b"attempt"]), r[b"asked"].decode()) if r else None

    # --- following --------------------------------------------------------------------

    async def show_interest(self, task_id: str) -> None:
        """Say that somebody follows."""
        interest = int(INTEREST_SECONDS * 1000)
        await self._command("SET", self._keys.of(f"follow:{task_id}"), "1", "PX", interest)

    async def wanted(self, task_id: str) -> bool:
        """Whether somebody follows."""
        return bool(await self._command("EXISTS", self._keys.of(f"follow:{task_id}")))

    async def publish(self, task_id: str, attempt: int, offset: int, data: bytes) -> None:
        """Pass a piece of output on to whoever follows."""
        key = self._live(task_id)
        fields: dict[Any, Any] = {"attempt": attempt, "offset": offset, "data": data}
        with _output_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.xadd(key, fields, maxlen=LIVE_LENGTH)
                pipe.pexpire(key, int(LIVE_SECONDS * 1000))
                await pipe.execute()

    async def begin_live(self, task_id: str) -> None:
        """Drop live output of an earlier follower."""
        await self._command("DEL", self._live(task_id))

    async def live(self, task_id: str, after: str) -> AsyncIterator[Piece]:
        """Pieces after entry ``after`` ('0-0' for all); ends when BLOCK_TIMEOUT brings none."""
        with _output_errors():
            pieces = await read_after(self._redis, LIVE_READ, {self._live(task_id): after})
        for _, entry_id, fields in pieces:
            yield Piece(entry_id, int(fields[b"attempt"]), int(fields[b"offset"]), fields[b"data"])

    async def _command(self, *parts: str | bytes | float) -> Any:
        with _output_errors():
            return await command(self._redis, *parts)

    def _live(self, task_id: str) -> str:
        return self._keys.of(f"live:{task_id}")
