"""What is kept of tasks' output, and what runs by while somebody follows it.

All of this may be lost without losing a task, so it lives in STATE_REDIS_URL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, cast

from dispatcher.queue.connection import BLOCK_TIMEOUT, connect, sorted_errors
from dispatcher.queue.store import Keys, ms, source

#: Seconds a follower's interest lasts; it is renewed while it reads.
INTEREST_SECONDS = 15.0
#: Seconds that live output stays after it was last written to.
LIVE_SECONDS = 60.0
#: Pieces of live output that a slow follower may lag behind; a piece is at most 32 KiB.
LIVE_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a task's output: the last ``len(data)`` of ``total`` bytes."""

    data: bytes
    total: int

    @property
    def dropped(self) -> int:
        """Bytes of the beginning that were not kept."""
        return self.total - len(self.data)


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of live output that begins ``offset`` bytes into the output; or its end."""

    entry_id: str
    offset: int
    data: bytes
    end: bool


class Tails:
    """Log tails and live output."""

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
        self._keep = self._redis.register_script(source("keep_tail"))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def keep(self, task_id: str, tail: Tail) -> None:
        """Keep the output of an ended attempt. Raises QueueUnavailable."""
        args = [task_id, tail.data, str(tail.total), ms(self._retention), str(self._total_limit)]
        with sorted_errors():
            await cast(Awaitable[Any], self._keep(keys=[self._keys.stream], args=args))

    async def get(self, task_id: str) -> Tail | None:
        """What was kept; None if nothing was. Raises QueueUnavailable."""
        with sorted_errors():
            data, total = await cast(
                Awaitable[list[bytes | None]],
                self._redis.hmget(self._keys.of(f"tail:{task_id}"), ["data", "total"]),
            )
        return None if data is None or total is None else Tail(data, int(total))

    # --- following --------------------------------------------------------------------

    async def show_interest(self, task_id: str) -> bool:
        """Say that somebody follows; returns whether nobody did before. Raises QueueUnavailable."""
        key = self._keys.of(f"follow:{task_id}")
        with sorted_errors():
            before = await self._redis.set(key, "1", px=int(INTEREST_SECONDS * 1000), get=True)
        return before is None

    async def wanted(self, task_id: str) -> bool:
        """Whether somebody follows. Raises QueueUnavailable."""
        with sorted_errors():
            return bool(await self._redis.exists(self._keys.of(f"follow:{task_id}")))

    async def publish(self, task_id: str, offset: int, data: bytes, *, end: bool = False) -> None:
        """Pass a piece of output on to whoever follows. Raises QueueUnavailable."""
        key = self._live(task_id)
        fields: dict[Any, Any] = {"offset": offset, "data": data, "end": int(end)}
        with sorted_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                pipe.xadd(key, fields, maxlen=LIVE_LENGTH)
                pipe.pexpire(key, int(LIVE_SECONDS * 1000))
                await pipe.execute()

    async def begin_live(self, task_id: str) -> None:
        """Drop live output of an earlier follower. Raises QueueUnavailable."""
        with sorted_errors():
            await self._redis.delete(self._live(task_id))

    async def live(self, task_id: str, after: str) -> AsyncIterator[Piece]:
        """Pieces after entry ``after`` ('0-0' for all); ends when BLOCK_TIMEOUT brings none.

        Raises QueueUnavailable.
        """
        with sorted_errors():
            reply = await cast(
                Awaitable[Any],
                self._redis.execute_command(
                    "XREAD", "COUNT", 64, "BLOCK", int(BLOCK_TIMEOUT * 1000), "STREAMS", self._live(task_id), after
                ),
            )
        for _, entries in reply.items() if isinstance(reply, dict) else reply or []:
            for entry_id, raw in entries:
                fields = raw if isinstance(raw, dict) else dict(zip(raw[::2], raw[1::2], strict=True))
                yield Piece(
                    entry_id.decode(), int(fields[b"offset"]), fields[b"data"], fields[b"end"] == b"1"
                )

    def _live(self, task_id: str) -> str:
        return self._keys.of(f"live:{task_id}")
