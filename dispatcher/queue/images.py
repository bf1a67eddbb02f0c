"""What is known of images: which of them waiting and open tasks want, and which we have pulled.

Nothing here takes a task or changes one. Documents are given as they are: whoever reads them
judges them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import anyio
from redis.asyncio.client import Pipeline

from dispatcher.errors import QueueError
from dispatcher.queue.connection import command, sorted_errors
from dispatcher.queue.scripts import Scripts
from dispatcher.queue.store import Store
from dispatcher.task import DEFAULT_QUEUE

#: Records or entries looked at in one round trip: some milliseconds of Redis' time.
PAGE = 200
#: Seconds between two pages, in which Redis and the event loop serve others.
PAGE_PAUSE = 0.001
#: Open tasks and entries looked at for one answer; with more, there is none.
MAX_SCANNED = 200_000
#: Seconds that a daemon's images are remembered after they were last written of.
REMEMBERED = 90 * 86_400.0


class TooManyTasks(QueueError):
    """More tasks are open than are looked through."""

    recoverable = True


@dataclass(frozen=True, slots=True)
class PulledImage:
    """An image that a dispatcher of this system has pulled onto a daemon."""

    #: The id its reference stood for after the pull.
    image_id: str
    #: Unix seconds of its pull or its last use.
    used: float


class ImageLedger:
    """Every call may raise QueueUnavailable, QueueRefused."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._redis = store.redis
        self._keys = store.keys
        self._scripts = Scripts(store.redis, store.keys.stream)

    # --- what tasks want ----------------------------------------------------------------

    async def waiting(self, queues: Sequence[str], limit: int) -> list[tuple[str, bytes]]:
        """What will be taken next: (queue, document) of up to ``limit`` tasks of each queue.

        In the order of ``queues``, and of each in the order in which they would be taken: what
        came back, then the entries. A paused queue has none, nor has one whose key is something
        else; what is larger than TASK_MAX_BYTES is left out. Nothing is taken. Asked once, not
        repeated.
        """
        if not queues:
            return []
        reply = await self._scripts.call("waiting", [str(limit), *queues], tries=1)
        return [(name.decode(), doc) for name, doc in zip(reply[::2], reply[1::2], strict=True)]

    async def open_documents(self) -> AsyncIterator[bytes]:
        """The documents of all open tasks, and of all plain entries that nobody has taken.

        Read in pages with pauses, so that neither Redis nor the event loop is held. What is accepted
        meanwhile may be missing; what was there before and has not ended is not. Raises TooManyTasks
        when more than MAX_SCANNED tasks and entries are there: then these were not all.
        """
        scanned = 0
        # Entries first: what is taken meanwhile is an open task by the time these are read.
        for queue in sorted({DEFAULT_QUEUE, *await self._store.queues()}):
            cursor = ""
            while True:
                reply = await self._scripts.call("unclaimed", [queue, cursor, str(PAGE)])
                scanned = _counted(scanned + reply[1])
                for document in reply[2:]:
                    yield document
                cursor = reply[0].decode()
                if not cursor:
                    break
                await anyio.sleep(PAGE_PAUSE)
        place = b"0"
        while True:
            key = self._keys.of("index:open")
            place, members = await command(self._redis, "ZSCAN", key, place, "COUNT", PAGE)
            task_ids = [task_id.decode() for task_id, _ in members]
            scanned = _counted(scanned + len(task_ids))
            for document in await self._documents(task_ids):
                yield document
            if int(place) == 0:
                break
            await anyio.sleep(PAGE_PAUSE)

    async def _documents(self, task_ids: Sequence[str]) -> list[bytes]:
        with sorted_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for task_id in task_ids:
                    pipe.hget(self._keys.record(task_id), "doc")
                found = await pipe.execute()
        return [document for document in found if document]

    # --- what was pulled ----------------------------------------------------------------

    async def pulled(self, daemon: str) -> dict[str, PulledImage]:
        """What dispatchers of this system have pulled onto a daemon, by normalised reference."""
        with sorted_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hgetall(self._ids(daemon))
                pipe.zrange(self._uses(daemon), 0, -1, withscores=True)
                ids, uses = await pipe.execute()
        used = dict(uses)
        return {name.decode(): PulledImage(ids[name].decode(), used.get(name, 0.0)) for name in ids}

    async def note(self, daemon: str, reference: str, image_id: str, used: float) -> None:
        """``reference`` was pulled, and names ``image_id`` since; ``used`` in Unix seconds."""
        with sorted_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(self._ids(daemon), reference, image_id)
                pipe.zadd(self._uses(daemon), {reference: used}, gt=True)
                self._remember(pipe, daemon)
                await pipe.execute()

    async def used(self, daemon: str, uses: Mapping[str, float]) -> None:
        """Tasks were launched from images, at these Unix seconds by reference. What was not pulled
        by us is not noted, and no later use is forgotten."""
        items = list(uses.items())
        for start in range(0, len(items), PAGE):
            with sorted_errors():
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.zadd(self._uses(daemon), dict(items[start : start + PAGE]), xx=True, gt=True)
                    self._remember(pipe, daemon)
                    await pipe.execute()

    async def forget(self, daemon: str, reference: str) -> None:
        """``reference`` is not there any more, or is not ours."""
        with sorted_errors():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hdel(self._ids(daemon), reference)
                pipe.zrem(self._uses(daemon), reference)
                await pipe.execute()

    def _remember(self, pipe: Pipeline, daemon: str) -> None:
        for key in (self._ids(daemon), self._uses(daemon)):
            pipe.pexpire(key, round(REMEMBERED * 1000))

    def _ids(self, daemon: str) -> str:
        return self._keys.of(f"images:{daemon}")

    def _uses(self, daemon: str) -> str:
        return self._keys.of(f"images-used:{daemon}")


def _counted(scanned: int) -> int:
    if scanned > MAX_SCANNED:
        raise TooManyTasks(f"more than {MAX_SCANNED} tasks are open")
    return scanned
