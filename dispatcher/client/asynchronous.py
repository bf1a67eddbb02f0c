"""The client for programs with an event loop."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Self

import anyio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dispatcher.errors import DispatcherError, QueueUnavailable, WaitTimeout
from dispatcher.model import State
from dispatcher.queue.connection import RECONNECT_SECONDS, Patience
from dispatcher.queue.dead import DeadLetter, DeadLetters
from dispatcher.queue.exchange import Submission, new_task_id
from dispatcher.queue.results import Results
from dispatcher.queue.store import Store
from dispatcher.queue.tails import Tail, Tails
from dispatcher.queue.views import InstanceInfo, QueueInfo, TaskStatus, Views
from dispatcher.task import Task

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
        self._dead = DeadLetters(self._store)

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
        return await self.submit_as(traced(task))

    async def submit_many(self, tasks: Iterable[Task]) -> list[AsyncHandle | DispatcherError]:
        """Hand many tasks in, in few round trips; each has its own answer, in order."""
        return await self.submit_all([traced(task) for task in tasks])

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
        self,
        task_id: str,
        *,
        follow: bool = False,
        lines: int | None = None,
        on_gap: Callable[[int], None] = lambda _: None,
    ) -> AsyncGenerator[bytes]:
        """A task's output as bytes, both streams in order; of a retried task the last attempt's.

        Without ``follow``: what there is now, as far as it is kept. With it: from the beginning
        of what is kept until the task has ended, each attempt in turn, bearing Redis' absence for
        RECONNECT_SECONDS. ``lines``: of what there is now only the last so many. ``on_gap`` is
        told how many bytes are missing where some are. Raises TaskNotFound.
        """
        if not follow:
            tail = await self.tail(task_id)
            if tail is not None:
                if tail.dropped and lines is None:
                    on_gap(tail.dropped)
                yield tail.data if lines is None else tail.last(lines)
            return
        seen, attempt, cursor, quiet = 0, 0, "0-0", True
        if lines is not None and (now := await self.tail(task_id)):
            seen, attempt = now.total - len(now.last(lines)), now.attempt
        patience = Patience(RECONNECT_SECONDS)
        while True:
            try:
                status = await self._views.task(task_id)
                patience.answered()
                if status.state.terminal:
                    break
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
                    if piece.offset > seen:
                        on_gap(piece.offset - seen)
                    yield piece.data[max(0, seen - piece.offset) :]
                    seen = max(seen, piece.offset + len(piece.data))
            except QueueUnavailable as error:
                await patience.bear(error)
        tail = await self._tails.get(task_id)
        if tail is not None:
            seen = seen if tail.attempt == attempt else 0
            if tail.dropped > seen:
                on_gap(tail.dropped - seen)
            yield tail.data[max(0, seen - tail.dropped) :]

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
        return await self._dead.newest(limit)

    async def dead_ids(self) -> list[str]:
        """The ids of all dead letters' own, the oldest first."""
        return await self._dead.entry_ids()

    async def retry_dead(self, ids: Sequence[str]) -> list[AsyncHandle | DispatcherError]:
        """Make dead letters new tasks, named by their tasks' ids or their own; each has its own
        answer, in order, and the same when asked again. See ``DeadLetters.retry``.

        ``id``, ``idempotency_key``, ``delay`` and ``not_before`` of the original do not hold for
        the new task; its status has the original's id in ``retry_of``.
        """
        answers = await self._dead.retry(ids)
        return [AsyncHandle(self, a) if isinstance(a, str) else a for a in answers]

    async def drop_dead(self, ids: Sequence[str]) -> list[bool]:
        """Forget dead letters for good; whether each was there, in order."""
        return await self._dead.drop(ids)


def traced(task: Task) -> Submission:
    """The task as a submission with the trace that is current here."""
    carrier: dict[str, str] = {}
    _TRACE_CONTEXT.inject(carrier)
    return Submission.of(
        task, traceparent=carrier.get("traceparent", ""), tracestate=carrier.get("tracestate", "")
    )
