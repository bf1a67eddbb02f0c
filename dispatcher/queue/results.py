"""The results stream, read once for all who wait in one process.

There is no task of ours in the background: whoever waits and finds nobody reading reads for
all, and hands the reading on when it has what it wanted.
"""

from __future__ import annotations

from random import uniform

import anyio

from dispatcher.errors import QueueUnavailable
from dispatcher.queue.connection import RECONNECT_SECONDS, Patience, command, read_after
from dispatcher.queue.store import Store
from dispatcher.queue.views import TaskStatus, Views

#: Seconds between looks at a waited-for task's record, whatever the stream says: results that
#: were trimmed before they were read are found so.
LOOK_SECONDS = 15.0
#: Results of one read.
READ_COUNT = 500


class Results:
    """Waits for tasks' ends."""

    def __init__(self, store: Store, views: Views) -> None:
        self._redis = store.redis
        self._key = store.keys.of("results")
        self._views = views
        self._waiting: dict[str, set[anyio.Event]] = {}
        self._cursor = ""
        self._reading = False
        self._round = anyio.Event()

    async def wait(self, task_id: str) -> TaskStatus:
        """The task's status once it has ended, however long that takes.

        Bears Redis' absence for RECONNECT_SECONDS. Raises TaskNotFound, QueueUnavailable.
        """
        ended, patience = anyio.Event(), Patience(RECONNECT_SECONDS)
        if not self._waiting:
            newest = await self._newest()
            if not self._waiting:  # who began meanwhile reads from an earlier place already
                self._cursor = newest
        self._waiting.setdefault(task_id, set()).add(ended)
        try:
            while True:
                try:
                    status = await self._views.task(task_id)
                    patience.answered()
                    if status.state.terminal:
                        return status
                    with anyio.move_on_after(uniform(LOOK_SECONDS / 2, LOOK_SECONDS)):  # noqa: S311 - jitter
                        while not ended.is_set():
                            await self._next_round()
                except QueueUnavailable as error:
                    await patience.bear(error)
        finally:
            self._waiting[task_id].discard(ended)
            if not self._waiting[task_id]:
                del self._waiting[task_id]

    async def _newest(self) -> str:
        newest = await command(self._redis, "XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"

    async def _next_round(self) -> None:
        """Read once, or wait while somebody else does."""
        if self._reading:
            await self._round.wait()
            return
        self._reading = True
        try:
            await self._read()
        finally:
            self._reading = False
            done, self._round = self._round, anyio.Event()
            done.set()

    async def _read(self) -> None:
        for _, entry_id, fields in await read_after(self._redis, READ_COUNT, {self._key: self._cursor}):
            self._cursor = entry_id
            for event in self._waiting.get(fields[b"id"].decode(), ()):
                event.set()
