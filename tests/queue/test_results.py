"""Many wait for ends; one of them reads the results for all."""

from __future__ import annotations

import anyio
import pytest

from dispatcher.errors import TaskNotFound
from dispatcher.model import State
from dispatcher.queue import results
from dispatcher.queue.results import Results
from dispatcher.queue.views import Views
from tests.queue.conftest import QueueUnderTest
from tests.support.waiting import wait_until

LONG = 600.0


@pytest.fixture
def waits(queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Results that only the stream tells, not the looks in between."""
    monkeypatch.setattr(results, "LOOK_SECONDS", LONG)
    return Results(queue.store, Views(queue.store))


def readers(queue: QueueUnderTest) -> int:
    """Clients that block in a read."""
    return int(queue.redis.info("clients")["blocked_clients"])


async def test_an_end_is_told_to_who_waits(queue: QueueUnderTest, waits: Results) -> None:
    await queue.submit(id="one")
    delivery = await queue.take_one()
    ended = []
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                ended.append(await waits.wait("one"))

            group.start_soon(wait)
            await wait_until(lambda: readers(queue) == 1)
            await queue.finish(delivery)
    assert (ended[0].id, ended[0].state, ended[0].exit_code) == ("one", State.SUCCEEDED, 0)


async def test_what_ended_before_is_told_at_once(queue: QueueUnderTest, waits: Results) -> None:
    await queue.submit(id="one")
    await queue.finish(await queue.take_one())
    with anyio.fail_after(5):
        assert (await waits.wait("one")).state is State.SUCCEEDED


async def test_nobody_waits_for_an_unknown_task(waits: Results) -> None:
    with pytest.raises(TaskNotFound):
        await waits.wait("nobody")


async def test_of_many_who_wait_one_reads(queue: QueueUnderTest, waits: Results) -> None:
    many = 300
    for number in range(many):
        await queue.submit(id=f"t{number}")
    taken = await queue.take(many)
    ended: list[str] = []

    async def wait(task_id: str) -> None:
        ended.append((await waits.wait(task_id)).id)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for delivery in taken:
                group.start_soon(wait, delivery.task_id)
                group.start_soon(wait, delivery.task_id)
            await wait_until(lambda: readers(queue) == 1)
            for delivery in taken:
                await queue.finish(delivery)
                assert readers(queue) <= 1
    assert sorted(ended) == sorted([d.task_id for d in taken] * 2)


async def test_when_the_reader_gives_up_another_reads_on(queue: QueueUnderTest, waits: Results) -> None:
    await queue.submit(id="one")
    await queue.submit(id="two")
    taken = {d.task_id: d for d in await queue.take()}
    ended = []
    leader = anyio.CancelScope()

    async def lead() -> None:
        with leader:
            await waits.wait("one")

    async def follow() -> None:
        ended.append(await waits.wait("two"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(lead)
            await wait_until(lambda: readers(queue) == 1)
            group.start_soon(follow)
            await anyio.wait_all_tasks_blocked()
            leader.cancel()
            await queue.finish(taken["two"])
    assert ended[0].id == "two"


async def test_a_result_that_was_trimmed_before_it_was_read_is_found_by_a_look(
    queue: QueueUnderTest, waits: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LOOK_SECONDS", 0.1)
    task_id = await queue.submit()
    delivery = await queue.take_one()
    ended = []

    async def wait() -> None:
        ended.append(await waits.wait(task_id))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await wait_until(lambda: readers(queue) == 1)
            record = queue.record(task_id)
            await queue.finish(delivery)
            # As if the entry had never come by: the record alone tells.
            queue.redis.delete(queue.key("results"))
    assert record["state"] == "queued"
    assert ended[0].state is State.SUCCEEDED


async def test_two_who_begin_together_miss_nothing(
    queue: QueueUnderTest, waits: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    await queue.submit(id="one")
    await queue.submit(id="two")
    taken = {d.task_id: d for d in await queue.take()}
    newest, read = waits._newest, waits._read
    asked, reads, go_on, both_began = [0], [0], anyio.Event(), anyio.Event()

    async def slow_for_the_second() -> str:
        asked[0] += 1
        if asked[0] == 1:
            return await newest()
        await go_on.wait()
        answer = await newest()
        both_began.set()
        return answer

    async def after_both_began() -> None:
        reads[0] += 1
        await both_began.wait()
        await read()

    monkeypatch.setattr(waits, "_newest", slow_for_the_second)
    monkeypatch.setattr(waits, "_read", after_both_began)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(waits.wait, "one")
            group.start_soon(waits.wait, "two")
            # The first has looked at its task; its end comes before the second's answer does.
            await wait_until(lambda: reads[0] == 1)
            await queue.finish(taken["one"])
            go_on.set()
            await queue.finish(taken["two"])
