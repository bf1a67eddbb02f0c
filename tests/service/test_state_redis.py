"""A Redis for output that is dead or hangs costs output, and no task any time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
import structlog

from dispatcher.client import AsyncClient, State
from dispatcher.dispatch.logs import MAX_KEEPING
from dispatcher.errors import OutputUnavailable
from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, free_port, start
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until

TIMEOUT = 30.0
#: Each of these tasks waited a second for the output's Redis once; two run at a time.
TASKS = 60


class StateRedis:
    """A server of its own for output."""

    def __init__(self, server: RedisUnderTest) -> None:
        self.server = server

    def stop(self) -> str:
        """It takes connections and answers nothing."""
        os.kill(self.server.pid, signal.SIGSTOP)
        return self.server.url

    def go_on(self) -> None:
        os.kill(self.server.pid, signal.SIGCONT)

    def nowhere(self) -> str:
        """Nobody listens there."""
        return f"redis://127.0.0.1:{free_port()}/0"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateRedis]:
    (tmp_path / "state").mkdir()
    process, server = start(tmp_path / "state")
    yield StateRedis(server)
    process.kill()
    process.wait(END_TIMEOUT)


@pytest.mark.parametrize("how", [StateRedis.stop, StateRedis.nowhere], ids=["hangs", "is dead"])
async def test_tasks_go_on_without_delay(
    process_system: ProcessSystem, state: StateRedis, how: Callable[[StateRedis], str]
) -> None:
    url = how(state)
    system = process_system
    with structlog.testing.capture_logs() as logged:
        async with (
            AsyncClient(system.redis.url, state_url=url) as client,
            system.instance(state_redis_url=url, num_consumers=2) as instance,
        ):
            with anyio.fail_after(20):
                handles = [await client.submit(system.task("echo hi")) for _ in range(TASKS)]
                for handle in handles:
                    assert (await handle.wait()).state is State.SUCCEEDED
            long = await client.submit(system.task("echo begun; sleep 600", grace_period=0.2))
            await wait_until(lambda: long.id in instance.logs._running, TIMEOUT)
            with anyio.fail_after(12), pytest.raises(OutputUnavailable, match="STATE_REDIS_URL"):
                await client.tail(long.id)
            with anyio.fail_after(5):
                await long.cancel()
                assert (await long.wait()).state is State.CANCELLED
            with anyio.fail_after(12), pytest.raises(OutputUnavailable, match="the tasks go on"):
                [line async for line in long.logs()]
            with system.redis.client() as redis:
                assert redis.xlen("{dispatcher:tasks}:results") == TASKS + 1
            with anyio.fail_after(5):
                instance.drain()
                await wait_until(lambda: instance.lifecycle == "stopped", TIMEOUT)
    assert {event["task_id"] for event in logged if event["event"] == "task.output_not_kept"}


async def test_output_is_kept_again_when_it_is_back(process_system: ProcessSystem, state: StateRedis) -> None:
    url = state.stop()
    system = process_system
    async with (
        AsyncClient(system.redis.url, state_url=url) as client,
        system.instance(state_redis_url=url) as instance,
    ):
        early = await client.submit(system.task("echo early"))
        assert (await early.wait(TIMEOUT)).state is State.SUCCEEDED
        state.go_on()

        async def kept() -> bool:
            return bool(await client.tail(early.id))

        await wait_until(kept, TIMEOUT)
        await wait_until(lambda: instance.logs._prompt, TIMEOUT)
        late = await client.submit(system.task("echo late"))
        await late.wait(TIMEOUT)
        assert [line async for line in late.logs()] == ["late"], "it is there as soon as the task has ended"


async def test_a_hanging_redis_takes_no_more_than_some_memory(
    process_system: ProcessSystem, state: StateRedis
) -> None:
    url = state.stop()
    system = process_system
    count = MAX_KEEPING + 20
    with structlog.testing.capture_logs() as logged:
        async with (
            AsyncClient(system.redis.url, state_url=url) as client,
            system.instance(state_redis_url=url, num_consumers=20) as instance,
        ):
            handles = await client.submit_many([system.task("echo hi") for _ in range(count)])
            for handle in handles:
                assert (await client.wait(handle.id, timeout=TIMEOUT)).state is State.SUCCEEDED  # type: ignore[union-attr]
                assert instance.logs._keeping <= MAX_KEEPING
            state.go_on()
            await wait_until(lambda: instance.logs._keeping == 0, TIMEOUT)
    assert all("STATE_REDIS_URL" in e["error"] or "too many" in e["error"] for e in logged if "error" in e)
