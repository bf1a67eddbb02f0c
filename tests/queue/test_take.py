"""Who gets what, and in which order."""

from __future__ import annotations

from collections import Counter

import pytest

from dispatcher.errors import QueueRefused
from tests.queue.conftest import FAILURE, GROUP, LEASE, STREAM, WEIGHTS, QueueUnderTest


async def test_a_taken_task_has_left_its_stream_and_is_leased(queue: QueueUnderTest) -> None:
    task_id = await queue.submit(command=["true"])
    entry = queue.record(task_id)["entry"]
    before = queue.now_ms()
    (delivery,) = await queue.take(5, "a", incarnation="x1", lease=30)
    assert delivery.task_id == task_id
    assert delivery.document == b'{"command":["true"],"image":"busybox"}'
    assert (delivery.queue, delivery.attempt, delivery.source_id) == ("default", 1, entry)
    assert delivery.owner == f"a/x1/{delivery.fence}"
    assert (delivery.fields, delivery.oversize, delivery.cancelled, delivery.daemon) == (None, 0, False, "")
    assert queue.length() == 0
    if queue.source == "redis-stream":
        assert queue.ask("XPENDING", STREAM, GROUP)["pending"] == 0
    until = queue.members("index:leases")[task_id]
    assert before + 30_000 <= until <= queue.now_ms() + 30_000


async def test_nothing_waits_and_nothing_is_given(queue: QueueUnderTest) -> None:
    assert await queue.take() == []


async def test_never_more_than_asked_for(queue: QueueUnderTest) -> None:
    for name in WEIGHTS:
        for _ in range(3):
            await queue.submit(queue=name)
    assert [len(await queue.take(n)) for n in (1, 2, 4, 100)] == [1, 2, 4, 2]


async def test_more_at_once_than_lua_can_unpack(queue: QueueUnderTest) -> None:
    queue.push(*['{"image":"busybox"}'] * 9_000)
    assert len(await queue.take(10_000)) == 9_000
    assert queue.length() == 0
    queue.destroyed = True  # to end them one by one would take longer than all else here


async def test_fences_only_grow(queue: QueueUnderTest) -> None:
    fences = []
    for _ in range(5):
        await queue.submit()
        delivery = await queue.take_one()
        fences.append(delivery.fence)
        await queue.finish(delivery, "release")
        fences.append((await queue.take_one("b")).fence)
    assert fences == sorted(set(fences))


@pytest.mark.parametrize("n", [1, 3, 10, 100])
async def test_a_long_mixed_backlog_is_shared_by_weight(queue: QueueUnderTest, n: int) -> None:
    for name in WEIGHTS:
        queue.push(*['{"image":"busybox"}'] * 300, queue=name)
    shares: Counter[str] = Counter()
    while shares.total() < 300:
        taken = await queue.take(n)
        shares.update(d.queue for d in taken)
        for delivery in taken:
            await queue.finish(delivery)
    for name, weight in WEIGHTS.items():
        assert shares[name] == pytest.approx(shares.total() * weight / 10, abs=4), shares
    for name in WEIGHTS:
        queue.redis.delete(queue.stream(name))


async def test_no_queue_waits_longer_than_its_weight_says(queue: QueueUnderTest) -> None:
    for name in WEIGHTS:
        queue.push(*['{"image":"busybox"}'] * 60, queue=name)
    order = [(await queue.take_one()).queue for _ in range(60)]
    for name, weight in WEIGHTS.items():
        gaps = [i for i, taken in enumerate(order) if taken == name]
        waits = [b - a for a, b in zip([-1, *gaps], [*gaps, len(order)], strict=True)]
        assert max(waits) <= 2 * 10 // weight + 1, f"{name} waited {max(waits)} turns"


async def test_a_queue_of_weight_0_is_served_only_when_all_others_are_empty(queue: QueueUnderTest) -> None:
    weights = {"high": 0, "default": 1, "low": 0}
    for name in WEIGHTS:
        for _ in range(5):
            await queue.submit(queue=name)
    shares = [Counter(d.queue for d in await queue.take(n, queues=weights)) for n in (3, 1, 4, 7)]
    assert shares[:2] == [{"default": 3}, {"default": 1}]
    assert shares[2]["default"] == 1, "what is left of it goes first"
    assert sum(shares, Counter()) == {"high": 5, "default": 5, "low": 5}


async def test_an_empty_queue_leaves_its_share_to_the_others(queue: QueueUnderTest) -> None:
    for _ in range(20):
        await queue.submit(queue="low")
    assert len(await queue.take(20)) == 20


@pytest.mark.parametrize("counts", [(1, 2, 2), (5,), (1, 1, 1, 1, 1)])
async def test_what_came_back_goes_before_its_queues_stream_in_order_of_acceptance(
    queue: QueueUnderTest, counts: tuple[int, ...]
) -> None:
    for number in range(4):
        await queue.submit(id=f"old-{number}")
        queue.ask("HSET", queue.key(f"task:old-{number}"), "accepted", 1_000 + number)
    taken = {d.task_id: d for d in await queue.take()}
    await queue.submit(id="new")
    for number in (3, 0, 2, 1):
        await queue.finish(taken[f"old-{number}"], "release")
    order = [d.task_id for n in counts for d in await queue.take(n)]
    assert order == ["old-0", "old-1", "old-2", "old-3", "new"]


@pytest.mark.parametrize("n", [1, 4, 40])
@pytest.mark.parametrize("how", ["delayed", "released"])
async def test_what_came_back_has_no_more_than_its_queues_weight(
    queue: QueueUnderTest, how: str, n: int
) -> None:
    for _ in range(20):
        await queue.submit(queue="low", delay=60.0 if how == "delayed" else None)
    queue.fall_due()
    await queue.tick()
    for delivery in await queue.take() if how == "released" else []:
        await queue.finish(delivery, "release")
    assert len(queue.members("ready:low")) == 20
    queue.redis.delete(queue.key("meta:turns"))
    for _ in range(20):
        await queue.submit(queue="high")
    order = [d.queue for _ in range(40 // n) for d in await queue.take(n)]
    assert Counter(order) == {"high": 20, "low": 20}
    # 6 to 1 as long as there is some of both; within one call each queue's are together.
    whole_calls = 14 // n * n
    assert order[:whole_calls].count("low") <= whole_calls // 7 + 1


async def test_what_is_in_the_inbox_goes_ahead_of_every_weight(queue: QueueUnderTest) -> None:
    await queue.submit(id="placed", queue="low")
    delivery = await queue.take_one(daemon="engine-1")
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.finish(delivery, "detach")
    await queue.submit(id="back", queue="high")
    await queue.finish(await queue.take_one(daemon="engine-2", queues={"high": 1}), "release")
    offer = {"high": 9, "low": 0}
    assert [(await queue.take_one(queues=offer)).task_id for _ in range(2)] == ["placed", "back"]


async def test_a_task_with_a_container_goes_to_an_instance_of_its_daemon_and_first(
    queue: QueueUnderTest,
) -> None:
    await queue.submit(id="placed", queue="low")
    delivery = await queue.take_one(daemon="engine-1")
    await queue.renew(delivery, state="running", daemon="engine-1", cause="timeout")
    await queue.finish(delivery, "detach")
    await queue.submit(id="back")
    await queue.finish(await queue.take_one(daemon="engine-2"), "release")
    await queue.submit(id="new", queue="high")
    elsewhere = await queue.take(daemon="engine-2", queues={"high": 1})
    assert [d.task_id for d in elsewhere] == ["new"]
    there = await queue.take(2, "b", daemon="engine-1")
    assert [d.task_id for d in there] == ["placed", "back"]
    assert (there[0].daemon, there[0].cause, there[0].attempt) == ("engine-1", "timeout", 1)
    assert queue.record("placed")["state"] == "running"


async def test_an_instance_without_a_daemon_has_no_inbox(queue: QueueUnderTest) -> None:
    await queue.submit()
    assert len(await queue.take(daemon="")) == 1


async def test_a_paused_queue_gives_nothing_until_it_is_resumed(queue: QueueUnderTest) -> None:
    await queue.submit(id="waits")
    await queue.submit(id="back")
    (waits, back) = await queue.take()
    await queue.finish(back, "release")
    await queue.finish(waits, "retry", FAILURE, budget="app")
    await queue.submit(id="entry")
    await queue.submit(id="other", queue="high")
    await queue.store.pause("default", paused=True)
    assert [d.task_id for d in await queue.take()] == ["other"]
    await queue.store.pause("default", paused=False)
    assert {d.task_id for d in await queue.take()} == {"waits", "back", "entry"}


async def test_only_queues_asked_for_are_served(queue: QueueUnderTest) -> None:
    await queue.submit(queue="low")
    assert await queue.take(queues={"high": 1, "default": 1}) == []


@pytest.mark.source("redis-stream")
async def test_a_destroyed_group_is_made_again_and_misses_nothing(queue: QueueUnderTest) -> None:
    task_id = await queue.submit()
    queue.ask("XGROUP", "DESTROY", STREAM, GROUP)
    assert (await queue.take_one()).task_id == task_id


async def test_a_deleted_stream_is_made_again(queue: QueueUnderTest) -> None:
    queue.redis.delete(STREAM)
    assert await queue.take() == []
    queue.push('{"image": "busybox"}')
    assert (await queue.take_one()).fields == ((b"task", b'{"image": "busybox"}'),)


@pytest.mark.source("redis-stream")
async def test_entries_another_reader_has_pending_are_not_given_twice_nor_block_the_rest(
    queue: QueueUnderTest,
) -> None:
    queue.xadd('{"image": "busybox"}')
    queue.ask("XREADGROUP", "GROUP", GROUP, "foreign", "COUNT", 1, "STREAMS", STREAM, ">")
    mine = queue.xadd('{"image": "busybox"}')
    assert [d.task_id for d in await queue.take(5)] == [mine]
    queue.redis.delete(STREAM)


@pytest.mark.source("redis-stream")
@pytest.mark.parametrize("weight", [1, 0])
async def test_entries_another_reader_has_pending_cost_other_queues_no_turn(
    queue: QueueUnderTest, weight: int
) -> None:
    for _ in range(20):
        queue.xadd('{"image": "busybox"}')
    queue.ask("XREADGROUP", "GROUP", GROUP, "foreign", "COUNT", 20, "STREAMS", STREAM, ">")
    for _ in range(6):
        await queue.submit(queue="low")
    offer = {"default": 9, "low": weight}
    assert [len(await queue.take(n, queues=offer)) for n in (1, 1, 3, 5)] == [1, 1, 3, 1]
    queue.redis.delete(STREAM)


async def test_a_queue_whose_key_is_something_else_is_told_and_stops_no_other(queue: QueueUnderTest) -> None:
    await queue.submit(id="other", queue="high")
    await queue.submit(id="waits")
    queue.redis.set(STREAM, "x")
    assert (await queue.tick()).unusable == ("default",)
    assert [d.task_id for d in await queue.take()] == ["other"]
    with pytest.raises(QueueRefused, match="'default' holds something else"):
        await queue.submit(id="refused")
    assert queue.record("refused") == {}
    queue.redis.delete(STREAM)
    assert (await queue.tick()).unusable == ()
    assert (await queue.store.audit(LEASE)).put_back == 1
    assert [d.task_id for d in await queue.take()] == ["waits"], "and nothing was lost by it"


async def test_tasks_that_ended_meanwhile_are_skipped(queue: QueueUnderTest) -> None:
    await queue.submit(id="gone")
    await queue.finish(await queue.take_one(), "release")
    queue.redis.delete(queue.key("task:gone"))
    queue.redis.zrem(queue.key("index:open"), "gone")
    await queue.submit(id="there")
    assert [d.task_id for d in await queue.take()] == ["there"]


async def test_out_of_memory_tasks_are_still_taken_renewed_and_ended(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    queue.push('{"image": "busybox"}')
    await queue.submit(id="later", delay=60.0)
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    first, second = await queue.take()
    assert await queue.renew(first, state="running", daemon="engine-1") == "ok"
    assert await queue.finish(first) == "ok"
    assert await queue.finish(second, "retry", FAILURE, delay=5, budget="app") == "ok"
    assert (await queue.tick("b")).next_due_ms is not None
    assert (await queue.store.cancel("later"))[0] == "cancelled"


async def test_without_queues_only_what_has_a_container_is_given(queue: QueueUnderTest) -> None:
    for task_id in ("runs", "begun", "waits"):
        await queue.submit(id=task_id)
    runs, begun, _ = await queue.take(3)
    await queue.renew(runs, state="running", daemon="engine-1", container="c0ffee")
    await queue.renew(begun, state="starting", daemon="engine-1")
    for delivery in (runs, begun):
        assert await queue.finish(delivery, "detach") == "ok"
    (adopted,) = await queue.take(10, queues={}, daemon="engine-1")
    assert (adopted.task_id, adopted.container) == ("runs", "c0ffee")
    assert [d.task_id for d in await queue.take(10, daemon="engine-1")] == ["begun"]
