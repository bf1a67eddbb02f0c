"""The client for programs without an event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from dispatcher.client.asynchronous import AsyncClient, AsyncHandle, traced
from dispatcher.errors import DispatcherError
from dispatcher.model import State
from dispatcher.queue.dead import DeadLetter
from dispatcher.queue.tails import Tail
from dispatcher.queue.views import InstanceInfo, QueueInfo, TaskStatus
from dispatcher.task import Task

T = TypeVar("T")


class Handle:
    """A task that was accepted; see ``AsyncHandle``."""

    def __init__(self, client: Client, task_id: str) -> None:
        self.id = task_id
        self._client = client

    def wait(self, timeout: float | None = None) -> TaskStatus:
        """Its status once it has ended. Raises WaitTimeout after ``timeout`` seconds."""
        return self._client.wait(self.id, timeout=timeout)

    def status(self) -> TaskStatus:
        """Its status now."""
        return self._client.status(self.id)

    def cancel(self) -> TaskStatus:
        """See ``AsyncClient.cancel``."""
        return self._client.cancel(self.id)

    def logs(self, *, follow: bool = False) -> Iterator[str]:
        """Its output, line by line."""
        return self._client.logs(self.id, follow=follow)

    def __repr__(self) -> str:
        return f"Handle({self.id!r})"


class Client:
    """``AsyncClient`` for programs without an event loop; may be used from many threads."""

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        stream: str = "dispatcher:tasks",
        state_url: str | None = None,
        max_connections: int = 32,
    ) -> None:
        """See ``AsyncClient``. Runs an event loop in a thread of its own until closed."""
        self._portal_context: AbstractContextManager[BlockingPortal] = start_blocking_portal()
        self._portal = self._portal_context.__enter__()
        self._client = AsyncClient(url, stream=stream, state_url=state_url, max_connections=max_connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._portal.call(self._client.aclose)
        self._portal_context.__exit__(None, None, None)

    def ping(self) -> None:
        """Raises QueueUnavailable unless Redis answers."""
        self._call(self._client.ping)

    def submit(self, task: Task) -> Handle:
        """See ``AsyncClient.submit``."""
        # The context that the trace lives in is this thread's, so it is read here.
        submission = traced(task)
        return Handle(self, self._call(lambda: self._client.submit_as(submission)).id)

    def submit_many(self, tasks: Iterable[Task]) -> list[Handle | DispatcherError]:
        """See ``AsyncClient.submit_many``."""
        waiting = [traced(task) for task in tasks]
        answers = self._call(lambda: self._client.submit_all(waiting))
        return [Handle(self, a.id) if isinstance(a, AsyncHandle) else a for a in answers]

    def handle(self, task_id: str) -> Handle:
        """A handle for a task of known id; asks nothing."""
        return Handle(self, task_id)

    def wait(self, task_id: str, *, timeout: float | None = None) -> TaskStatus:
        """See ``AsyncClient.wait``."""
        return self._call(lambda: self._client.wait(task_id, timeout=timeout))

    def status(self, task_id: str) -> TaskStatus:
        """See ``AsyncClient.status``."""
        return self._call(lambda: self._client.status(task_id))

    def cancel(self, task_id: str) -> TaskStatus:
        """See ``AsyncClient.cancel``."""
        return self._call(lambda: self._client.cancel(task_id))

    def logs(self, task_id: str, *, follow: bool = False) -> Iterator[str]:
        """See ``AsyncClient.logs``."""
        lines = self._client.logs(task_id, follow=follow)
        try:
            while (line := self._call(lambda: anext(lines, None))) is not None:
                yield line
        finally:
            self._call(lines.aclose)

    def tasks(
        self, *, state: State | None = None, queue: str | None = None, limit: int = 100
    ) -> list[TaskStatus]:
        """See ``AsyncClient.tasks``."""
        return self._call(lambda: self._client.tasks(state=state, queue=queue, limit=limit))

    def tail(self, task_id: str) -> Tail | None:
        """See ``AsyncClient.tail``."""
        return self._call(lambda: self._client.tail(task_id))

    def pause(self, queue: str) -> None:
        """See ``AsyncClient.pause``."""
        self._call(lambda: self._client.pause(queue))

    def resume(self, queue: str) -> None:
        """See ``AsyncClient.resume``."""
        self._call(lambda: self._client.resume(queue))

    def queues(self) -> list[QueueInfo]:
        """See ``AsyncClient.queues``."""
        return self._call(self._client.queues)

    def instances(self) -> list[InstanceInfo]:
        """See ``AsyncClient.instances``."""
        return self._call(self._client.instances)

    def dead(self, *, limit: int = 100) -> list[DeadLetter]:
        """See ``AsyncClient.dead``."""
        return self._call(lambda: self._client.dead(limit=limit))

    def dead_ids(self) -> list[str]:
        """See ``AsyncClient.dead_ids``."""
        return self._call(self._client.dead_ids)

    def retry_dead(self, ids: Sequence[str]) -> list[Handle | DispatcherError]:
        """See ``AsyncClient.retry_dead``."""
        answers = self._call(lambda: self._client.retry_dead(ids))
        return [Handle(self, a.id) if isinstance(a, AsyncHandle) else a for a in answers]

    def drop_dead(self, ids: Sequence[str]) -> list[bool]:
        """See ``AsyncClient.drop_dead``."""
        return self._call(lambda: self._client.drop_dead(ids))

    def _call(self, verb: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await verb()

        return self._portal.call(run)
