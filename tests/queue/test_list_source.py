"""The doorbell of lists, which waits without taking, and the taking beside it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from dispatcher.model import Delivery
from dispatcher.queue import connection as connection_module
from dispatcher.queue import source as source_module
from dispatcher.queue.list import ListSource
from dispatcher.queue.store import Store
from tests.queue.conftest import LEASE, STREAM, WEIGHTS, QueueUnderTest, listening
from tests.support import redis_server as servers
from tests.support.waiting import wait_until

pytestmark = pytest.mark.source("redis-list")

BUSYBOX = '{"image": "busybox"}'


def source_of(
    store: Store,
    url: str,
    instance: str = "a",
    *,
    queues: Mapping[str, int] = WEIGHTS,
    on_control: Callable[[str, str, str], None] = lambda *_: None,
) -> ListSource:
    return ListSource(
        store,
        url,
        instance=instance,
        incarnation="1",
        lease_seconds=LEASE,
        queues=queues,
        daemon="engine-1",
        on_control=on_control,
    )


@pytest.fixture
def source(queue: QueueUnderTest) -> ListSource:
    return source_of(queue.store, queue.server.url)


def blocked(queue: QueueUnderTest) -> list[int]:
    """Connections that wait for a list."""
    return [int(c["id"]) for c in queue.redis.client_list() if c["cmd"] == "blmove" and "b" in c["flags"]]


def numbered(count: int, *, start: int = 0) -> list[str]:
    return [json.dumps({"image": "busybox", "user": str(n)}) for n in range(start, start + count)]


def number(delivery: Delivery) -> int:
    assert delivery.fields
    return int(json.loads(delivery.fields[0][1])["user"])


# --- the bell ---------------------------------------------------------------------------


@pytest.mark.usefixtures("no_polling")
@pytest.mark.parametrize("name", list(WEIGHTS))
async def test_it_rings_for_what_is_added_to_any_of_its_queues(
    queue: QueueUnderTest, source: ListSource, name: str
) -> None:
    assert await source.take(1) == []
    async with listening(source):
        with anyio.fail_after(10):
            queue.push(BUSYBOX, queue=name)
            await source.wait()
            assert [d.queue for d in await source.take(5)] == [name]
            task_id = await queue.submit(queue=name)
            await source.wait()
            assert [d.task_id for d in await source.take(5)] == [task_id]


@pytest.mark.usefixtures("no_polling")
@pytest.mark.parametrize("who", ["a client", "another program"])
async def test_it_rings_for_what_was_there_before(
    queue: QueueUnderTest, source: ListSource, who: str
) -> None:
    await queue.submit() if who == "a client" else queue.push(BUSYBOX)
    async with listening(source):
        with anyio.fail_after(10):
            await source.wait()
    assert queue.length() == 1


@pytest.mark.usefixtures("no_polling")
async def test_it_rings_again_for_what_a_look_has_left(queue: QueueUnderTest, source: ListSource) -> None:
    queue.push(*numbered(3))
    taken = []
    async with listening(source):
        with anyio.fail_after(10):
            for _ in range(3):
                await source.wait()
                taken += [number(d) for d in await source.take(1)]
    assert taken == [0, 1, 2]


async def test_a_paused_queue_makes_no_busy_loop(
    queue: QueueUnderTest, source: ListSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "POLL_SECONDS", 0.2)
    queue.push(*numbered(50))
    await queue.store.pause("default", paused=True)
    queue.ask("CONFIG", "RESETSTAT")
    rounds = 10
    async with listening(source):
        await source.wait()
        began = time.monotonic()
        for _ in range(rounds):
            assert await source.take(5) == []
            await source.wait()
    # A look without a ring may be followed by one that the ring just missed; both come each 0.1 s at most.
    assert time.monotonic() - began > 0.3, "a look that found nothing is followed by a pause"
    assert queue.calls("blmove") <= rounds + 2 * len(WEIGHTS)
    await queue.store.pause("default", paused=False)


@pytest.mark.usefixtures("no_polling")
async def test_elements_beyond_the_consumers_make_no_busy_loop(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "BLOCK_TIMEOUT", 0.1)
    queue.push(*numbered(50))
    source = source_of(queue.store, queue.server.url, queues={"default": 1})
    await source.take(1)
    queue.ask("CONFIG", "RESETSTAT")
    async with listening(source):
        await source.wait()
        await wait_until(lambda: queue.calls("xread") > 5)
        assert queue.calls("blmove") == 1, "until somebody has looked there is nothing to wait for"
        assert [number(d) for d in await source.take(1)] == [1]
        await wait_until(lambda: queue.calls("blmove") == 2)


@pytest.mark.usefixtures("no_polling")
async def test_cut_connections_are_made_again(queue: QueueUnderTest, source: ListSource) -> None:
    async with listening(source):
        with anyio.fail_after(20):
            for n in range(3):
                cut = await wait_until(lambda: found if len(found := blocked(queue)) == 3 else [])
                for client_id in cut:
                    queue.redis.client_kill_filter(_id=client_id)
                queue.push(*numbered(1, start=n))
                await source.wait()
                assert [number(d) for d in await source.take(5)] == [n]


async def test_who_is_unblocked_or_hears_of_another_type_listens_again(
    queue: QueueUnderTest, source: ListSource
) -> None:
    async with listening(source):
        with anyio.fail_after(20):
            [*before] = await wait_until(lambda: found if len(found := blocked(queue)) == 3 else [])
            queue.redis.client_unblock(before[0], error=True)
            queue.redis.xadd(queue.stream("low"), {"task": BUSYBOX})  # the wrong command for a list
            await wait_until(lambda: queue.calls("blmove") > 5)
            queue.redis.delete(queue.stream("low"))
            queue.push(BUSYBOX, queue="low")
            await wait_until(lambda: len(blocked(queue)) == 2)
            await source.wait()
            assert len(await source.take(5)) == 1


async def test_out_of_memory_it_is_looked_for_all_the_same(
    queue: QueueUnderTest, source: ListSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "POLL_SECONDS", 0.1)
    queue.push(*numbered(2))
    queue.ask("CONFIG", "SET", "maxmemory", "1")
    taken: list[int] = []
    async with listening(source):
        with anyio.fail_after(10):
            while len(taken) < 2:
                await source.wait()
                taken += [number(d) for d in await source.take(1)]
    assert taken == [0, 1]


async def test_control_messages_arrive_and_ring_nothing(queue: QueueUnderTest) -> None:
    heard: list[tuple[str, str, str]] = []
    source = source_of(queue.store, queue.server.url, on_control=lambda *message: heard.append(message))
    await queue.store.tell("a", "tail", "one", "asker")
    async with listening(source):
        await wait_until(lambda: len(heard) == 1)
        await queue.store.tell("a", "follow", "two")
        await wait_until(lambda: len(heard) == 2)
    assert heard == [("tail", "one", "asker"), ("follow", "two", "")]


async def test_it_survives_a_restart_of_redis(tmp_path: Path) -> None:
    process, server = servers.start(tmp_path, "--appendfsync", "always")
    under_test = QueueUnderTest(server, "redis-list")
    source = source_of(under_test.store, server.url)
    taken: list[int] = []
    try:
        await under_test.tick()
        async with listening(source):
            await wait_until(lambda: len(blocked(under_test)) == 3)
            under_test.push(*numbered(1))
            process.kill()
            process.wait()
            process, server = servers.start(tmp_path, "--appendfsync", "always")
            under_test.push(*numbered(1, start=1))
            with anyio.fail_after(20):
                await source.wait()
                taken += [number(d) for d in await source.take(5)]
        assert taken == [0, 1]
    finally:
        await under_test.aclose()
        process.terminate()
        process.wait()


# --- several instances ------------------------------------------------------------------


@asynccontextmanager
async def instances(queue: QueueUnderTest, *names: str) -> AsyncIterator[list[ListSource]]:
    """Each with connections of its own, and its doorbell."""
    stores = [Store(queue.server.url, STREAM) for _ in names]
    try:
        sources = [
            source_of(store, queue.server.url, name) for store, name in zip(stores, names, strict=True)
        ]
        async with listening(*sources):
            yield sources
    finally:
        for store in stores:
            await store.aclose()


@pytest.mark.parametrize("cut", [False, True])
async def test_several_share_what_is_pushed_in_order_and_exactly_once(
    queue: QueueUnderTest, *, cut: bool
) -> None:
    count, part = 1_000, 50
    taken: dict[str, list[Delivery]] = {name: [] for name in "abc"}

    def done() -> bool:
        return sum(map(len, taken.values())) >= count

    async def read(name: str, source: ListSource) -> None:
        while not done():
            await source.wait()
            taken[name] += await source.take(7)

    async with instances(queue, *taken) as sources, anyio.create_task_group() as group:
        for name, source in zip(taken, sources, strict=True):
            group.start_soon(read, name, source)
        for first in range(0, count, part):
            queue.push(*numbered(part, start=first))
            for client_id in blocked(queue) if cut else []:
                queue.redis.client_kill_filter(_id=client_id)
            await anyio.lowlevel.checkpoint()
        with anyio.fail_after(40):
            await wait_until(done, 40)
    for mine in taken.values():
        assert [number(d) for d in mine] == sorted(number(d) for d in mine), "the oldest first"
    everything = [d for mine in taken.values() for d in mine]
    assert sorted(number(d) for d in everything) == list(range(count))
    assert len({d.task_id for d in everything}) == len({d.fence for d in everything}) == count
    assert queue.length() == 0
    for delivery in everything:
        assert await queue.finish(delivery) == "ok"


@pytest.mark.usefixtures("no_polling")
async def test_a_doorbell_of_each_instance_rings_for_one_task(queue: QueueUnderTest) -> None:
    async with instances(queue, *"abc") as sources:
        with anyio.fail_after(10):
            await wait_until(lambda: len(blocked(queue)) == 9)
            queue.push(BUSYBOX)
            for source in sources:
                await source.wait()
        assert queue.length() == 1, "a bell takes nothing"
        assert sorted([len(await source.take(1)) for source in sources]) == [0, 0, 1]
