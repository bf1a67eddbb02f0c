"""What happens, told as it happens to whoever wants to follow it.

All of this may be lost without losing a task, so it lies in STATE_REDIS_URL, and nothing waits
for that: what is published goes into a buffer, and one writer takes it from there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import structlog

from dispatcher.errors import QueueError
from dispatcher.queue.connection import connect, sorted_errors
from dispatcher.queue.store import Keys
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)

#: About so many events stay in the stream.
EVENTS_LENGTH = 10_000
#: Events that may wait to be written; then the oldest are dropped.
BUFFER_LENGTH = 1_000
#: Events written in one round trip.
BATCH = 100
#: Characters of a value. No name is longer, and an error's beginning tells what it is.
MAX_VALUE = 1_000
#: Seconds between tries to write while Redis is away: at first, and at the longest.
FIRST_PAUSE = 0.2
MAX_PAUSE = 5.0


class Events:
    """Writes one instance's events into the stream ``{<stream>}:events``."""

    def __init__(self, url: str, stream: str, *, instance: str) -> None:
        """Sends nothing yet."""
        self._key = Keys(stream).of("events")
        self._instance = instance
        self._redis = connect(url, max_connections=1)
        self._waiting: deque[dict[str, str]] = deque()
        self._rung = anyio.Event()
        #: Whether what was tried last could not be written.
        self._away = False
        #: Events lost since the stream was last written to.
        self.dropped = 0

    async def aclose(self) -> None:
        """Close the connection; what has not been written is lost."""
        await self._redis.aclose()

    def publish(self, kind: str, fields: Mapping[str, str | int | float]) -> None:
        """Tell an event of this kind. Never waits and never fails."""
        if len(self._waiting) >= BUFFER_LENGTH:
            self._waiting.popleft()
            self.dropped += 1
        told = {name: _one_line(value) for name, value in fields.items()}
        self._waiting.append({"kind": kind, "instance": self._instance, **told})
        self._rung.set()

    async def run(self) -> None:
        """Write what is published, until cancelled."""
        pause = RetryPause(FIRST_PAUSE, MAX_PAUSE)
        while True:
            await self._rung.wait()
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            if not self._waiting:
                self._rung = anyio.Event()
            try:
                await self._write(batch)
            except QueueError as error:
                # Written again they could be there twice, for the reply may be all that was lost.
                self.dropped += len(batch)
                if not self._away:
                    log.warning("events.not_written", error=str(error))
                self._away = True
                await pause.wait()
            else:
                if self._away:
                    log.info("events.written_again", dropped=self.dropped)
                self._away, self.dropped = False, 0
                pause.reset()

    async def _write(self, batch: Sequence[dict[str, str]]) -> None:
        """Takes as long as a connection may (see ``connection.SOCKET_TIMEOUT``).

        Raises QueueUnavailable, QueueRefused.
        """
        with sorted_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for event in batch:
                    fields: dict[Any, Any] = {**event}
                    pipe.xadd(self._key, fields, maxlen=EVENTS_LENGTH)
                await pipe.execute()


def _one_line(value: str | float) -> str:
    return " ".join(str(value).split())[:MAX_VALUE]
