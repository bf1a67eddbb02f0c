"""The doorbell and the taking of one instance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from dispatcher.queue import source as source_module
from dispatcher.queue.store import Store
from dispatcher.queue.stream import StreamSource
from tests.queue.conftest import GROUP, LEASE, LONG, STREAM, WEIGHTS, QueueUnderTest, listening
from tests.support import redis_server as servers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.source("redis-stream")


def source_of(
    store: Store, url: str, on_control: Callable[[str, str, str], None] = lambda *_: None
) -> StreamSource:
    return StreamSource(
        store,
        url,
        instance="a",
        incarnation="1",
        lease_seconds=LEASE,
        queues=WEIGHTS,
        daemon="engine-1",
        on_control=on_control,
    )


@pytest.mark.usefixtures("no_polling")
@pytest.mark.parametrize("name", list(WEIGHTS))
async def test_it_rings_for_what_is_added_to_any_of_its_queues(queue: QueueUnderTest, name: str) -> None:
    source = source_of(queue.store, queue.server.url)
    assert await source.take(1) == []
    async with listening(source):
        with anyio.fail_after(5):
            task_id = queue.xadd('{"image": "busybox"}', name)
            await source.wait()
            assert [d.task_id for d in await source.take(5)] == [task_id]
            task_id = await queue.submit(queue=name)
            await source.wait()
            assert [d.task_id for d in await source.take(5)] == [task_id]


@pytest.mark.usefixtures("no_polling")
async def test_it_rings_for_what_was_there_before(queue: QueueUnderTest) -> None:
    await queue.submit()
    source = source_of(queue.store, queue.server.url)
    async with listening(source):
        with anyio.fail_after(5):
            await source.wait()


async def test_it_is_looked_for_without_a_ring(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "POLL_SECONDS", 0.02)
    with anyio.fail_after(5):
        await source_of(queue.store, queue.server.url).wait()


@pytest.mark.usefixtures("no_polling")
async def test_a_ring_between_taking_and_waiting_is_heard(queue: QueueUnderTest) -> None:
    source = source_of(queue.store, queue.server.url)
    await source.take(1)
    source.ring()
    with anyio.fail_after(5):
        await source.wait()


async def test_control_messages_arrive_once_in_order_and_ring_nothing(queue: QueueUnderTest) -> None:
    heard: list[tuple[str, str, str]] = []
    source = source_of(queue.store, queue.server.url, lambda *message: heard.append(message))
    await queue.store.tell("a", "tail", "one", "asker")
    async with listening(source):
        await wait_until(lambda: len(heard) == 1)
        await queue.submit(id="two")
        owner = (await queue.take_one("a")).owner
        await queue.store.cancel("two")
        await queue.store.tell("b", "follow", "three")
        await queue.store.tell("a", "follow", "four")
        await wait_until(lambda: len(heard) == 3)
    assert heard == [("tail", "one", "asker"), ("cancel", "two", owner), ("follow", "four", "")]


async def test_a_control_message_that_is_junk_ends_nothing(queue: QueueUnderTest) -> None:
    heard: list[tuple[str, str, str]] = []
    source = source_of(queue.store, queue.server.url, lambda *message: heard.append(message))
    queue.redis.xadd(queue.key("control:a"), {b"\xff": b"\xff"})
    queue.redis.xadd(queue.key("control:a"), {b"op": b"\xff"})
    async with listening(source):
        await queue.store.tell("a", "follow", "one")
        await wait_until(lambda: ("follow", "one", "") in heard)
    queue.redis.delete(queue.key("control:a"))


async def test_entries_that_nobody_here_can_take_make_no_busy_loop(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, rounds = 50, 5
    monkeypatch.setattr(source_module, "RING_PAUSE", 0.0)
    for _ in range(entries):
        queue.xadd('{"image": "busybox"}')
    queue.ask("XREADGROUP", "GROUP", GROUP, "foreign", "COUNT", entries, "STREAMS", STREAM, ">")
    queue.ask("CONFIG", "RESETSTAT")
    source = source_of(queue.store, queue.server.url)
    async with listening(source):
        await wait_until(lambda: queue.calls("xread") > entries)
        queue.ask("CONFIG", "RESETSTAT")
        monkeypatch.setattr(source_module, "POLL_SECONDS", 0.2)
        for _ in range(rounds):
            assert await source.take(5) == []
            await source.wait()
    assert queue.calls("xread") <= 2
    assert queue.calls("evalsha") <= rounds + 1
    queue.redis.delete(STREAM)


async def test_entries_beyond_the_consumers_make_no_busy_loop(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "RING_PAUSE", LONG)
    for number in range(50):
        queue.xadd(f'{{"image": "busybox", "user": "{number}"}}')
    source = source_of(queue.store, queue.server.url)
    await source.take(1)
    queue.ask("CONFIG", "RESETSTAT")
    async with listening(source):
        await wait_until(lambda: queue.calls("xread") == 2)
        await source.wait()
    assert queue.calls("xread") == 2


async def test_it_survives_a_restart_of_redis(tmp_path: Path) -> None:
    heard: list[str] = []
    process, server = servers.start(tmp_path)
    store = Store(server.url, STREAM)
    source = source_of(store, server.url, lambda _, task_id, __: heard.append(task_id))
    try:
        async with listening(source):
            await store.tell("a", "follow", "before")
            await wait_until(lambda: heard == ["before"])
            process.terminate()
            process.wait()
            process, server = servers.start(tmp_path)
            with server.client() as client:
                client.xadd(store.keys.control("a"), {"op": "follow", "id": "after"})
            await wait_until(lambda: heard == ["before", "after"])
    finally:
        await store.aclose()
        process.terminate()
        process.wait()
