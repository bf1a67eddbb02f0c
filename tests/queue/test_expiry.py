"""A task that nobody starts in time ends, also while nobody takes anything."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from dispatcher.model import Delivery
from dispatcher.queue.wire import parse_document
from tests.queue.conftest import QueueUnderTest

SOON = datetime.now(UTC) + timedelta(hours=1)


def expire(queue: QueueUnderTest, task_id: str) -> None:
    """Its time has passed."""
    queue.redis.hset(queue.key(f"task:{task_id}"), "expires", 1)
    queue.ask("ZADD", queue.key("index:expires"), "XX", 1, task_id)


async def expired(queue: QueueUnderTest) -> list[tuple[bytes, bytes]]:
    await queue.tick()
    return [(entry["id"], entry["reason"]) for entry in queue.entries("results")]


@pytest.mark.parametrize("when", [{}, {"delay": 60.0}])
async def test_what_waits_ends_when_its_time_has_passed(
    queue: QueueUnderTest, when: dict[str, float]
) -> None:
    await queue.submit(id="late", expires_at=SOON, **when)
    assert await expired(queue) == []
    expire(queue, "late")
    assert await expired(queue) == [(b"late", b"expired")]
    assert (queue.length(), queue.due()) == (0, {})
    assert queue.entries("dead") == []


async def taken(queue: QueueUnderTest) -> Delivery:
    await queue.submit(id="late", expires_at=SOON)
    return await queue.take_one()


async def test_what_is_held_is_its_owners_affair_until_it_comes_back(queue: QueueUnderTest) -> None:
    delivery = await taken(queue)
    expire(queue, "late")
    assert await expired(queue) == []
    await queue.finish(delivery, "release")
    assert await expired(queue) == [(b"late", b"expired")]


async def test_what_is_taken_over_is_watched_again(queue: QueueUnderTest) -> None:
    delivery = await taken(queue)
    expire(queue, "late")
    assert await expired(queue) == []
    queue.lapse(delivery)
    await queue.tick()
    assert await expired(queue) == [(b"late", b"expired")]


async def test_what_may_have_a_container_goes_on(queue: QueueUnderTest) -> None:
    delivery = await taken(queue)
    await queue.renew(delivery, state="running", daemon="engine-1")
    await queue.finish(delivery, "detach")
    expire(queue, "late")
    assert await expired(queue) == []
    assert await queue.take(daemon="engine-1")


@pytest.mark.source("redis-stream")
async def test_a_plain_entry_that_was_moved_is_watched(queue: QueueUnderTest) -> None:
    document = {"image": "busybox", "expires_at": SOON.isoformat(), "id": "late", "queue": "low"}
    queue.xadd(json.dumps(document))
    delivery = await queue.take_one()
    task = parse_document(json.dumps(document).encode())
    assert await queue.store.place(delivery, task) == ("moved", "late")
    expire(queue, "late")
    assert await expired(queue) == [(b"late", b"expired")]
