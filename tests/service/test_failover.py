"""An instance whose Redis fails over goes on with the next master. Real servers and sentinels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from dispatcher.client import AsyncClient, State
from dispatcher.errors import QueueUnavailable
from tests.support.sentinel import SentinelsUnderTest, sentinels
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until

TIMEOUT = 40.0


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[SentinelsUnderTest]:
    with sentinels(tmp_path / "redis") as found:
        yield found


@pytest.mark.timeout(120)
async def test_tasks_go_on_when_the_master_dies(guarded: SentinelsUnderTest, tmp_path: Path) -> None:
    system = ProcessSystem(guarded.master(), tmp_path)
    go, ran = tmp_path / "go", tmp_path / "ran"
    script = f"echo $DISPATCHER_TASK_ID >> {ran}; until [ -e {go} ]; do sleep 0.05; done"
    ends: list[State] = []
    async with (
        AsyncClient(guarded.url) as client,
        system.instance(redis_url=guarded.url, num_consumers=2) as instance,
        anyio.create_task_group() as group,
    ):
        handles = [await client.submit(system.task(script)) for _ in range(6)]

        async def wait(index: int) -> None:
            ends.append((await handles[index].wait(TIMEOUT)).state)

        for index in range(len(handles)):
            group.start_soon(wait, index)
        await wait_until(lambda: ran.exists() and len(ran.read_text().split()) == 2, TIMEOUT)
        guarded.replicated()
        killed = guarded.kill_master()
        await wait_until(lambda: "redis" in instance.ready, TIMEOUT)
        await wait_until(lambda: guarded.master().port != killed.port, TIMEOUT)
        await wait_until(lambda: not instance.ready, TIMEOUT)
        go.touch()

        new = system.task("exit 3", id="after-the-failover")
        while True:
            try:
                await client.submit(new)
                break
            except QueueUnavailable:
                await anyio.sleep(0.05)
        assert (await client.wait("after-the-failover", timeout=TIMEOUT)).exit_code == 3

        # The doorbell rings for what it is told on the new master.
        long = await client.submit(system.task("sleep 600", grace_period=0.2))
        await wait_until(lambda: long.id in instance.keeper.held, TIMEOUT)
        await long.cancel()
        assert (await long.wait(TIMEOUT)).state is State.CANCELLED
    assert ends == [State.SUCCEEDED] * 6
    assert sorted(ran.read_text().split()) == sorted(handle.id for handle in handles)
