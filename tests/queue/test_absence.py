"""Whoever waits bears a restart of Redis, and not its absence from the beginning."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from dispatcher.client import AsyncClient, State, Task
from dispatcher.errors import QueueUnavailable
from dispatcher.model import Outcome
from dispatcher.queue.connection import Patience
from dispatcher.queue.exchange import Settlement
from dispatcher.queue.store import Store
from tests.support.redis_server import END_TIMEOUT, start

LEASE = 600.0


async def test_a_wait_and_a_follower_outlive_a_restart(tmp_path: Path) -> None:
    process, server = start(tmp_path, "--appendfsync", "always")
    store = Store(server.url, "dispatcher:tasks")
    ends = []
    try:
        async with AsyncClient(server.url) as client, anyio.create_task_group() as group:
            handle = await client.submit(Task(image="busybox"))
            [delivery] = await store.take(
                1, instance="a", incarnation="1", lease=LEASE, queues={"default": 1}, daemon="d"
            )
            await store.renew(handle.id, delivery.owner, LEASE, {"state": "running"})

            async def wait() -> None:
                ends.append((await handle.wait(30)).state)

            async def follow() -> None:
                async for _ in handle.logs(follow=True):
                    pytest.fail("nothing was written")
                ends.append((await handle.status()).state)

            group.start_soon(wait)
            group.start_soon(follow)
            with server.client() as redis:
                while redis.info("clients")["blocked_clients"] < 2:
                    await anyio.sleep(0.01)
            process.kill()
            process.wait(END_TIMEOUT)
            process, server = start(tmp_path, "--appendfsync", "always")
            done = Outcome(State.SUCCEEDED, exit_code=0)
            assert await store.finish(Settlement(handle.id, delivery.owner, "final", done)) == "ok"
        assert ends == [State.SUCCEEDED, State.SUCCEEDED]
    finally:
        await store.aclose()
        process.terminate()
        process.wait(END_TIMEOUT)


async def test_patience_has_a_beginning_and_an_end() -> None:
    error = QueueUnavailable("away")
    with pytest.raises(QueueUnavailable):
        await Patience(60).bear(error)
    patience = Patience(0.1)
    patience.answered()
    await patience.bear(error)
    with pytest.raises(QueueUnavailable):
        await patience.bear(error)
