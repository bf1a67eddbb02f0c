"""The housekeeping that any instance does for all."""

from __future__ import annotations

import pytest

from dispatcher.queue.exchange import Limits
from dispatcher.queue.store import FORGET_LEASES, TICK_LIMIT
from tests.queue.conftest import FAILURE, GROUP, LEASE, STREAM, WEIGHTS, QueueUnderTest

META = "meta:counters"


def group_consumers(queue: QueueUnderTest, name: str = "default") -> set[str]:
    """Of a stream; a list has none."""
    if queue.source == "redis-list":
        return set()
    found = queue.redis.xinfo_consumers(queue.stream(name), GROUP)
    return {consumer["name"].decode() for consumer in found}


@pytest.mark.source("redis-stream")
async def test_the_first_tick_makes_groups_at_the_beginning_and_a_namespace(queue: QueueUnderTest) -> None:
    queue.redis.flushall()
    queue.xadd('{"image": "busybox"}')
    assert (await queue.tick("a")).namespace == "0123456789abcdef"
    for name in WEIGHTS:
        ((group),) = queue.redis.xinfo_groups(queue.stream(name))
        assert (group["name"], group["last-delivered-id"]) == (GROUP.encode(), b"0-0")
    assert await queue.store.queues() == ["default", "high", "low"]
    assert len(await queue.take()) == 1


async def test_the_namespace_stays(queue: QueueUnderTest) -> None:
    queue.redis.hset(queue.key(META), "namespace", "first")
    assert (await queue.tick("b")).namespace == "first"


@pytest.mark.source("redis-stream")
async def test_a_lost_group_is_made_again(queue: QueueUnderTest) -> None:
    queue.ask("XGROUP", "DESTROY", STREAM, GROUP)
    queue.redis.delete(queue.stream("low"))
    await queue.tick()
    assert queue.redis.xinfo_groups(STREAM)
    assert queue.redis.xinfo_groups(queue.stream("low"))


async def test_it_tells_redis_time_and_when_the_next_task_is_due(queue: QueueUnderTest) -> None:
    before = queue.now_ms()
    tick = await queue.tick()
    assert before <= tick.now_ms <= queue.now_ms()
    assert tick.next_due_ms is None
    task_id = await queue.submit(delay=60.0)
    assert (await queue.tick()).next_due_ms == int(queue.record(task_id)["due"])


async def test_what_is_due_is_promoted_and_the_rest_waits(queue: QueueUnderTest) -> None:
    await queue.submit(id="due", delay=60.0, queue="high")
    await queue.submit(id="later", delay=90.0)
    queue.ask("ZADD", queue.key("index:due:high"), "XX", 1, "due")
    tick = await queue.tick()
    assert tick.promoted == 1
    assert queue.record("due")["state"] == "queued"
    assert queue.due().keys() == {"later"}
    assert [d.task_id for d in await queue.take()] == ["due"]


async def test_a_due_task_on_a_daemon_is_not_scheduled_any_more(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.finish(delivery, "detach", FAILURE, delay=5, budget="infra")
    queue.fall_due()
    await queue.tick()
    assert queue.record("one")["state"] != "scheduled"


async def test_a_lapsed_lease_is_taken_over_and_others_are_not(queue: QueueUnderTest) -> None:
    await queue.submit(id="dead")
    await queue.submit(id="alive")
    dead, alive = await queue.take()
    queue.lapse(dead)
    assert (await queue.tick("b")).taken_over == 1
    assert queue.record("dead")["takeovers"] == "1"
    again = await queue.take_one("b")
    assert (again.task_id, again.attempt) == ("dead", 1)
    assert again.fence > alive.fence
    assert await queue.renew(alive) == "ok"


async def test_a_lapsed_task_with_a_container_waits_for_its_daemon(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    await queue.renew(delivery, state="starting", daemon="engine-1")
    queue.lapse(delivery)
    await queue.tick("b")
    assert await queue.take(instance="b", daemon="engine-2") == []
    assert (await queue.take_one("b", daemon="engine-1")).daemon == "engine-1"


async def test_one_tick_does_a_bounded_share(queue: QueueUnderTest) -> None:
    queue.push(*['{"image": "busybox"}'] * (TICK_LIMIT + 5))
    queue.lapse(*await queue.take(TICK_LIMIT + 5))
    assert [(await queue.tick()).taken_over for _ in range(3)] == [TICK_LIMIT, 5, 0]


async def test_after_a_gap_nothing_is_taken_over_for_one_lease(queue: QueueUnderTest) -> None:
    await queue.submit()
    delivery = await queue.take_one()
    queue.lapse(delivery)
    queue.redis.hset(queue.key(META), "last_tick", queue.now_ms() - int(LEASE * 600))
    assert [(await queue.tick()).taken_over for _ in range(2)] == [0, 0]
    calm_until = int(queue.redis.hget(queue.key(META), "calm_until") or 0)
    assert calm_until == pytest.approx(queue.now_ms() + LEASE * 1000, abs=2_000)
    assert await queue.renew(delivery) == "ok", "its owner had the time to renew"
    queue.lapse(delivery)
    queue.redis.hset(queue.key(META), "calm_until", queue.now_ms() - 1)
    assert (await queue.tick()).taken_over == 1


async def test_less_than_half_a_lease_is_no_gap(queue: QueueUnderTest) -> None:
    await queue.submit()
    queue.lapse(await queue.take_one())
    queue.redis.hset(queue.key(META), "last_tick", queue.now_ms() - int(LEASE * 400))
    assert (await queue.tick()).taken_over == 1


async def test_a_clock_that_ran_backwards_gives_every_lease_its_length_again(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    await queue.submit(id="two")
    await queue.take()
    hour = 3_600_000
    ahead = queue.now_ms() + hour
    queue.redis.hset(queue.key(META), mapping={"last_tick": ahead, "calm_until": ahead})
    for task_id, until in (("one", ahead + 1_000), ("two", 1)):
        queue.ask("ZADD", queue.key("index:leases"), until, task_id)
    assert (await queue.tick()).taken_over == 0
    leases = queue.members("index:leases")
    assert list(leases.values()) == pytest.approx([queue.now_ms() + LEASE * 1000] * 2, abs=2_000)
    assert (await queue.tick()).taken_over == 0


async def test_promotion_goes_on_while_takeovers_rest(queue: QueueUnderTest) -> None:
    await queue.submit(delay=60.0)
    queue.fall_due()
    queue.redis.hset(queue.key(META), "last_tick", 1)
    assert (await queue.tick()).promoted == 1


async def test_an_instance_without_a_sign_of_life_is_forgotten(queue: QueueUnderTest) -> None:
    await queue.tick("gone")
    await queue.take(instance="gone")
    await queue.submit()
    await queue.take_one("gone")
    await queue.store.tell("gone", "follow", "x")
    assert group_consumers(queue) == ({"gone"} if queue.source == "redis-stream" else set())
    silence = int(LEASE * FORGET_LEASES * 1000)
    queue.ask("ZADD", queue.key("meta:seen"), queue.now_ms() - silence + 60_000, "gone")
    await queue.tick("a")
    assert queue.members("meta:seen").keys() == {"a", "gone"}
    queue.ask("ZADD", queue.key("meta:seen"), queue.now_ms() - silence, "gone")
    await queue.tick("a")
    assert queue.members("meta:seen").keys() == {"a"}
    assert set(queue.redis.hkeys(queue.key("meta:instances"))) == {b"a"}
    assert group_consumers(queue) == set()
    assert not queue.redis.exists(queue.key("control:gone"))


@pytest.mark.source("redis-stream")
async def test_a_consumer_that_has_entries_pending_is_not_deleted(queue: QueueUnderTest) -> None:
    queue.xadd('{"image": "busybox"}')
    queue.ask("XREADGROUP", "GROUP", GROUP, "older", "COUNT", 1, "STREAMS", STREAM, ">")
    await queue.tick("older", leave=True)
    assert group_consumers(queue) == {"older"}
    queue.redis.delete(STREAM)


async def test_who_leaves_is_off_the_list_at_once(queue: QueueUnderTest) -> None:
    await queue.tick("b")
    await queue.submit()
    await queue.finish(await queue.take_one("b"))
    await queue.tick("b", leave=True)
    assert queue.members("meta:seen").keys() == {"a"}
    assert "b" not in group_consumers(queue)


async def test_consumers_stay_bounded_over_many_lives(queue: QueueUnderTest) -> None:
    for number in range(100):
        await queue.tick(f"i{number}")
        await queue.submit()
        await queue.finish(await queue.take_one(f"i{number}"))
        await queue.tick(f"i{number}", leave=True)
    assert group_consumers(queue) == set()
    assert queue.members("meta:seen").keys() == {"a"}


async def test_what_the_operator_set_reaches_every_script(queue: QueueUnderTest) -> None:
    await queue.tick(limits=Limits(retention=7, results_length=8, max_length=9, max_bytes=300))
    found = queue.redis.hmget(queue.key(META), "retention", "results_length", "max_length", "max_bytes")
    assert found == [b"7000", b"8", b"9", b"300"]


async def test_a_second_living_instance_of_a_name_is_told_so_and_does_nothing(queue: QueueUnderTest) -> None:
    await queue.submit(delay=60.0)
    queue.fall_due()
    queue.redis.delete(queue.key("meta:queues"))
    before = {key: queue.redis.dump(key) for key in queue.redis.keys("*")}
    for leave in (False, True):
        tick = await queue.tick("a", incarnation="2", leave=leave, limits=Limits(max_length=9))
        assert tick.rival
        assert (tick.namespace, tick.promoted, tick.next_due_ms) == ("0123456789abcdef", 0, None)
    assert {key: queue.redis.dump(key) for key in queue.redis.keys("*")} == before
    tick = await queue.tick("a", incarnation="1")
    assert (tick.rival, tick.promoted) == (False, 1)


async def test_instances_of_other_names_are_no_rivals(queue: QueueUnderTest) -> None:
    assert not (await queue.tick("b", incarnation="1")).rival
    assert not (await queue.tick("a", incarnation="1")).rival


@pytest.mark.parametrize("how", ["silent for a lease", "has left"])
async def test_a_name_is_free_again(queue: QueueUnderTest, how: str) -> None:
    if how == "has left":
        await queue.tick("a", leave=True)
    else:
        queue.ask("ZADD", queue.key("meta:seen"), queue.now_ms() - int(LEASE * 1000) - 1, "a")
    assert not (await queue.tick("a", incarnation="2")).rival
    assert (await queue.tick("a", incarnation="1")).rival, "it belongs to the second one now"


async def test_an_emptied_queue_gets_the_namespace_of_who_comes_first(queue: QueueUnderTest) -> None:
    queue.redis.flushall()
    assert (await queue.tick(namespace="feedfeedfeedfeed")).namespace == "feedfeedfeedfeed"
    assert (await queue.tick("b")).namespace == "feedfeedfeedfeed"


@pytest.mark.parametrize(
    "names", [("high", "default", "low"), ("low", "high", "default"), ("default", "low", "high")]
)
async def test_the_next_task_that_is_due_is_that_of_all_queues(
    queue: QueueUnderTest, names: tuple[str, str, str]
) -> None:
    first, second, _ = names
    for name, delay in zip(names, (20.0, 40.0, 60.0), strict=True):
        await queue.submit(id=name, queue=name, delay=delay)
    assert (await queue.tick(queues=["low"])).next_due_ms == int(queue.record(first)["due"])
    queue.ask("ZADD", queue.key(f"index:due:{first}"), 1, first)
    tick = await queue.tick(queues=["low"])
    assert (tick.promoted, tick.next_due_ms) == (1, int(queue.record(second)["due"]))


async def test_out_of_memory_an_instance_joins_ticks_and_leaves(queue: QueueUnderTest) -> None:
    await queue.submit()
    queue.lapse(await queue.take_one())
    await queue.submit(delay=60.0)
    queue.fall_due()
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    tick = await queue.tick("b")
    assert (tick.promoted, tick.taken_over) == (1, 1)
    assert len(await queue.take(instance="b")) == 2
    await queue.tick("b", leave=True)


async def test_a_lease_without_a_record_leaves_nothing_behind(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    queue.lapse(await queue.take_one())
    queue.redis.delete(queue.key("task:one"))
    queue.redis.zrem(queue.key("index:open"), "one")
    await queue.tick()
    assert queue.members("index:leases") == {}
    assert queue.record("one") == {}


async def test_a_small_step_back_of_the_clock_is_no_gap(queue: QueueUnderTest) -> None:
    await queue.submit()
    queue.lapse(await queue.take_one())
    queue.redis.hset(queue.key(META), "last_tick", queue.now_ms() + 500)
    assert (await queue.tick()).taken_over == 1


async def test_leases_are_given_their_own_length_by_whoever_sees_the_clock_set_back(
    queue: QueueUnderTest,
) -> None:
    await queue.tick("patient", lease=120.0)
    await queue.submit()
    delivery = await queue.take_one("patient", lease=120.0)
    queue.redis.hset(queue.key(META), "last_tick", queue.now_ms() + 5_000)
    await queue.tick("hasty", lease=2.0)
    assert queue.members("index:leases")[delivery.task_id] > queue.now_ms() + 110_000


async def test_a_leap_of_the_clock_forgets_nobody(queue: QueueUnderTest) -> None:
    await queue.tick("b")
    long_ago = queue.now_ms() - 10 * LEASE * 1000
    for name in ("a", "b"):
        queue.ask("ZADD", queue.key("meta:seen"), long_ago, name)
    queue.redis.hset(queue.key(META), "last_tick", int(long_ago))
    await queue.tick("a")
    assert queue.redis.hkeys(queue.key("meta:instances")) == [b"a", b"b"]
