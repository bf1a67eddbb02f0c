"""Redis behind sentinels: whoever is connected follows the master. Real servers and sentinels."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import pytest

from dispatcher.client import AsyncClient, State, Task
from dispatcher.errors import ConfigurationError, QueueUnavailable
from dispatcher.model import Outcome
from dispatcher.queue.connection import command, connect
from dispatcher.queue.exchange import Settlement
from dispatcher.queue.store import Store
from tests.support.redis_server import free_port
from tests.support.sentinel import MASTER, SentinelsUnderTest, sentinels
from tests.support.waiting import wait_until

STREAM = "dispatcher:tasks"
LEASE = 600.0
TIMEOUT = 30.0
DONE = Outcome(State.SUCCEEDED, exit_code=0)

T = TypeVar("T")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[SentinelsUnderTest]:
    with sentinels(tmp_path) as found:
        yield found


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[SentinelsUnderTest]:
    """Nothing started yet."""
    found = SentinelsUnderTest(tmp_path)
    try:
        yield found
    finally:
        found.end()


@pytest.fixture
async def store(guarded: SentinelsUnderTest) -> AsyncIterator[Store]:
    store = Store(guarded.url, STREAM, max_connections=4)
    yield store
    await store.aclose()


async def persisted(verb: Callable[[], Awaitable[T]]) -> T:
    """Repeat until Redis answers, as every loop of an instance does."""
    with anyio.fail_after(TIMEOUT):
        while True:
            try:
                return await verb()
            except QueueUnavailable:
                await anyio.sleep(0.05)


async def take(store: Store) -> list[tuple[str, str]]:
    taken = await store.take(
        10, instance="a", incarnation="1", lease=LEASE, queues={"default": 1}, daemon="d"
    )
    return [(delivery.task_id, delivery.owner) for delivery in taken]


async def test_what_was_taken_is_finished_and_waited_for_after_the_master_died(
    guarded: SentinelsUnderTest, store: Store
) -> None:
    ends = []
    async with AsyncClient(guarded.url) as client, anyio.create_task_group() as group:
        first, second = [await client.submit(Task(image="busybox")) for _ in range(2)]
        taken = dict(await take(store))

        async def wait() -> None:
            ends.append((await first.wait(TIMEOUT)).state)

        group.start_soon(wait)
        with guarded.master().client() as redis:
            await wait_until(lambda: redis.info("clients")["blocked_clients"] > 0)
        guarded.replicated()
        killed = guarded.kill_master()
        finish = partial(store.finish, Settlement(first.id, taken[first.id], "final", DONE))
        assert await persisted(finish) == "ok"
        assert await store.renew_all([(second.id, taken[second.id])], LEASE) == ["ok"]
        third = await client.submit(Task(image="busybox"))
        assert [task_id for task_id, _ in await take(store)] == [third.id]
    assert ends == [State.SUCCEEDED]
    assert guarded.master().port != killed.port


async def test_a_master_that_became_a_replica_is_left(guarded: SentinelsUnderTest, store: Store) -> None:
    await persisted(store.ping)
    before = guarded.master()
    guarded.ask(guarded.sentinel_ports[0], "SENTINEL", "FAILOVER", MASTER)
    await wait_until(lambda: guarded.master().port != before.port, TIMEOUT)

    async def demoted() -> bool:
        return bool(guarded.ask(before.port, "ROLE")[0] == "slave")

    await wait_until(demoted, TIMEOUT)
    async with AsyncClient(guarded.url) as client:
        handle = await persisted(lambda: client.submit(Task(image="busybox", id="after")))
        assert [task_id for task_id, _ in await persisted(lambda: take(store))] == [handle.id]
        role = await command(store.redis, "ROLE")
    assert role[0] == b"master"


async def test_one_of_three_sentinels_is_enough(guarded: SentinelsUnderTest, store: Store) -> None:
    *first, _ = guarded.processes[2:]
    for process in first:
        process.kill()
        process.wait()
    async with anyio.create_task_group() as group:
        # More calls than connections: they wait for one another.
        for _ in range(40):
            group.start_soon(store.ping)


async def test_a_sentinel_that_hangs_holds_nobody_up_for_long(alone: SentinelsUnderTest) -> None:
    master = alone.server()
    _, hanging = alone.sentinel(master.port), free_port()
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=hanging) as _listener:
        # The kernel accepts its connections, and nobody ever answers.
        alone.sentinel_ports.insert(0, hanging)
        redis = connect(alone.url, max_connections=2)
        try:
            with anyio.fail_after(4):
                await persisted(lambda: command(redis, "PING"))
                await command(redis, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            with anyio.fail_after(0.9):  # now the one that answers is asked first
                async with anyio.create_task_group() as group:
                    for _ in range(2):
                        group.start_soon(command, redis, "PING")
        finally:
            await redis.aclose()


async def test_a_replica_that_a_sentinel_calls_master_is_not_used(alone: SentinelsUnderTest) -> None:
    master = alone.server()
    replica = alone.server("--replicaof", "127.0.0.1", str(master.port))
    alone.sentinel(replica.port, quorum=1)
    redis = connect(alone.url, max_connections=1)
    try:
        with pytest.raises(QueueUnavailable, match=f"127.0.0.1:{replica.port} is not the master any more"):
            await command(redis, "PING")
    finally:
        await redis.aclose()


async def test_passwords_of_servers_and_sentinels(alone: SentinelsUnderTest) -> None:
    server = alone.server("--requirepass", "")
    alone.ask(server.port, "CONFIG", "SET", "requirepass", "p@ss/word")
    alone.sentinel(server.port, f'sentinel auth-pass {MASTER} "p@ss/word"', 'requirepass "s&t"', quorum=1)
    where = alone.url.removeprefix("redis+sentinel://")

    async def role(url: str) -> object:
        redis = connect(url, max_connections=1)
        try:
            return (await command(redis, "ROLE"))[0]
        finally:
            await redis.aclose()

    right = f"redis+sentinel://:p%40ss%2Fword@{where}?sentinel_password=s%26t"
    assert await persisted(lambda: role(right)) == b"master"
    for url in (
        f"redis+sentinel://:p%40ss%2Fword@{where}",
        f"redis+sentinel://:p%40ss%2Fword@{where}?sentinel_password=hunter2",
        f"redis+sentinel://:hunter2@{where}?sentinel_password=s%26t",
    ):
        with pytest.raises(QueueUnavailable) as refused:
            await role(url)
        assert "hunter2" not in str(refused.value)
        assert "word" not in str(refused.value).replace("password", "")


async def test_what_no_sentinel_tells_is_told_in_one_line(alone: SentinelsUnderTest) -> None:
    server = alone.server()
    alone.sentinel(server.port, quorum=1)
    alone.sentinel_ports.append(free_port())
    redis = connect(alone.url.replace(MASTER, "nobody"), max_connections=1)
    try:
        with pytest.raises(QueueUnavailable) as refused:
            await command(redis, "PING")
    finally:
        await redis.aclose()
    first, second = (f"127.0.0.1:{port}: " for port in alone.sentinel_ports)
    assert f"where the master 'nobody' is; {first}it knows no master of this name; {second}" in str(
        refused.value
    )


def test_a_url_that_leads_nowhere_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="REDIS_URL: must name the master"):
        connect("redis+sentinel://localhost", max_connections=1)
