"""A task that brings its dispatchers down is kept from other tasks, and ended at last."""

from __future__ import annotations

from dispatcher.model import Delivery, Outcome, Reason, State
from dispatcher.queue.exchange import Limits
from tests.queue.conftest import LEASE, QueueUnderTest

LIMITS = Limits(max_deliveries=3)


async def killed(queue: QueueUnderTest, delivery: Delivery, *, soon: bool = True) -> None:
    """Its owner died, soon after taking it or long after, and others take it over."""
    queue.lapse(delivery, soon=soon)
    await queue.tick(limits=LIMITS)


async def suspects(queue: QueueUnderTest, *task_ids: str, daemon: str = "") -> None:
    """Tasks that have each brought two dispatchers down."""
    for task_id in task_ids:
        await queue.submit(id=task_id)
    for _ in range(2):
        for delivery in await queue.take(10, "victim", incarnation="dead"):
            await queue.renew(delivery, state="running", daemon=daemon)
            queue.lapse(delivery, soon=True)
        await queue.tick(limits=LIMITS)
    assert {queue.record(task_id)["deaths"] for task_id in task_ids} == {"2"}


async def test_after_too_many_deaths_it_is_a_dead_letter(queue: QueueUnderTest) -> None:
    await queue.submit(id="bad")
    for _ in range(2):
        await killed(queue, await queue.take_one("victim"))
    queue.lapse(await queue.take_one("victim"), soon=True)
    assert (await queue.tick(limits=LIMITS)).poisoned == 1
    (entry,) = queue.entries("dead")
    assert (entry["id"], entry["reason"]) == (b"bad", b"poison")
    assert b"3 times" in entry["message"]
    (result,) = queue.entries("results")
    assert (result["state"], result["reason"]) == (b"failed", b"poison")
    assert await queue.take() == []


async def test_a_death_long_after_the_taking_clears_it(queue: QueueUnderTest) -> None:
    await suspects(queue, "once")
    await killed(queue, await queue.take_one(), soon=False)
    assert queue.record("once")["deaths"] == "0"


async def test_an_owner_that_lives_has_not_died(queue: QueueUnderTest) -> None:
    """It never heard that it has the task: the reply was lost."""
    await queue.submit(id="unheard")
    await queue.tick("a")
    await killed(queue, await queue.take_one("a"))
    assert queue.record("unheard").get("deaths", "0") == "0"
    await killed(queue, await queue.take_one("a", incarnation="another"))
    assert queue.record("unheard")["deaths"] == "1"


async def test_giving_it_back_does_not_count(queue: QueueUnderTest) -> None:
    await queue.submit(id="drained")
    for _ in range(5):
        assert await queue.finish(await queue.take_one(), "release", Outcome(State.QUEUED)) == "ok"
        await queue.tick(limits=LIMITS)
    assert queue.record("drained").get("deaths", "0") == "0"


async def test_one_that_is_to_be_cancelled_ends_as_cancelled(queue: QueueUnderTest) -> None:
    await suspects(queue, "unwanted")
    delivery = await queue.take_one("victim")
    await queue.store.cancel("unwanted")
    await killed(queue, delivery)
    assert [(e["id"], e["state"]) for e in queue.entries("results")] == [(b"unwanted", b"cancelled")]
    assert queue.entries("dead") == []


async def test_suspects_are_taken_one_at_a_time_by_each_instance(queue: QueueUnderTest) -> None:
    await suspects(queue, "first", "second", "third")
    await queue.submit(id="innocent")
    assert [d.task_id for d in await queue.take(10, "a")] == ["first", "innocent"]
    assert await queue.take(10, "a") == [], "it holds one already"
    (held,) = await queue.take(10, "b")
    assert held.task_id == "second"
    await queue.finish(held)
    assert [d.task_id for d in await queue.take(10, "b")] == ["third"]


async def test_a_suspects_container_is_adopted_by_one_that_holds_no_other(queue: QueueUnderTest) -> None:
    await suspects(queue, "one", "two", daemon="engine-1")
    assert [d.task_id for d in await queue.take(10, "a")] == ["one"]
    assert [d.task_id for d in await queue.take(10, "b")] == ["two"]


async def test_an_owner_that_lives_with_it_clears_it_and_others_need_not_wait(queue: QueueUnderTest) -> None:
    await suspects(queue, "one", "two")
    one = await queue.take_one("a")
    assert await queue.take(10, "a") == []
    queue.redis.hset(queue.key("task:one"), "taken", queue.now_ms() - 2 * LEASE * 1000)
    assert await queue.renew(one) == "ok"
    assert queue.record("one")["deaths"] == "0"
    assert [d.task_id for d in await queue.take(10, "a")] == ["two"]


async def test_its_reason_is_a_dead_letter() -> None:
    assert Reason.POISON.dead_letter
