"""The source ``redis-list``: tasks come by LPUSH, as for many a simple worker.

What an LPUSH put there is taken by the same script as an entry of a stream, and is a task with
a record from then on. A list can't be read without a position, nor can one wait for it without
taking something: the doorbell waits with BLMOVE from a list's end to that same end, which leaves
the list as it is and returns as soon as there is anything in it.
"""

from __future__ import annotations

from typing import Any

import anyio
import structlog

from dispatcher.errors import QueueError
from dispatcher.model import Delivery
from dispatcher.queue.connection import BLOCK_TIMEOUT, command, connect
from dispatcher.queue.source import FIRST_PAUSE, MAX_PAUSE, RING_PAUSE, Source
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)


class ListSource(Source):
    """Takes tasks from the lists of the queues this instance serves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As ``Source``."""
        super().__init__(*args, **kwargs)
        #: Set and replaced by each look for tasks; and whether that one found any.
        self._looked = anyio.Event()
        self._found = False

    async def take(self, n: int) -> list[Delivery]:
        """See ``Source.take``."""
        taken: list[Delivery] = []
        try:
            taken = await super().take(n)
        finally:
            self._found = bool(taken)
            self._looked.set()
            self._looked = anyio.Event()
        return taken

    async def listen(self) -> None:
        """See ``Source.listen``: a blocking wait for each list."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._listen_to_streams, name="doorbell control")
            for queue in self._queues:
                group.start_soon(self._listen_to_list, queue, name=f"doorbell {queue}")

    async def _listen_to_list(self, queue: str) -> None:
        key = self._keys.queue(queue)
        pause = RetryPause(FIRST_PAUSE, MAX_PAUSE)
        redis = connect(self._url, max_connections=1)
        try:
            while True:
                try:
                    last = await command(redis, "BLMOVE", key, key, "RIGHT", "RIGHT", BLOCK_TIMEOUT)
                except QueueError as error:
                    log.debug("doorbell.disconnected", queue=queue, error=str(error))
                    await pause.wait()
                    continue
                pause.reset()
                if last is not None:
                    # It stays there until somebody takes it: ring again only after a look, and
                    # not soon after one that found nothing it might take (the queue is paused).
                    self.ring()
                    await self._looked.wait()
                    await (anyio.sleep(RING_PAUSE) if self._found else self.pause())
        finally:
            with anyio.CancelScope(shield=True):
                await redis.aclose()
