"""A cancellation finds its task in whatever phase it is."""

from __future__ import annotations

import pytest

from dispatcher.errors import TaskNotFound
from dispatcher.queue.store import CONTROL_LENGTH
from tests.queue.conftest import FAILURE, QueueUnderTest

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def cancelled_at_once(queue: QueueUnderTest, task_id: str) -> None:
    assert await queue.store.cancel(task_id) == ("cancelled", "cancelled")
    assert queue.record(task_id)["state"] == "cancelled"
    (result,) = queue.entries("results")
    assert (result["id"].decode(), result["state"]) == (task_id, b"cancelled")
    assert result["started_at"] == b""
    assert queue.entries("dead") == []
    assert queue.lifetime_ms(f"task:{task_id}") > 0
    assert await queue.store.cancel(task_id) == ("ended", "cancelled")
    assert len(queue.entries("results")) == 1
    queue.fall_due()
    await queue.tick()
    assert await queue.take() == []


async def test_a_waiting_task(queue: QueueUnderTest) -> None:
    task_id = await queue.submit(queue="high")
    await cancelled_at_once(queue, task_id)
    assert queue.length("high") == 0


@pytest.mark.source("redis-stream")
async def test_a_plain_entry_that_nobody_has_taken(queue: QueueUnderTest) -> None:
    task_id = queue.xadd({"task": '{"image": "busybox"}', "traceparent": TRACE}, "low")
    await cancelled_at_once(queue, task_id)
    assert queue.length("low") == 0
    (result,) = queue.entries("results")
    assert (result["queue"], result["traceparent"]) == (b"low", TRACE.encode())


async def test_a_scheduled_task(queue: QueueUnderTest) -> None:
    await cancelled_at_once(queue, await queue.submit(delay=60.0))
    assert queue.due() == {}


async def test_a_task_between_two_attempts(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    await queue.finish(await queue.take_one(), "retry", FAILURE, delay=60, budget="app")
    await cancelled_at_once(queue, task_id)


async def test_a_task_that_came_back(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    await queue.finish(await queue.take_one(), "release")
    await cancelled_at_once(queue, task_id)


async def test_a_task_in_somebodys_hands_is_asked_of_them(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    delivery = await queue.take_one("host-1.x")
    await queue.renew(delivery, state="running")
    assert await queue.store.cancel(task_id) == ("requested", "running")
    ((_, message),) = queue.redis.xrange(queue.key("control:host-1.x"))
    assert message == {b"op": b"cancel", b"id": task_id.encode(), b"asked": delivery.owner.encode()}
    assert queue.lifetime_ms("control:host-1.x") > 0
    assert await queue.renew(delivery) == "cancel"
    assert queue.entries("results") == []


async def test_what_an_owner_is_told_is_not_meant_for_the_next(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    first = await queue.take_one("b")
    await queue.renew(first, state="running", daemon="engine-1")
    await queue.store.cancel(task_id)
    queue.lapse(first)
    await queue.tick()
    second = await queue.take_one("b")
    await queue.store.cancel(task_id)
    told = [message["asked"].decode() for message in queue.entries("control:b")]
    assert told == [first.owner, second.owner]
    assert first.owner != second.owner


async def test_a_cancellation_outlives_its_owner(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.store.cancel(delivery.task_id)
    queue.lapse(delivery)
    await queue.tick("b")
    assert (await queue.take_one("b")).cancelled


async def test_what_has_no_container_is_cancelled_by_its_owners_death(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.store.cancel(delivery.task_id)
    queue.lapse(delivery)
    await queue.tick("b")
    assert [entry["state"] for entry in queue.entries("results")] == [b"cancelled"]
    assert await queue.take() == []


async def test_a_task_whose_container_waits_for_its_daemon(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.finish(delivery, "detach")
    assert await queue.store.cancel(delivery.task_id) == ("requested", "running")
    assert (await queue.take_one(daemon="engine-1")).cancelled


async def test_a_task_that_ended_stays_as_it_ended(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    await queue.finish(await queue.take_one())
    assert await queue.store.cancel(task_id) == ("ended", "succeeded")
    assert queue.record(task_id)["state"] == "succeeded"


async def test_a_plain_entry_whose_id_leads_to_another(queue: QueueUnderTest) -> None:
    from dispatcher.task import Task

    await queue.submit(id="mine")
    await queue.take_one("b")
    queue.push('{"image": "busybox"}')
    twin = await queue.take_one()
    await queue.store.place(twin, Task(image="busybox", id="mine"))
    assert (await queue.store.cancel(twin.task_id))[0] == "requested"
    assert queue.record("mine")["cancel"] == "1"


@pytest.mark.parametrize(
    "task_id",
    [
        "nobody",
        "",
        "default.1-1",
        "nowhere.1-1",
        "default.99999999999999999999999999-1",
        "default.1-99999999999999999999999999",
        "meta.1-1",
        "x" * 1000,
        "\x00{}",
    ],
)
async def test_an_unknown_task_is_told_and_nothing_is_made(queue: QueueUnderTest, task_id: str) -> None:
    before = set(queue.redis.keys("*"))
    with pytest.raises(TaskNotFound):
        await queue.store.cancel(task_id)
    assert set(queue.redis.keys("*")) == before


async def test_the_entry_of_a_clients_task_is_no_task(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    entry = queue.record(task_id)["entry"]
    with pytest.raises(TaskNotFound):
        await queue.store.cancel(f"default.{entry}")
    assert [d.task_id for d in await queue.take()] == [task_id]


@pytest.mark.parametrize("name", ["results", "dead"])
async def test_entries_of_other_streams_are_no_tasks(queue: QueueUnderTest, name: str) -> None:
    entry = queue.redis.xadd(queue.key(name), {"id": "x", "task": "y"})
    with pytest.raises(TaskNotFound):
        await queue.store.cancel(f"{name}.{entry.decode()}")
    assert len(queue.entries(name)) == 1


@pytest.mark.source("redis-stream")
async def test_out_of_memory_that_of_a_plain_entry_goes_through(queue: QueueUnderTest) -> None:
    task_id = queue.xadd('{"image": "busybox"}')
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    assert (await queue.store.cancel(task_id))[0] == "cancelled"


@pytest.mark.parametrize("phase", ["client", "scheduled", "ready", "held"])
async def test_out_of_memory_it_goes_through(queue: QueueUnderTest, phase: str) -> None:
    task_id = await queue.submit()
    if phase in {"scheduled", "ready", "held"}:
        delivery = await queue.take_one()
        if phase != "held":
            await queue.finish(delivery, "release", delay=60 if phase == "scheduled" else 0)
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    expected = "requested" if phase == "held" else "cancelled"
    assert (await queue.store.cancel(task_id))[0] == expected


async def test_what_an_instance_is_told_is_bounded(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    await queue.take_one("b")
    for _ in range(CONTROL_LENGTH + 200):
        await queue.store.cancel(task_id)
    assert int(queue.ask("XLEN", queue.key("control:b"))) <= CONTROL_LENGTH + 100
