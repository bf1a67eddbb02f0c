"""What is open and nowhere comes back; what has no record any more is told."""

from __future__ import annotations

import pytest

from tests.queue.conftest import GROUP, LEASE, QueueUnderTest


async def audit(queue: QueueUnderTest) -> tuple[int, tuple[str, ...]]:
    """A whole round."""
    put_back, vanished = 0, list[str]()
    while True:
        part = await queue.store.audit(LEASE)
        put_back += part.put_back
        vanished += part.vanished
        if part.done:
            return put_back, tuple(vanished)


async def in_every_place(queue: QueueUnderTest) -> None:
    """A task in each place a task can be in."""
    await queue.submit(id="held")
    await queue.submit(id="ready")
    await queue.submit(id="inbox")
    held, ready, inbox = await queue.take(3)
    assert await queue.finish(ready, "release") == "ok"
    await queue.renew(inbox, state="running", daemon="engine-1")
    assert await queue.finish(inbox, "detach") == "ok"
    await queue.submit(id="due", delay=60.0)
    await queue.submit(id="waiting")
    assert await queue.renew(held) == "ok"


async def test_it_changes_nothing_where_nothing_is_amiss(queue: QueueUnderTest) -> None:
    await in_every_place(queue)
    before = {key: queue.ask("DUMP", key) for key in queue.redis.keys("*") if b"meta:" not in key}
    assert await audit(queue) == (0, ())
    assert {key: queue.ask("DUMP", key) for key in queue.redis.keys("*") if b"meta:" not in key} == before


@pytest.mark.parametrize(
    ("place", "task_id", "daemon"),
    [("ready:default", "ready", ""), ("inbox:engine-1", "inbox", "engine-1"), ("", "waiting", "")],
)
async def test_what_a_deleted_key_held_comes_back(
    queue: QueueUnderTest, place: str, task_id: str, daemon: str
) -> None:
    await in_every_place(queue)
    queue.redis.delete(queue.key(place) if place else queue.stream("default"))
    await queue.tick()
    assert await audit(queue) == (1, ())
    assert task_id in [d.task_id for d in await queue.take(daemon=daemon)]


async def test_what_was_scheduled_is_scheduled_again_for_its_time(queue: QueueUnderTest) -> None:
    await in_every_place(queue)
    due = queue.due()
    queue.redis.delete(queue.key("index:due:default"))
    assert await audit(queue) == (1, ())
    assert queue.due() == due


async def test_a_lease_without_its_end_gets_one(queue: QueueUnderTest) -> None:
    await in_every_place(queue)
    queue.redis.delete(queue.key("index:leases"))
    assert await audit(queue) == (0, ())
    assert queue.members("index:leases")["held"] > queue.now_ms()


async def test_a_task_whose_record_is_gone_is_told_once(queue: QueueUnderTest) -> None:
    await queue.submit(id="gone")
    queue.redis.delete(queue.key("task:gone"))
    assert await audit(queue) == (0, ("gone",))
    assert await audit(queue) == (0, ())
    queue.destroyed = True


async def test_it_goes_on_where_the_last_call_ended(queue: QueueUnderTest) -> None:
    for n in range(500):
        await queue.submit(id=f"task-{n}")
    queue.redis.delete(queue.stream("default"))
    await queue.tick()
    first = await queue.store.audit(LEASE)
    assert not first.done
    assert 0 < first.put_back < 500
    rest, _ = await audit(queue)
    assert first.put_back + rest == 500


async def test_only_one_begins_anew_within_a_lease(queue: QueueUnderTest) -> None:
    for n in range(500):
        await queue.submit(id=f"task-{n}")
    assert not (await queue.store.audit(LEASE, "begin")).done
    assert (await queue.store.audit(LEASE, "begin")).done


@pytest.mark.source("redis-stream")
async def test_what_another_reader_left_pending_is_taken_after_a_lease(queue: QueueUnderTest) -> None:
    plain = queue.xadd('{"image": "busybox"}')
    ours = await queue.submit(id="ours")
    taken = queue.ask("XREADGROUP", "GROUP", GROUP, "stranger", "STREAMS", queue.stream("default"), ">")
    assert taken
    assert await queue.take(lease=LEASE) == []
    found = {d.task_id: d for d in await queue.take(lease=0.0)}
    assert found.keys() == {plain, ours}
    assert found[plain].fields == ((b"task", b'{"image": "busybox"}'),)
    assert queue.ask("XPENDING", queue.stream("default"), GROUP)["pending"] == 0


@pytest.mark.source("redis-stream")
async def test_a_pending_entry_that_was_deleted_does_not_stand_in_the_way(queue: QueueUnderTest) -> None:
    entry = queue.xadd('{"image": "busybox"}').partition(".")[2]
    queue.ask("XREADGROUP", "GROUP", GROUP, "stranger", "STREAMS", queue.stream("default"), ">")
    queue.ask("XDEL", queue.stream("default"), entry)
    later = queue.xadd('{"image": "busybox"}')
    assert later in [d.task_id for n in range(2) for d in await queue.take(lease=0.0)]


async def test_all_instances_together_keep_a_pace(queue: QueueUnderTest) -> None:
    await queue.submit(id="waiting")
    queue.redis.delete(queue.stream("default"))
    await queue.store.audit(LEASE)
    queue.redis.delete(queue.key("ready:default"))
    assert (await queue.store.audit(LEASE, "pace")).put_back == 0
    queue.redis.hset(queue.key("meta:counters"), "audited", queue.now_ms() - 2_000)
    assert (await queue.store.audit(LEASE, "pace")).put_back == 1
