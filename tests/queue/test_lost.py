"""Containers on a daemon without an instance: waited for, and given up at last."""

from __future__ import annotations

from dispatcher.queue.exchange import Limits
from tests.queue.conftest import QueueUnderTest

DAEMON = "engine-1"
LIMITS = Limits(infra_max_attempts=2, lost_after=60.0)


async def left_behind(queue: QueueUnderTest, task_id: str = "left") -> None:
    """A task whose container runs on a daemon that nobody looks after any more."""
    await queue.submit(id=task_id)
    delivery = await queue.take_one()
    await queue.renew(delivery, state="running", daemon=DAEMON, container="c0ffee", started="5")
    queue.lapse(delivery)
    await queue.tick(daemon="", limits=LIMITS)
    assert queue.members(f"inbox:{DAEMON}").keys() >= {task_id}


def absent(queue: QueueUnderTest, seconds: float = 61.0, daemon: str = DAEMON) -> None:
    """It was that long ago that an instance was seen there."""
    queue.ask("ZADD", queue.key("meta:daemons"), queue.now_ms() - seconds * 1000, daemon)


async def tick(queue: QueueUnderTest, daemon: str = "elsewhere") -> int:
    return (await queue.tick("b", daemon=daemon, limits=LIMITS)).lost


async def test_it_is_waited_for(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    absent(queue, 59.0)
    assert await tick(queue) == 0
    assert [d.task_id for d in await queue.take(daemon=DAEMON)] == ["left"]


async def test_then_the_attempt_moves_on_as_lost(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    absent(queue)
    assert await tick(queue) == 1
    record = queue.record("left")
    assert (record["reason"], record["attempt"], record["infra"]) == ("lost", "2", "1")
    assert DAEMON in record["message"]
    delivery = await queue.take_one("b", daemon="elsewhere")
    assert (delivery.attempt, delivery.daemon, delivery.container) == (2, "", "")
    assert queue.members("meta:daemons").keys() == {"elsewhere"}


async def test_the_budget_of_infrastructure_ends_it(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    queue.redis.hset(queue.key("task:left"), "infra", 1)
    absent(queue)
    assert await tick(queue) == 1
    (result,) = queue.entries("results")
    assert (result["state"], result["reason"]) == (b"failed", b"lost")
    assert [letter["id"] for letter in queue.entries("dead")] == [b"left"]


async def test_one_that_is_to_be_cancelled_is(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    assert (await queue.store.cancel("left"))[0] == "requested"
    absent(queue)
    assert await tick(queue) == 1
    assert [entry["state"] for entry in queue.entries("results")] == [b"cancelled"]


async def test_an_instance_there_is_a_sign_of_life(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    absent(queue)
    assert await tick(queue, daemon=DAEMON) == 0


async def test_time_in_which_nothing_ran_at_all_does_not_count(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    absent(queue, 10_000)
    queue.redis.hset(queue.key("meta:counters"), "last_tick", queue.now_ms() - 5_000_000)
    assert [await tick(queue) for _ in range(2)] == [0, 0]
    queue.redis.hset(
        queue.key("meta:counters"),
        "gap_ended",
        queue.now_ms() - 61_000,
    )
    queue.redis.hdel(queue.key("meta:counters"), "calm_until")
    assert await tick(queue) == 1


async def test_a_clock_set_back_gives_every_daemon_its_time(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    ahead = queue.now_ms() + 3_600_000
    queue.ask("ZADD", queue.key("meta:daemons"), ahead, DAEMON)
    queue.redis.hset(queue.key("meta:counters"), "last_tick", ahead)
    assert await tick(queue) == 0
    assert queue.members("meta:daemons")[DAEMON] <= queue.now_ms()


async def test_what_is_held_is_not_given_up(queue: QueueUnderTest) -> None:
    await left_behind(queue)
    delivery = await queue.take_one(daemon=DAEMON)
    absent(queue)
    assert await tick(queue) == 0
    assert await queue.renew(delivery) == "ok"
