"""What is given back for a daemon that has its image: first to that one, soon to anybody."""

from __future__ import annotations

import pytest

from dispatcher.model import Delivery
from tests.queue.conftest import FAILURE, QueueUnderTest

#: Milliseconds, as in ``common.lua``; and how many of them one call passes over, as in ``take.lua``.
PREFER_MS = 2_000
MAX_PREFERRING = 100
HERE, THERE = "engine-1", "engine-2"


async def kept_for(queue: QueueUnderTest, daemon: str, *task_ids: str, name: str = "default") -> None:
    """Tasks that were given back for this daemon."""
    for task_id in task_ids:
        await queue.submit(id=task_id, queue=name)
    for delivery in await queue.take(len(task_ids), queues={name: 1}, daemon=daemon):
        assert await queue.finish(delivery, "release", prefer=daemon) == "ok"


def last(queue: QueueUnderTest, milliseconds: int) -> None:
    """Every preference ends so long from now."""
    until = queue.now_ms() + milliseconds
    for key in queue.redis.keys(queue.key("task:*")):
        if queue.redis.hexists(key, "prefers"):
            queue.redis.hset(key, "prefers_until", until)


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.task_id for delivery in deliveries]


async def test_it_goes_to_its_daemon_and_to_no_other_for_a_moment(queue: QueueUnderTest) -> None:
    before = queue.now_ms()
    await kept_for(queue, HERE, "warm")
    record = queue.record("warm")
    assert record["prefers"] == HERE
    assert before + PREFER_MS <= int(record["prefers_until"]) <= queue.now_ms() + PREFER_MS
    last(queue, PREFER_MS)
    assert await queue.take(daemon=THERE) == []
    assert queue.members("ready:default").keys() == {"warm"}
    (taken,) = await queue.take(daemon=HERE)
    assert (taken.task_id, taken.attempt, taken.daemon) == ("warm", 1, "")
    assert not queue.record("warm").keys() & {"prefers", "prefers_until"}


async def test_after_that_anybody_has_it(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, "warm")
    last(queue, 0)
    assert ids(await queue.take(daemon=THERE)) == ["warm"]


async def test_an_instance_without_a_daemon_waits_as_others_do(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, "warm")
    last(queue, PREFER_MS)
    assert await queue.take(daemon="") == []
    last(queue, 0)
    assert ids(await queue.take(daemon="")) == ["warm"]


async def test_nothing_behind_it_waits(queue: QueueUnderTest) -> None:
    await queue.submit(id="back")
    back = await queue.take_one()
    await kept_for(queue, HERE, "warm", "other")
    await queue.submit(id="new")
    await queue.submit(id="high", queue="high")
    await queue.finish(back, "retry", FAILURE)
    last(queue, PREFER_MS)
    assert sorted(ids(await queue.take(3, daemon=THERE))) == ["back", "high", "new"]
    assert queue.members("ready:default").keys() == {"warm", "other"}
    assert sorted(ids(await queue.take(daemon=HERE))) == ["other", "warm"]


async def test_its_share_goes_to_the_other_queues(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, *(f"warm-{number}" for number in range(4)), name="high")
    for number in range(4):
        await queue.submit(id=f"low-{number}", queue="low")
    last(queue, PREFER_MS)
    taken = [task_id for _ in range(4) for task_id in ids(await queue.take(1, daemon=THERE))]
    assert taken == [f"low-{number}" for number in range(4)]


async def test_it_keeps_its_place_among_those_that_came_back(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, "first", "second")
    scores = queue.members("ready:default")
    last(queue, PREFER_MS)
    await queue.take(daemon=THERE)
    assert queue.members("ready:default") == scores


async def test_no_call_passes_over_more_than_so_many(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, *(f"warm-{number:03}" for number in range(MAX_PREFERRING + 1)))
    last(queue, PREFER_MS)
    assert ids(await queue.take(daemon=THERE)) == [f"warm-{MAX_PREFERRING:03}"]
    assert len(await queue.take(daemon=HERE)) == MAX_PREFERRING


async def test_a_clock_that_was_set_back_keeps_it_from_nobody(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, "warm")
    last(queue, 3_600_000)
    assert ids(await queue.take(daemon=THERE)) == ["warm"]


@pytest.mark.parametrize("action", ["release", "retry", "detach"])
@pytest.mark.parametrize("delay", [0.0, 5.0])
async def test_only_a_release_at_once_prefers(queue: QueueUnderTest, action: str, delay: float) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    await queue.finish(delivery, action, FAILURE, delay=delay, prefer=HERE)  # type: ignore[arg-type]
    prefers = "prefers" in queue.record("one")
    assert prefers is (action == "release" and not delay)


async def test_a_release_whose_reply_was_lost_keeps_no_longer(queue: QueueUnderTest) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    await queue.finish(delivery, "release", prefer=HERE)
    record = queue.record("one")
    await queue.finish(delivery, "release", prefer=THERE)
    assert queue.record("one") == record


async def test_one_that_is_kept_can_be_cancelled(queue: QueueUnderTest) -> None:
    await kept_for(queue, HERE, "warm")
    assert await queue.store.cancel("warm") == ("cancelled", "cancelled")
    assert await queue.take(daemon=HERE) == []
