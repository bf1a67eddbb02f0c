"""A plain entry's task gets the id, key, queue and time that its document asks for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dispatcher.model import Delivery
from dispatcher.queue.views import Views
from dispatcher.task import Task
from tests.queue.conftest import QueueUnderTest


async def placed(under_test: QueueUnderTest, delivery: Delivery, **fields: Any) -> tuple[str, str]:
    return await under_test.store.place(delivery, Task(**({"image": "busybox"} | fields)))


async def plain(queue: QueueUnderTest, instance: str = "a") -> Delivery:
    queue.push('{"image": "busybox"}')
    return await queue.take_one(instance)


async def test_a_wanted_id_becomes_the_tasks_id(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    until = queue.members("index:leases")[delivery.task_id]
    assert await placed(queue, delivery, id="mine") == ("held", "mine")
    assert queue.record(delivery.task_id) == {}
    assert queue.members("index:open") == {"mine": delivery.accepted_ms}
    assert queue.members("index:leases") == {"mine": until}
    assert await queue.store.renew("mine", delivery.owner, 30) == "ok"
    assert await queue.renew(delivery) == "lost"


async def test_an_id_that_is_its_own_is_kept(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    assert await placed(queue, delivery, id=delivery.task_id) == ("held", delivery.task_id)


async def test_the_same_task_again_is_dropped_and_its_id_leads_to_the_first(queue: QueueUnderTest) -> None:
    first = await plain(queue)
    await placed(queue, first, id="mine")
    second = await plain(queue)
    assert await placed(queue, second, id="mine") == ("known", "mine")
    assert queue.members("index:open").keys() == {"mine"}
    assert queue.members("index:leases").keys() == {"mine"}
    assert queue.lifetime_ms(f"task:{second.task_id}") > 0
    assert (await Views(queue.store).task(second.task_id)).id == "mine"


async def test_a_task_that_a_client_submitted_is_known_to_a_plain_entry(queue: QueueUnderTest) -> None:
    await queue.submit(id="mine")
    delivery = (await queue.take_one(), await plain(queue))[1]
    assert await placed(queue, delivery, id="mine") == ("known", "mine")


async def test_an_id_that_stands_with_other_content_changes_nothing(queue: QueueUnderTest) -> None:
    await placed(queue, await plain(queue), id="mine")
    second = await plain(queue)
    before = queue.record("mine")
    assert await placed(queue, second, id="mine", command=["false"]) == ("conflict", "mine")
    assert queue.record("mine") == before
    assert await queue.renew(second) == "ok"


async def test_a_key_makes_two_entries_one_task(queue: QueueUnderTest) -> None:
    first = await plain(queue)
    assert await placed(queue, first, idempotency_key="k") == ("held", first.task_id)
    second = await plain(queue)
    assert await placed(queue, second, idempotency_key="k") == ("known", first.task_id)
    third = await plain(queue)
    assert await placed(queue, third, idempotency_key="k", command=["x"]) == ("conflict", first.task_id)
    assert await queue.submit(idempotency_key="k") == first.task_id


async def test_another_queue_moves_it_there(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    assert await placed(queue, delivery, queue="high") == ("moved", delivery.task_id)
    assert (queue.length("high"), queue.length()) == (1, 0)
    assert queue.members("index:leases") == {}
    again = await queue.take_one("b")
    assert (again.task_id, again.queue, again.fields) == (delivery.task_id, "high", None)
    assert again.document == b'{"image": "busybox"}'


async def test_a_queue_that_nobody_serves_changes_nothing(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    before = queue.record(delivery.task_id)
    verdict = await placed(queue, delivery, id="mine", idempotency_key="k", queue="nowhere")
    assert verdict == ("unknown_queue", delivery.task_id)
    assert queue.record(delivery.task_id) == before
    assert not queue.redis.keys(queue.key("key:*"))


async def test_a_delay_counts_from_the_entry(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    assert await placed(queue, delivery, id="mine", delay=60.0) == ("moved", "mine")
    assert queue.due("default") == {"mine": delivery.accepted_ms + 60_000}
    assert queue.record("mine")["state"] == "scheduled"
    assert queue.members("index:leases") == {}


@pytest.mark.source("redis-stream")
async def test_a_delay_that_is_over_holds_nothing_back(queue: QueueUnderTest) -> None:
    queue.ask("XADD", queue.stream("default"), "1700000000000-0", "task", '{"image":"busybox"}')
    delivery = await queue.take_one()
    assert (await placed(queue, delivery, delay=60.0))[0] == "held"


@pytest.mark.parametrize(("hours", "verdict"), [(1, "moved"), (-1, "held")])
async def test_not_before_schedules_what_is_to_come(queue: QueueUnderTest, hours: int, verdict: str) -> None:
    then = datetime.now(UTC) + timedelta(hours=hours)
    assert (await placed(queue, await plain(queue), not_before=then))[0] == verdict


async def test_a_scheduled_one_comes_in_its_own_queue(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    await placed(queue, delivery, queue="low", delay=60.0)
    assert queue.due("low").keys() == queue.due().keys() == {delivery.task_id}
    queue.fall_due()
    assert (await queue.tick()).promoted == 1
    assert (await queue.take_one(queues={"low": 1})).queue == "low"


async def test_who_is_no_owner_any_more_places_nothing(queue: QueueUnderTest) -> None:
    delivery = await plain(queue)
    queue.lapse(delivery)
    await queue.tick()
    assert (await placed(queue, delivery, id="mine"))[0] == "lost"
    assert queue.record("mine") == {}


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({"id": "mine"}, ("held", "mine")),
        ({"id": "mine", "delay": 60.0}, ("moved", "mine")),
        ({"id": "mine", "queue": "high"}, ("moved", "mine")),
        ({"id": "stands"}, ("known", "stands")),
    ],
)
async def test_a_call_whose_reply_was_lost_is_answered_the_same_again(
    queue: QueueUnderTest, fields: dict[str, Any], answer: tuple[str, str]
) -> None:
    await queue.submit(id="stands")
    await queue.take_one()
    delivery = await plain(queue)
    assert await placed(queue, delivery, **fields) == answer
    record = queue.record(answer[1])
    assert await placed(queue, delivery, **fields) == answer
    assert queue.record(answer[1]) == record


@pytest.mark.parametrize("queue_name", ["default", "high"])
async def test_a_call_without_an_id_is_answered_the_same_again(
    queue: QueueUnderTest, queue_name: str
) -> None:
    delivery = await plain(queue)
    first = await placed(queue, delivery, queue=queue_name, idempotency_key="k")
    assert await placed(queue, delivery, queue=queue_name, idempotency_key="k") == first
    assert queue.length(queue_name) == (first[0] == "moved")
