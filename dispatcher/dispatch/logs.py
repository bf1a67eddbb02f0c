"""A task's output: its tail when it ends, all of it while somebody follows."""

from __future__ import annotations

from collections import deque

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from dispatcher.backends.base import Backend
from dispatcher.errors import BackendError, OutputUnavailable, QueueError
from dispatcher.model import Handle
from dispatcher.queue.tails import INTEREST_SECONDS, Tail, Tails

log = structlog.get_logger(__name__)

#: Seconds that reading a tail may take; past that, what has been read is kept.
COLLECT_TIMEOUT = 20.0
#: Seconds that a task waits for its tail to be kept, so that who has waited for the task finds
#: it; beyond that the task goes on, and so do others without waiting, until Redis answers again.
KEEP_TIMEOUT = 0.5
#: Tails that may wait for a Redis that does not answer: some megabytes.
MAX_KEEPING = 64
#: Bytes of one piece of live output at most.
PIECE_BYTES = 32_768


class TailBuffer:
    """The last ``limit`` bytes of what was fed, and how much that was in all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: deque[bytes] = deque()
        self._kept = 0
        self.total = 0

    def feed(self, data: bytes) -> None:
        """Take in the next piece of output."""
        self.total += len(data)
        data = data[-self._limit :] if self._limit else b""
        self._pieces.append(data)
        self._kept += len(data)
        while self._kept - len(self._pieces[0]) >= self._limit:
            self._kept -= len(self._pieces.popleft())
            if not self._pieces:
                break

    def data(self) -> bytes:
        """What is kept now."""
        return b"".join(self._pieces)[-self._limit :] if self._limit else b""


class Logs:
    """Collects tails, and feeds followers."""

    def __init__(self, backend: Backend, tails: Tails, *, tail_bytes: int) -> None:
        self._backend = backend
        self._tails = tails
        self._tail_bytes = tail_bytes
        self._running: dict[str, Handle] = {}
        self._followed: set[str] = set()
        self._keeping = 0
        #: Whether the last tail was kept in time.
        self._prompt = True
        self._group: TaskGroup | None = None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Give the feeds of followers a home; until cancelled."""
        async with anyio.create_task_group() as group:
            self._group = group
            task_status.started()
            await anyio.sleep_forever()

    def running(self, handle: Handle) -> None:
        """The task's container can be followed from now on."""
        self._running[handle.task_id] = handle

    def ended(self, task_id: str) -> None:
        """The task's container is about to go."""
        self._running.pop(task_id, None)

    def follow(self, task_id: str) -> None:
        """Somebody wants to see the task's output as it comes; nothing if it does not run here."""
        handle = self._running.get(task_id)
        if handle and self._group and task_id not in self._followed:
            self._followed.add(task_id)
            self._group.start_soon(self._feed, handle, name=f"follow {task_id}")

    def tail(self, task_id: str, asked: str) -> None:
        """Somebody wants to see the end of the task's output; nothing if it does not run here."""
        handle = self._running.get(task_id)
        if handle and self._group:
            self._group.start_soon(self.collect, handle, asked, name=f"tail {task_id}")

    async def collect(self, handle: Handle, asked: str = "") -> None:
        """Keep the tail of a container's output.

        Output is not worth a task's result or time: what fails here is logged, and the task goes on.
        """
        buffer = TailBuffer(self._tail_bytes)
        try:
            with anyio.move_on_after(COLLECT_TIMEOUT):
                async for data in self._backend.logs(handle, follow=False):
                    buffer.feed(data)
        except BackendError as error:
            log.warning("task.output_not_kept", task_id=handle.task_id, error=str(error))
            return
        except Exception:
            log.exception("task.output_not_kept", task_id=handle.task_id)
            return
        assert self._group is not None
        tail, kept = Tail(buffer.data(), buffer.total, handle.attempt, asked), anyio.Event()
        self._group.start_soon(self._keep, handle.task_id, tail, kept, name=f"keep {handle.task_id}")
        if self._prompt:
            with anyio.move_on_after(KEEP_TIMEOUT) as waiting:
                await kept.wait()
            if waiting.cancelled_caught:
                self._prompt = False

    async def _keep(self, task_id: str, tail: Tail, kept: anyio.Event) -> None:
        self._keeping += 1
        try:
            if self._keeping > MAX_KEEPING:
                raise OutputUnavailable("too many wait for a Redis that does not answer")
            await self._tails.keep(task_id, tail)
            self._prompt = True
        except QueueError as error:
            self._prompt = False
            log.warning("task.output_not_kept", task_id=task_id, error=str(error))
        except Exception:
            log.exception("task.output_not_kept", task_id=task_id)
        finally:
            self._keeping -= 1
            kept.set()

    async def _feed(self, handle: Handle) -> None:
        """Publish the output from its beginning, until it ends or nobody follows any more."""
        offset = 0
        try:
            await self._tails.begin_live(handle.task_id)
            async with anyio.create_task_group() as group:
                group.start_soon(self._while_wanted, handle.task_id, group.cancel_scope)
                async for data in self._backend.logs(handle, follow=True):
                    for start in range(0, len(data), PIECE_BYTES):
                        piece = data[start : start + PIECE_BYTES]
                        await self._tails.publish(handle.task_id, handle.attempt, offset, piece)
                        offset += len(piece)
                group.cancel_scope.cancel()
        except* (BackendError, QueueError) as errors:
            log.warning("task.follow_ended", task_id=handle.task_id, error=str(errors.exceptions[0]))
        except* Exception:
            log.exception("task.follow_failed", task_id=handle.task_id)
        finally:
            self._followed.discard(handle.task_id)

    async def _while_wanted(self, task_id: str, scope: anyio.CancelScope) -> None:
        while await self._tails.wanted(task_id):  # noqa: ASYNC110 - what is waited for happens elsewhere
            await anyio.sleep(INTEREST_SECONDS / 3)
        scope.cancel()
