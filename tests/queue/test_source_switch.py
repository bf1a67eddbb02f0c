"""Which kind of source the queues are, and how that changes."""

from __future__ import annotations

import pytest

from dispatcher.errors import ConfigurationError
from dispatcher.queue.exchange import Limits, SourceKind
from dispatcher.queue.recovery import Recovery
from dispatcher.queue.views import Views
from tests.queue.conftest import LEASE, STREAM, WEIGHTS, QueueUnderTest

BUSYBOX = '{"image": "busybox"}'
OTHER: dict[SourceKind, SourceKind] = {"redis-stream": "redis-list", "redis-list": "redis-stream"}


def told(queue: QueueUnderTest) -> str:
    found: bytes = queue.redis.hget(queue.key("meta:counters"), "source")
    return found.decode()


async def switched(queue: QueueUnderTest) -> str:
    """What an instance of the other kind is told that comes when all others have left."""
    await queue.tick("a", leave=True)
    verdict = (await queue.tick("b", source=OTHER[queue.source])).verdict
    if verdict == "ok":
        queue.source = OTHER[queue.source]
    return verdict


@pytest.mark.parametrize("how", ["a client", "another program", "another queue"])
async def test_with_tasks_waiting_it_is_refused_and_nothing_changes(queue: QueueUnderTest, how: str) -> None:
    if how == "a client":
        await queue.submit()
    else:
        queue.push(BUSYBOX, queue="low" if how == "another queue" else "default")
    await queue.tick("a", leave=True)
    before = {key: queue.redis.dump(key) for key in queue.redis.keys("*")}
    verdict = await queue.tick("b", source=OTHER[queue.source], queues=["default", "new"])
    assert verdict.verdict == "source"
    after = {key: queue.redis.dump(key) for key in queue.redis.keys("*")}
    assert {k: v for k, v in after.items() if b"meta:" not in k} == {
        k: v for k, v in before.items() if b"meta:" not in k
    }
    assert told(queue) == queue.source
    await queue.tick()
    assert len(await queue.take()) == 1


async def test_an_instance_that_may_not_join_is_told_why(queue: QueueUnderTest) -> None:
    await queue.submit()
    await queue.tick("a", leave=True)
    recovery = Recovery(
        queue.store,
        instance="b",
        incarnation="1",
        lease_seconds=LEASE,
        limits=Limits(),
        source=OTHER[queue.source],
        queues=WEIGHTS,
        daemon=lambda: "",
        info=lambda: "{}",
        on_promoted=lambda: None,
        on_evicted=lambda _: None,
    )
    with pytest.raises(ConfigurationError, match=f"QUEUE_SOURCE.*{OTHER[queue.source]}.*hold tasks"):
        await recovery.join()


async def test_while_others_live_by_the_one_kind_the_other_is_refused(queue: QueueUnderTest) -> None:
    assert (await queue.tick("b", source=OTHER[queue.source])).verdict == "source"
    queue.ask("ZADD", queue.key("meta:seen"), queue.now_ms() - int(LEASE * 1000) - 1, "a")
    assert (await queue.tick("b", source=OTHER[queue.source])).verdict == "ok"
    assert (await queue.tick("a")).verdict == "source"
    queue.source = OTHER[queue.source]


async def test_what_lies_in_no_stream_or_list_stays_as_it_is(queue: QueueUnderTest) -> None:
    for task_id in ("ready", "held", "ended"):
        await queue.submit(id=task_id)
    ready, held, ended = await queue.take()
    await queue.finish(ready, "release")
    await queue.finish(ended)
    await queue.submit(id="later", delay=60.0)
    assert await switched(queue) == "ok"
    assert await queue.renew(held) == "ok"
    queue.push(BUSYBOX)
    await queue.submit(id="new")
    assert (await Views(queue.store).queues())[0].depth == 3
    plain = {d.task_id for d in await queue.take()} - {"ready", "new"}
    assert len(plain) == 1
    assert queue.due().keys() == {"later"}


async def test_there_and_back_again(queue: QueueUnderTest) -> None:
    for number in range(4):
        await queue.submit(id=f"{number}-{told(queue)}")
        queue.push(BUSYBOX, queue="high")
        assert len(await queue.take()) == 2
        assert await switched(queue) == "ok"
        await queue.tick("b", leave=True, source=queue.source)
        await queue.tick("a")


async def test_what_somebody_deleted_to_switch_comes_back(queue: QueueUnderTest) -> None:
    for number in range(3):
        await queue.submit(id=f"t{number}")
    queue.push(BUSYBOX)
    queue.redis.delete(STREAM)
    assert await switched(queue) == "ok"
    assert [d.task_id for d in await queue.take()] == ["t0", "t1", "t2"]


@pytest.mark.source("redis-list")
async def test_before_the_first_instance_clients_and_others_are_served(queue: QueueUnderTest) -> None:
    queue.redis.flushall()
    queue.push(BUSYBOX)
    await queue.submit(id="mine")
    (info,) = await Views(queue.store).queues()
    assert info.depth == 2
    assert [status.id for status in await Views(queue.store).tasks()] == ["mine"]
    await queue.tick()
    plain, mine = await queue.take()
    assert (plain.fields is None, mine.task_id) == (False, "mine")


@pytest.mark.source("redis-list")
async def test_before_the_first_instance_many_clients_do_not_keep_it_from_lists(
    queue: QueueUnderTest,
) -> None:
    queue.redis.flushall()
    ids = [await queue.submit() for _ in range(1_100)]
    assert (await queue.tick()).verdict == "ok"
    assert sorted(d.task_id for d in await queue.take(2_000)) == sorted(ids)


@pytest.mark.source("redis-list")
async def test_plain_entries_are_not_lost_to_lists(queue: QueueUnderTest) -> None:
    queue.redis.flushall()
    await queue.submit(id="mine")
    queue.xadd(BUSYBOX)
    assert (await queue.tick()).verdict == "source"
    queue.source = "redis-stream"
    await queue.tick()
    assert len(await queue.take()) == 2


@pytest.mark.source("redis-list")
async def test_an_entry_added_to_an_empty_list_is_told_and_can_be_taken_away(queue: QueueUnderTest) -> None:
    await queue.submit(id="kept", queue="high")
    queue.xadd(BUSYBOX)
    assert (await queue.tick()).unusable == ("default",)
    depths = {q.name: q.depth for q in await Views(queue.store).queues()}
    assert depths == {"default": 0, "high": 1, "low": 0}
    assert [status.id for status in await Views(queue.store).tasks()] == ["kept"]
    assert [d.task_id for d in await queue.take()] == ["kept"], "other queues go on"
    queue.redis.delete(STREAM)
    assert (await queue.tick()).unusable == ()
