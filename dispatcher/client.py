"""What other services import: submit, wait, status, cancel, logs.

    async with AsyncClient("redis://localhost:6379/0") as client:
        handle = await client.submit(Task(image="busybox", command=["echo", "hi"]))
        result = await handle.wait(timeout=60)

``Client`` has the same verbs without ``await``.
"""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from types import TracebackType
from typing import Self, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dispatcher.errors import DispatcherError, WaitTimeout
from dispatcher.model import Backoff, Reason, Resources, State, Task
from dispatcher.queue.results import Results
from dispatcher.queue.store import Store, Submission, new_task_id
from dispatcher.queue.tails import Tail, Tails
from dispatcher.queue.views import DeadLetter, InstanceInfo, QueueInfo, TaskStatus, Views

__all__ = [
    "AsyncClient",
    "AsyncHandle",
    "Backoff",
    "Client",
    "DispatcherError",
    "Handle",
    "Reason",
    "Resources",
    "State",
    "Task",
    "TaskStatus",
]

T = TypeVar("T")
#: Submissions under way at once in ``submit_many``; scripts carry up to a hundred.
SUBMIT_WIDTH = 200
#: Seconds between looks at a task that is followed and has no output yet.
FOLLOW_PAUSE = 0.3
#: Seconds a running task's instance has to send its output's tail, and between looks for it.
TAIL_TIMEOUT = 5.0
TAIL_PAUSE = 0.05
_TRACE_CONTEXT = TraceContextTextMapPropagator()


class AsyncHandle:
    """A task that was accepted."""

    def __init__(self, client: AsyncClient, task_id: str) -> None:
        self.id = task_id
        self._client = client

    async def wait(self, timeout: float | None = None) -> TaskStatus:  # noqa: ASYNC109 - the public signature
        """Its status once it has ended. Raises WaitTimeout after ``timeout`` seconds."""
        return await self._client.wait(self.id, timeout=timeout)

    async def status(self) -> TaskStatus:
        """Its status now."""
        return await self._client.status(self.id)

    async def cancel(self) -> TaskStatus:
        """See ``AsyncClient.cancel``."""
        return await self._client.cancel(self.id)

    def logs(self, *, follow: bool = False) -> AsyncIterator[str]:
        """Its output, line by line."""
        return self._client.logs(self.id, follow=follow)

    def __repr__(self) -> str:
        return f"AsyncHandle({self.id!r})"


class AsyncClient:
    """The queue, for producers and for whoever wants to know how a task ended.

    Every verb may raise QueueUnavailable. All may be used by many coroutines at once.
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        *,
        stream: str = "dispatcher:tasks",
        state_url: str | None = None,
        max_connections: int = 32,
    ) -> None:
        """``stream`` is QUEUE_STREAM_NAME; ``state_url`` is STATE_REDIS_URL where that is set."""
        self._store = Store(url, stream, max_connections=max_connections)
        self._tails = Tails(state_url or url, stream, max_connections=max_connections)
        self._views = Views(self._store)
        self._results = Results(self._store, self._views)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._store.aclose()
        await self._tails.aclose()

    async def ping(self) -> None:
        """Raises QueueUnavailable unless Redis answers."""
        await self._store.ping()

    # --- verbs --------------------------------------------------------------------------

    async def submit(self, task: Task) -> AsyncHandle:
        """Hand a task in; when this returns it is accepted. The current trace goes with it.

        May be repeated without harm if the task has an ``id`` or ``idempotency_key``.
        Raises TaskConflict, QueueFull, UnknownQueue, InvalidTask.
        """
        return await self.submit_as(_submission(task))

    async def submit_many(self, tasks: Iterable[Task]) -> list[AsyncHandle | DispatcherError]:
        """Hand many tasks in, in few round trips; each has its own answer, in order."""
        return await self.submit_all([_submission(task) for task in tasks])

    async def submit_as(self, submission: Submission) -> AsyncHandle:
        """``submit`` for who has chosen id and trace."""
        return AsyncHandle(self, await self._store.enqueue(submission))

    async def submit_all(self, submissions: Sequence[Submission]) -> list[AsyncHandle | DispatcherError]:
        """``submit_many`` for who has chosen ids and traces."""
        answers: dict[int, AsyncHandle | DispatcherError] = {}
        limiter = anyio.CapacityLimiter(SUBMIT_WIDTH)

        async def one(index: int, submission: Submission) -> None:
            async with limiter:
                try:
                    answers[index] = await self.submit_as(submission)
                except DispatcherError as error:
                    answers[index] = error

        async with anyio.create_task_group() as group:
            for index, submission in enumerate(submissions):
                group.start_soon(one, index, submission)
        return [answers[index] for index in range(len(submissions))]

    def handle(self, task_id: str) -> AsyncHandle:
        """A handle for a task of known id; asks nothing."""
        return AsyncHandle(self, task_id)

    async def wait(self, task_id: str, *, timeout: float | None = None) -> TaskStatus:  # noqa: ASYNC109
        """A task's status once it has ended.

        Raises WaitTimeout after ``timeout`` seconds, TaskNotFound.
        """
        with anyio.move_on_after(timeout):
            return await self._results.wait(task_id)
        raise WaitTimeout(f"task {task_id} has not ended within {timeout:g} s")

    async def status(self, task_id: str) -> TaskStatus:
        """A task's status now. Raises TaskNotFound."""
        return await self._views.task(task_id)

    async def cancel(self, task_id: str) -> TaskStatus:
        """Cancel a task in whatever phase it is; its status right after.

        One that runs is stopped by its instance: wait for it to see its end. One that has
        ended stays as it ended. Raises TaskNotFound.
        """
        await self._store.cancel(task_id)
        return await self._views.task(task_id)

    async def logs(self, task_id: str, *, follow: bool = False) -> AsyncGenerator[str]:
        """A task's output as text, line by line without line ends; undecodable bytes replaced."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest = ""
        async with aclosing(self.output(task_id, follow=follow)) as pieces:
            async for piece in pieces:
                *lines, rest = (rest + decoder.decode(piece)).split("\n")
                for line in lines:
                    yield line
        rest += decoder.decode(b"", final=True)
        if rest:
            yield rest

    async def output(
        self, task_id: str, *, follow: bool = False, lines: int | None = None
    ) -> AsyncGenerator[bytes]:
        """A task's output as bytes, both streams in order; of a retried task the last attempt's.

        Without ``follow``: what there is now, as far as it is kept. With it: from the beginning
        of what is kept until the task has ended, each attempt in turn. ``lines``: of what there
        is now only the last so many. Raises TaskNotFound.
        """
        if not follow:
            tail = await self.tail(task_id)
            if tail is not None:
                yield tail.data if lines is None else tail.last(lines)
            return
        seen, attempt, cursor, quiet = 0, 0, "0-0", True
        if lines is not None and (now := await self.tail(task_id)):
            seen, attempt = now.total - len(now.last(lines)), now.attempt
        while not (status := await self._views.task(task_id)).state.terminal:
            if status.state is not State.RUNNING or not status.instance:
                await anyio.sleep(FOLLOW_PAUSE)
                continue
            await self._tails.show_interest(task_id)
            if quiet:  # nobody feeds us yet, or any more; one who does takes no harm
                await self._store.tell(status.instance, "follow", task_id)
            quiet = True
            async for piece in self._tails.live(task_id, cursor):
                quiet, cursor = False, piece.entry_id
                if piece.attempt != attempt:
                    seen, attempt = 0, piece.attempt
                yield piece.data[max(0, seen - piece.offset) :]
                seen = max(seen, piece.offset + len(piece.data))
        tail = await self._tails.get(task_id)
        if tail is not None:
            yield tail.data[max(0, (seen if tail.attempt == attempt else 0) - tail.dropped) :]

    async def tail(self, task_id: str) -> Tail | None:
        """The end of a task's output as it is now; None if there is none. Raises TaskNotFound."""
        status = await self._views.task(task_id)
        if status.state is State.RUNNING and status.instance:
            asked = new_task_id()
            await self._store.tell(status.instance, "tail", task_id, asked)
            with anyio.move_on_after(TAIL_TIMEOUT):
                while not (tail := await self._tails.get(task_id)) or tail.asked != asked:
                    if (await self._views.task(task_id)).state.terminal:
                        break
                    await anyio.sleep(TAIL_PAUSE)
        return await self._tails.get(task_id)

    # --- what is seen -------------------------------------------------------------------

    async def tasks(
        self, *, state: State | None = None, queue: str | None = None, limit: int = 100
    ) -> list[TaskStatus]:
        """The newest tasks first."""
        return await self._views.tasks(state=state, queue=queue, limit=limit)

    async def queues(self) -> list[QueueInfo]:
        """Depth, age and rate of every queue."""
        return await self._views.queues()

    async def pause(self, queue: str) -> None:
        """Let no instance take new tasks of this queue. Raises UnknownQueue."""
        await self._store.pause(queue, paused=True)

    async def resume(self, queue: str) -> None:
        """Take it back. Raises UnknownQueue."""
        await self._store.pause(queue, paused=False)

    async def instances(self) -> list[InstanceInfo]:
        """Who is alive."""
        return await self._views.instances()

    async def dead(self, *, limit: int = 100) -> list[DeadLetter]:
        """The newest dead letters first."""
        return await self._views.dead(limit=limit)


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
        submission = _submission(task)
        return Handle(self, self._call(lambda: self._client.submit_as(submission)).id)

    def submit_many(self, tasks: Iterable[Task]) -> list[Handle | DispatcherError]:
        """See ``AsyncClient.submit_many``."""
        waiting = [_submission(task) for task in tasks]
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

    def queues(self) -> list[QueueInfo]:
        """See ``AsyncClient.queues``."""
        return self._call(self._client.queues)

    def instances(self) -> list[InstanceInfo]:
        """See ``AsyncClient.instances``."""
        return self._call(self._client.instances)

    def dead(self, *, limit: int = 100) -> list[DeadLetter]:
        """See ``AsyncClient.dead``."""
        return self._call(lambda: self._client.dead(limit=limit))

    def _call(self, verb: Callable[[], Awaitable[T]]) -> T:
        async def run() -> T:
            return await verb()

        return self._portal.call(run)


def _submission(task: Task) -> Submission:
    """The task with the trace that is current here."""
    carrier: dict[str, str] = {}
    _TRACE_CONTEXT.inject(carrier)
    return Submission.of(
        task, traceparent=carrier.get("traceparent", ""), tracestate=carrier.get("tracestate", "")
    )
