"""What becomes of a task that a client hands in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import anyio
import pytest

from dispatcher.errors import InvalidTask, QueueFull, QueueUnavailable, TaskConflict, UnknownQueue
from dispatcher.queue.exchange import Limits, Submission
from dispatcher.queue.store import Keys
from dispatcher.task import Task
from tests.queue.conftest import FAILURE, STREAM, QueueUnderTest


async def test_a_new_task_waits_in_its_stream_by_reference(queue: QueueUnderTest) -> None:
    before = queue.now_ms()
    task_id = await queue.submit(command=["true"])
    record = queue.record(task_id)
    assert record["state"] == "queued"
    if queue.source == "redis-stream":
        assert queue.redis.xrange(STREAM) == [(record["entry"].encode(), {b"ref": task_id.encode()})]
    else:
        assert queue.redis.lrange(STREAM, 0, -1) == [f"\1{record['entry']} {task_id}".encode()]
    assert before <= int(record["accepted"]) <= queue.now_ms()
    assert queue.members("index:open").keys() == {task_id}
    assert queue.lifetime_ms(f"task:{task_id}") == -1


async def test_a_further_queue_has_a_stream_of_its_own_in_the_same_slot(queue: QueueUnderTest) -> None:
    await queue.submit(queue="high")
    assert (queue.length("high"), queue.length()) == (1, 0)
    assert Keys(STREAM).queue("high") == "{dispatcher:tasks}:high"


async def test_the_same_id_and_content_is_the_same_task(queue: QueueUnderTest) -> None:
    assert await queue.submit(id="one") == await queue.submit(id="one") == "one"
    assert queue.length() == 1


async def test_the_same_id_with_other_content_is_refused(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    with pytest.raises(TaskConflict, match="one"):
        await queue.submit(id="one", command=["false"])
    assert queue.length() == 1
    assert '"command"' not in queue.record("one")["doc"]


async def test_the_same_key_and_content_is_the_same_task(queue: QueueUnderTest) -> None:
    first = await queue.submit(idempotency_key="nightly 1/2 {x}")
    assert await queue.submit(idempotency_key="nightly 1/2 {x}") == first
    assert queue.length() == 1


async def test_the_same_key_with_other_content_is_refused(queue: QueueUnderTest) -> None:
    first = await queue.submit(idempotency_key="k")
    with pytest.raises(TaskConflict, match=first):
        await queue.submit(idempotency_key="k", command=["false"])
    assert queue.length() == 1


async def test_a_key_is_remembered_without_limit_while_its_task_is_open(queue: QueueUnderTest) -> None:
    await queue.submit(idempotency_key="k")
    (name,) = (key.decode() for key in queue.redis.keys(queue.key("key:*")))
    assert queue.redis.pttl(name) == -1
    delivery = await queue.take_one()
    assert queue.redis.pttl(name) == -1
    await queue.finish(delivery, "retry", FAILURE, delay=60, budget="app")
    assert queue.redis.pttl(name) == -1


async def test_a_key_and_an_id_are_remembered_for_the_retention_after_the_end(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(retention=1000.0))
    await queue.submit(id="one", idempotency_key="k")
    await queue.finish(await queue.take_one())
    (name,) = (key.decode() for key in queue.redis.keys(queue.key("key:*")))
    assert 990_000 < int(queue.ask("PTTL", name)) <= 1_000_000
    assert 990_000 < queue.lifetime_ms("task:one") <= 1_000_000
    assert await queue.submit(id="one", idempotency_key="k") == "one"
    assert await queue.submit(id="two", idempotency_key="k") == "one"
    assert queue.length() == 0


async def test_a_key_whose_task_is_forgotten_is_free_again(queue: QueueUnderTest) -> None:
    await queue.submit(id="one", idempotency_key="k")
    await queue.finish(await queue.take_one())
    queue.redis.delete(queue.key("task:one"))  # its time has come
    assert await queue.submit(id="two", idempotency_key="k") == "two"
    assert queue.length() == 1


async def test_a_full_queue_refuses_and_trims_nothing(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(max_length=2))
    await queue.submit(id="one")
    await queue.submit(id="two")
    with pytest.raises(QueueFull, match=r"QUEUE_MAX_LENGTH") as refusal:
        await queue.submit(id="three")
    assert refusal.value.recoverable
    assert queue.length() == 2
    assert queue.record("three") == {}
    assert await queue.submit(id="one") == "one", "what stands already is told, full or not"


async def test_scheduled_tasks_count_as_waiting(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(max_length=1))
    await queue.submit(delay=60.0)
    with pytest.raises(QueueFull):
        await queue.submit()


async def test_tasks_that_came_back_count_as_waiting(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(max_length=1))
    await queue.submit()
    await queue.finish(await queue.take_one(), "release")
    with pytest.raises(QueueFull):
        await queue.submit()
    await queue.take_one()
    assert await queue.submit(), "what is in somebody's hands does not wait"


@pytest.mark.parametrize("delay", [None, 60.0])
async def test_what_waits_in_one_queue_closes_no_other(queue: QueueUnderTest, delay: float | None) -> None:
    await queue.tick(limits=Limits(max_length=1))
    await queue.submit(queue="low", delay=delay)
    with pytest.raises(QueueFull, match="low"):
        await queue.submit(queue="low")
    assert await queue.submit(queue="high")


async def test_nothing_is_due_after_the_end_of_year_9999(queue: QueueUnderTest) -> None:
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    await queue.submit(id="last", not_before=last)
    beyond = last.replace(tzinfo=timezone(timedelta(hours=-14)))
    await queue.submit(id="beyond", not_before=beyond)
    assert queue.record("last")["due"] == queue.record("beyond")["due"] == str(round(last.timestamp()) * 1000)
    assert (await queue.tick()).next_due_ms == round(last.timestamp()) * 1000


async def test_a_document_that_is_too_large_is_refused(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(max_bytes=300))
    await queue.submit(id="fits", command=["x" * 250])
    with pytest.raises(InvalidTask, match="300 bytes"):
        await queue.submit(id="large", command=["x" * 300])
    with pytest.raises(InvalidTask, match="300 bytes"):
        await queue.submit(id="large-in-bytes", command=["é" * 150])
    assert queue.length() == 1


async def test_a_queue_that_nobody_serves_is_refused_with_those_there_are(queue: QueueUnderTest) -> None:
    with pytest.raises(UnknownQueue, match=r"nowhere.*default, high, low"):
        await queue.submit(queue="nowhere")
    assert not queue.redis.exists(queue.key("nowhere"))


async def test_queue_default_is_there_before_any_instance_is(queue: QueueUnderTest) -> None:
    queue.redis.flushall()
    task_id = await queue.submit()
    with pytest.raises(UnknownQueue):
        await queue.submit(queue="high")
    await queue.tick()
    assert [d.task_id for d in await queue.take()] == [task_id]


async def test_a_delayed_task_is_scheduled(queue: QueueUnderTest) -> None:
    task_id = await queue.submit(delay=1.5)
    record = queue.record(task_id)
    assert record["state"] == "scheduled"
    assert int(record["due"]) == int(record["accepted"]) + 1500
    assert queue.due("default") == {task_id: float(record["due"])}
    assert queue.length() == 0


async def test_not_before_in_the_future_schedules_and_in_the_past_does_not(queue: QueueUnderTest) -> None:
    then = datetime.now(UTC) + timedelta(hours=1)
    later = await queue.submit(not_before=then)
    now = await queue.submit(not_before=datetime(1970, 1, 1, tzinfo=UTC))
    assert queue.record(later)["due"] == str(round(then.timestamp() * 1000))
    assert queue.record(now)["state"] == "queued"


async def test_the_trace_of_the_producer_goes_with_the_task(queue: QueueUnderTest) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await queue.store.enqueue(Submission.of(Task(image="busybox"), traceparent=trace, tracestate="a=b"))
    delivery = await queue.take_one()
    assert (delivery.traceparent, delivery.tracestate) == (trace, "a=b")


async def test_many_at_once_are_each_answered(queue: QueueUnderTest) -> None:
    answers: dict[int, str] = {}

    async def one(number: int, command: list[str] | None) -> None:
        try:
            answers[number] = await queue.submit(id=f"id-{number % 100}", command=command)
        except TaskConflict:
            answers[number] = "conflict"

    async with anyio.create_task_group() as group:
        for number in range(300):
            group.start_soon(one, number, ["false"] if number >= 200 else None)
    assert answers == {n: f"id-{n % 100}" if n < 200 else "conflict" for n in range(300)}
    assert queue.length() == 100


async def test_out_of_memory_a_submission_is_refused_and_leaves_nothing(queue: QueueUnderTest) -> None:
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    keys = set(queue.redis.keys("*"))
    with pytest.raises(QueueUnavailable, match="out of memory"):
        await queue.submit(id="one", idempotency_key="k")
    assert set(queue.redis.keys("*")) == keys
    queue.ask("CONFIG", "SET", "maxmemory", "0")
    assert await queue.submit(id="one", idempotency_key="k") == "one"


async def test_scripts_that_redis_forgot_are_sent_again(queue: QueueUnderTest) -> None:
    await queue.submit()
    queue.redis.script_flush()
    await queue.submit()
    queue.redis.script_flush()
    assert len(await queue.take()) == 2
    queue.redis.script_flush()
    await queue.tick()


async def test_every_key_lies_in_one_slot(queue: QueueUnderTest) -> None:
    queue.push('{"image": "busybox"}', queue="high")
    queue.push("nonsense")
    await queue.submit(idempotency_key="k", delay=60.0)
    taken = await queue.take()
    await queue.store.cancel(taken[0].task_id)
    await queue.store.pause("low", paused=True)
    await queue.renew(taken[1], daemon="engine-1")
    await queue.finish(taken[1], "detach")
    queue.redis.delete(queue.key("meta:paused"))
    queue.check_slots()
