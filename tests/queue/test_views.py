"""What can be seen from outside, whatever lies in the queue."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from dispatcher.errors import QueueRefused, TaskNotFound, UnknownQueue
from dispatcher.model import Reason, State
from dispatcher.queue.views import TaskStatus, Views
from tests.queue.conftest import FAILURE, POISONED, SUCCESS, QueueUnderTest


@pytest.fixture
def views(queue: QueueUnderTest) -> Views:
    return Views(queue.store)


async def test_a_task_is_seen_in_every_phase(queue: QueueUnderTest, views: Views) -> None:
    await queue.submit(id="one", delay=60.0)
    status = await views.task("one")
    assert (status.state, status.attempt, status.instance) == (State.SCHEDULED, 1, "")
    assert status.accepted_at
    assert status.not_before == status.accepted_at + timedelta(seconds=60)
    queue.fall_due()
    await queue.tick()
    status = await views.task("one")
    assert (status.state, status.not_before) == (State.QUEUED, None)
    delivery = await queue.take_one("host-1")
    assert (await views.task("one")).instance == "host-1"
    await queue.renew(delivery, state="running", daemon="engine-1", container="c1")
    status = await views.task("one")
    assert (status.state, status.daemon, status.container_id) == (State.RUNNING, "engine-1", "c1")
    await queue.finish(delivery, "retry", FAILURE, delay=60, budget="app")
    status = await views.task("one")
    assert (status.state, status.attempt, status.exit_code) == (State.SCHEDULED, 2, 3)
    assert (status.reason, status.message, status.finished_at) == (Reason.EXIT, "exit code 3", None)
    queue.fall_due()
    await queue.tick()
    delivery = await queue.take_one()
    await queue.store.cancel("one")
    assert (await views.task("one")).cancel_requested
    await queue.finish(delivery, "final", SUCCESS)
    status = await views.task("one")
    assert (status.state, status.reason, status.exit_code) == (State.SUCCEEDED, None, 0)
    assert status.started_at == datetime.fromtimestamp(1_700_000_000.25, UTC)
    assert status.finished_at == datetime.fromtimestamp(1_700_000_001.5, UTC)


@pytest.mark.source("redis-stream")
async def test_a_plain_entry_is_seen_before_anybody_took_it(queue: QueueUnderTest, views: Views) -> None:
    task_id = queue.xadd("junk", "high")
    status = await views.task(task_id)
    assert (status.id, status.state, status.queue) == (task_id, State.QUEUED, "high")
    assert status in await views.tasks()


@pytest.mark.source("redis-stream")
async def test_a_plain_entry_that_is_taken_between_two_looks_is_seen(
    queue: QueueUnderTest, views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = queue.xadd('{"image": "busybox"}')
    look = views._waiting_entry

    async def late(name: str) -> TaskStatus | None:
        await queue.take_one("host-1")
        return await look(name)

    monkeypatch.setattr(views, "_waiting_entry", late)
    assert (await views.task(task_id)).instance == "host-1"


@pytest.mark.parametrize(
    "task_id",
    ["nobody", "", "default.1-1", "default.99999999999999999999999-1", "default.1-99999999999999999999999"],
)
async def test_an_unknown_task_is_told(views: Views, task_id: str) -> None:
    with pytest.raises(TaskNotFound):
        await views.task(task_id)


async def test_entries_that_are_no_tasks_are_not_shown_as_tasks(queue: QueueUnderTest, views: Views) -> None:
    entry = queue.record(await queue.submit())["entry"]
    dead = queue.redis.xadd(queue.key("dead"), {"id": "x"})
    for task_id in (f"default.{entry}", f"dead.{dead.decode()}"):
        with pytest.raises(TaskNotFound):
            await views.task(task_id)


@pytest.mark.source("redis-stream")
async def test_times_beyond_any_calendar_break_nothing(queue: QueueUnderTest, views: Views) -> None:
    end = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone(timedelta(hours=-14)))
    await queue.submit(id="later", not_before=end)
    queue.ask("XADD", queue.stream("low"), f"{2**63}-1", "task", '{"image":"busybox"}')
    assert (await views.task("later")).not_before
    assert (await views.task(f"low.{2**63}-1")).state is State.QUEUED
    assert len(await views.tasks()) == 2
    await views.queues()
    await queue.take()
    assert len(await views.tasks()) == 2


async def test_listings_can_be_narrowed(queue: QueueUnderTest, views: Views) -> None:
    await queue.submit(id="done", queue="high")
    await queue.finish(await queue.take_one(), "final", SUCCESS)
    await queue.submit(id="failed")
    await queue.finish(await queue.take_one(), "final", POISONED)
    await queue.submit(id="runs", queue="low")
    await queue.renew(await queue.take_one(), state="running")
    await queue.submit(id="waits")
    if queue.source == "redis-stream":
        plain = {queue.xadd("junk")}
    else:
        plain = set()  # it has no id before it is taken
        queue.push("junk")
    await queue.submit(id="later", delay=60.0)

    async def seen(state: State | None = None, name: str | None = None, limit: int = 100) -> set[str]:
        return {status.id for status in await views.tasks(state=state, queue=name, limit=limit)}

    assert await seen() == {"done", "failed", "runs", "waits", *plain, "later"}
    assert await seen(State.QUEUED) == {"waits", *plain}
    assert await seen(State.RUNNING) == {"runs"}
    assert await seen(State.FAILED) == {"failed"}
    assert await seen(name="high") == {"done"}
    assert await seen(State.SCHEDULED, "default") == {"later"}
    assert await seen(State.SUCCEEDED, "low") == set()
    assert len(await seen(limit=2)) == 2


async def test_many_are_listed_newest_first_over_several_pages(queue: QueueUnderTest, views: Views) -> None:
    queue.push(*['{"image":"busybox"}'] * 450)
    for delivery in await queue.take(450):
        await queue.finish(delivery)
    found = await views.tasks(state=State.SUCCEEDED, limit=1_000)
    finished = [status.accepted_at for status in found if status.accepted_at]
    assert len(finished) == 450
    assert finished[0] >= finished[-1]


async def test_queues_tell_depth_age_flight_and_rate(queue: QueueUnderTest, views: Views) -> None:
    before = queue.now_ms() - 90_000
    if queue.source == "redis-stream":
        queue.ask("XADD", queue.stream("high"), f"{before}-0", "task", "x")
    else:
        queue.push(f"\1{before}-1 x", queue="high")
    await queue.submit()
    await queue.submit()
    back, ended = await queue.take(queues={"default": 1})
    await queue.finish(back, "release")
    await queue.finish(ended)
    await queue.store.pause("low", paused=True)
    found = {info.name: info for info in await views.queues()}
    assert found.keys() == {"default", "high", "low"}
    assert (found["high"].depth, found["high"].in_flight) == (1, 0)
    assert found["high"].oldest_seconds == pytest.approx(90, abs=5)
    assert (found["default"].depth, found["default"].finished_last_minute) == (1, 1)
    assert (found["low"].depth, found["low"].oldest_seconds, found["low"].paused) == (0, None, True)
    await queue.take(queues={"default": 1})
    assert [info.in_flight for info in await views.queues() if info.name == "default"] == [1]


async def test_a_queue_whose_key_is_something_else_hides_no_other(
    queue: QueueUnderTest, views: Views
) -> None:
    await queue.submit(id="seen", queue="high")
    queue.redis.set(queue.stream("default"), "x")
    assert {q.name: q.depth for q in await views.queues()} == {"default": 0, "high": 1, "low": 0}
    assert [status.id for status in await views.tasks()] == ["seen"]
    with pytest.raises(TaskNotFound):
        await views.task("default.1-1")
    with pytest.raises(TaskNotFound):
        await queue.store.cancel("default.1-1")
    queue.redis.delete(queue.stream("default"))


async def test_a_key_of_ours_that_is_something_else_is_told(queue: QueueUnderTest, views: Views) -> None:
    queue.redis.set(queue.key("ready:low"), "x")
    with pytest.raises(QueueRefused, match="WRONGTYPE"):
        await views.queues()
    queue.redis.delete(queue.key("ready:low"))


async def test_only_a_queue_that_is_there_can_be_paused(queue: QueueUnderTest) -> None:
    with pytest.raises(UnknownQueue):
        await queue.store.pause("nowhere", paused=True)


async def test_instances_tell_of_themselves(queue: QueueUnderTest, views: Views) -> None:
    await queue.tick("b", info={"host": "h", "consumers": 3})
    queue.ask("ZADD", queue.key("meta:seen"), queue.now_ms() - 5_000, "b")
    a, b = await views.instances()
    assert (a.id, b.id, b.info) == ("a", "b", {"host": "h", "consumers": 3})
    assert b.seen_seconds == pytest.approx(5, abs=2)
    await queue.tick("b", leave=True)
    assert [instance.id for instance in await views.instances()] == ["a"]
