"""What other services import, against a worker that takes and finishes."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from opentelemetry import trace

from dispatcher.client import AsyncClient, AsyncHandle, Client, Handle
from dispatcher.errors import (
    QueueUnavailable,
    TaskConflict,
    TaskNotFound,
    UnknownQueue,
    WaitTimeout,
)
from dispatcher.model import Delivery, State
from dispatcher.queue.exchange import Settlement, SourceKind
from dispatcher.queue.store import Store
from dispatcher.queue.tails import Tail, Tails
from dispatcher.task import Task
from tests.queue.conftest import FAILURE, LEASE, LIMITS, POISONED, STREAM, SUCCESS, WEIGHTS, QueueUnderTest
from tests.support.redis_server import RedisUnderTest
from tests.support.waiting import INTERVAL, wait_until

BUSYBOX = Task(image="busybox", command=["true"])


class Worker:
    """Ends what it takes: ``false`` fails, ``junk`` is refused, all else succeeds; with its output."""

    def __init__(self, url: str, source: SourceKind = "redis-stream") -> None:
        self.source: SourceKind = source
        self.store = Store(url, STREAM)
        self.tails = Tails(url, STREAM)
        self.seen: list[Delivery] = []

    async def run(self, on_joined: Callable[[], None] = lambda: None) -> None:
        await self.store.tick(
            instance="w",
            incarnation="1",
            info="{}",
            lease=LEASE,
            namespace="n",
            source=self.source,
            daemon="e",
            limits=LIMITS,
            queues=WEIGHTS,
        )
        on_joined()
        try:
            while True:
                taken = await self.store.take(
                    10, instance="w", incarnation="1", lease=LEASE, queues=WEIGHTS, daemon="e"
                )
                for delivery in taken:
                    await self._end(delivery)
                await anyio.sleep(0 if taken else INTERVAL)
        finally:
            with anyio.CancelScope(shield=True):
                await self.store.aclose()
                await self.tails.aclose()

    async def _end(self, delivery: Delivery) -> None:
        self.seen.append(delivery)
        data = f"output of {delivery.task_id}\nlast line".encode() + b" \xff"
        await self.tails.keep(delivery.task_id, Tail(data, len(data), delivery.attempt))
        outcome = SUCCESS
        if b"false" in delivery.document:
            outcome = FAILURE
        elif b"junk" in delivery.document:
            outcome = POISONED
        await self.store.finish(Settlement(delivery.task_id, delivery.owner, "final", outcome))


@asynccontextmanager
async def working(queue: QueueUnderTest) -> AsyncIterator[Worker]:
    worker = Worker(queue.server.url, queue.source)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        try:
            yield worker
        finally:
            group.cancel_scope.cancel()


@pytest.fixture
async def client(queue: QueueUnderTest) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(queue.server.url, stream=STREAM) as client:
        yield client


async def test_a_task_is_submitted_and_waited_for(queue: QueueUnderTest, client: AsyncClient) -> None:
    async with working(queue):
        handle = await client.submit(BUSYBOX)
        result = await handle.wait(timeout=10)
        assert (result.id, result.state, result.exit_code) == (handle.id, State.SUCCEEDED, 0)
        failed = await (await client.submit(Task(image="busybox", command=["false"]))).wait(timeout=10)
        assert (failed.state, failed.reason, failed.exit_code) == (State.FAILED, "exit", 3)
        assert await handle.status() == result


async def test_many_are_submitted_together_and_answered_each_in_order(
    queue: QueueUnderTest, client: AsyncClient
) -> None:
    tasks = [Task(image="busybox", id=f"t{n}") for n in range(250)]
    tasks[7] = Task(image="busybox", id="t6", command=["other"])
    tasks[8] = Task(image="busybox", queue="nowhere")
    answers = await client.submit_many(tasks)
    assert isinstance(answers[7], TaskConflict)
    assert isinstance(answers[8], UnknownQueue)
    handles = [answer for answer in answers if isinstance(answer, AsyncHandle)]
    assert [h.id for h in handles] == [f"t{n}" for n in range(250) if n not in {7, 8}]
    async with working(queue), anyio.create_task_group() as group:
        for handle in handles:
            group.start_soon(handle.wait, 20)


async def test_the_same_key_is_the_same_task(client: AsyncClient) -> None:
    task = Task(image="busybox", idempotency_key="k")
    assert (await client.submit(task)).id == (await client.submit(task)).id
    with pytest.raises(TaskConflict):
        await client.submit(Task(image="alpine", idempotency_key="k"))


async def test_waiting_has_an_end(client: AsyncClient) -> None:
    handle = await client.submit(BUSYBOX)
    with pytest.raises(WaitTimeout, match=r"0\.05 s"):
        await handle.wait(timeout=0.05)
    with pytest.raises(TaskNotFound):
        await client.wait("nobody", timeout=5)


async def test_a_waiting_task_is_cancelled(client: AsyncClient) -> None:
    handle = await client.submit(BUSYBOX)
    assert (await handle.cancel()).state is State.CANCELLED
    assert (await handle.wait(timeout=5)).state is State.CANCELLED
    with pytest.raises(TaskNotFound):
        await client.cancel("nobody")


async def test_the_current_trace_goes_with_the_task(queue: QueueUnderTest, client: AsyncClient) -> None:
    context = trace.SpanContext(
        trace_id=0x0AF7651916CD43DD8448EB211C80319C,
        span_id=0xB7AD6B7169203331,
        is_remote=False,
        trace_flags=trace.TraceFlags(1),
        trace_state=trace.TraceState([("vendor", "x")]),
    )
    with trace.use_span(trace.NonRecordingSpan(context)):
        await client.submit(BUSYBOX)
    delivery = await queue.take_one()
    assert delivery.traceparent == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert delivery.tracestate == "vendor=x"


async def test_no_trace_is_no_trace(queue: QueueUnderTest, client: AsyncClient) -> None:
    await client.submit(BUSYBOX)
    assert (await queue.take_one()).traceparent == ""


async def test_the_output_of_an_ended_task_is_read_line_by_line(
    queue: QueueUnderTest, client: AsyncClient
) -> None:
    async with working(queue):
        handle = await client.submit(BUSYBOX)
        await handle.wait(timeout=10)
    for follow in (False, True):
        lines = [line async for line in handle.logs(follow=follow)]
        assert lines == [f"output of {handle.id}", "last line \N{REPLACEMENT CHARACTER}"]


async def test_output_is_followed_from_piece_to_piece_to_its_end(
    queue: QueueUnderTest, client: AsyncClient
) -> None:
    handle = await client.submit(BUSYBOX)
    delivery = await queue.take_one("w")
    await queue.renew(delivery, state="running")
    tails = Tails(queue.server.url, STREAM)
    lines: list[str] = []

    async def follow() -> None:
        lines.extend([line async for line in handle.logs(follow=True)])

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            await wait_until(lambda: queue.redis.xlen(queue.key("control:w")))
            assert await tails.wanted(handle.id)
            await tails.publish(handle.id, 1, 0, b"first\nsec")
            await tails.publish(handle.id, 1, 6, b"second\n")
            whole = b"first\nsecond\nthird\n"
            await tails.keep(handle.id, Tail(whole, len(whole), 1))
            await queue.finish(delivery)
    await tails.aclose()
    assert lines == ["first", "second", "third"]


async def test_a_running_tasks_instance_is_asked_for_its_output(
    queue: QueueUnderTest, client: AsyncClient
) -> None:
    handle = await client.submit(BUSYBOX)
    await queue.renew(await queue.take_one("w"), state="running")
    tails = Tails(queue.server.url, STREAM)
    tail: list[Tail | None] = []

    async def ask() -> None:
        tail.append(await client.tail(handle.id))

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await wait_until(lambda: queue.redis.xlen(queue.key("control:w")))
            ((_, message),) = queue.redis.xrange(queue.key("control:w"))
            assert (message[b"op"], message[b"id"]) == (b"tail", handle.id.encode())
            await tails.keep(handle.id, Tail(b"so far", 6, 1, message[b"asked"].decode()))
    await tails.aclose()
    assert tail[0] is not None
    assert tail[0].data == b"so far"


async def test_what_is_seen_goes_through(queue: QueueUnderTest, client: AsyncClient) -> None:
    async with working(queue):
        dead = await client.submit(Task(image="busybox", command=["junk"]))
        await dead.wait(timeout=10)
        assert [instance.id for instance in await client.instances()] == ["a", "w"]
    await client.pause("default")
    assert {info.name: info.paused for info in await client.queues()}["default"]
    await client.resume("default")
    assert not {info.name: info.paused for info in await client.queues()}["default"]
    assert [task.id for task in await client.tasks(state=State.FAILED)] == [dead.id]
    assert [letter.id for letter in await client.dead()] == [dead.id]


async def test_many_coroutines_use_one_client(client: AsyncClient) -> None:
    handle = await client.submit(BUSYBOX)
    async with anyio.create_task_group() as group:
        for _ in range(300):
            group.start_soon(handle.status)


async def test_no_redis_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    nowhere = tmp_path_factory.mktemp("nowhere") / "redis.sock"
    async with AsyncClient(f"unix://{nowhere}", stream=STREAM) as client:
        calls: list[Callable[[], Awaitable[object]]] = [
            client.ping,
            lambda: client.submit(BUSYBOX),
            lambda: client.status("one"),
            lambda: client.cancel("one"),
        ]
        for call in calls:
            with pytest.raises(QueueUnavailable):
                await call()


# --- without an event loop --------------------------------------------------------------


@contextmanager
def working_in_a_thread(url: str) -> Iterator[None]:
    joined = threading.Event()
    with start_blocking_portal() as portal:
        future = portal.start_task_soon(lambda: Worker(url).run(joined.set))
        try:
            assert joined.wait(10)
            yield
        finally:
            future.cancel()


def test_the_same_verbs_without_await(redis_server: RedisUnderTest) -> None:
    with working_in_a_thread(redis_server.url), Client(redis_server.url, stream=STREAM) as client:
        client.ping()
        handle = client.submit(BUSYBOX)
        result = handle.wait(timeout=10)
        assert (result.id, result.state) == (handle.id, State.SUCCEEDED)
        assert handle.status() == result
        assert next(iter(handle.logs())) == f"output of {handle.id}"
        answers = client.submit_many([BUSYBOX, Task(image="busybox", queue="nowhere")])
        assert isinstance(answers[0], Handle)
        assert isinstance(answers[1], UnknownQueue)
        assert client.wait(answers[0].id, timeout=10).state is State.SUCCEEDED
        with pytest.raises(TaskNotFound):
            client.cancel("nobody")
        assert {task.id for task in client.tasks()} == {handle.id, answers[0].id}
        assert [instance.id for instance in client.instances()] == ["w"]
        assert {info.name for info in client.queues()} == set(WEIGHTS)
        assert client.dead() == []


def test_output_that_is_not_read_to_its_end_leaves_nothing_open(redis_server: RedisUnderTest) -> None:
    with working_in_a_thread(redis_server.url), Client(redis_server.url, stream=STREAM) as client:
        handle = client.submit(BUSYBOX)
        handle.wait(timeout=10)
        lines = handle.logs()
        assert isinstance(lines, Generator)
        assert next(lines)
        lines.close()


def test_the_trace_of_the_calling_thread_goes_with_the_task(redis_server: RedisUnderTest) -> None:
    context = trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(1))
    with Client(redis_server.url, stream=STREAM) as client, redis_server.client() as redis:
        with trace.use_span(trace.NonRecordingSpan(context)):
            handle = client.submit(BUSYBOX)
        sent = redis.hget(f"{{{STREAM}}}:task:{handle.id}", "traceparent")
        assert sent == b"00-00000000000000000000000000000001-0000000000000002-01"
