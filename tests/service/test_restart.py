"""An instance ends, by plan or not: what it ran goes on, and is started no second time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from dispatcher.client import AsyncClient, State
from dispatcher.service import Dispatcher
from tests.support.system import DockerSystem, ProcessSystem, System
from tests.support.waiting import wait_until

TIMEOUT = 30


def gated(marks: Path) -> str:
    """A script that notes its start and waits for a file before it ends with 4."""
    return f"echo started >> {marks}/starts; until [ -e {marks}/go ]; do sleep 0.05; done; exit 4"


def in_state(client: AsyncClient, task_id: str, state: State) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return (await client.status(task_id)).state is state

    return look


async def drained(system: System, client: AsyncClient, **flags: object) -> None:
    """Run an instance until the client's one task runs, then drain it to its end."""
    async with system.instance(**flags) as dispatcher:
        [task] = await client.tasks()
        await wait_until(in_state(client, task.id, State.RUNNING), TIMEOUT)
        await stopped(dispatcher)


async def stopped(dispatcher: Dispatcher) -> None:
    dispatcher.drain()
    await wait_until(lambda: dispatcher.lifecycle == "stopped", TIMEOUT)


async def test_draining_waits_for_what_runs(process_system: ProcessSystem) -> None:
    async with process_system.client() as client:
        handle = await client.submit(process_system.task("sleep 0.5; exit 4"))
        await drained(process_system, client)
        status = await handle.status()
        assert (status.state, status.exit_code, status.attempt) == (State.FAILED, 4, 1)


async def test_what_does_not_end_in_time_is_adopted_by_the_next(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    async with process_system.client() as client:
        handle = await client.submit(process_system.task(gated(marks)))
        await drained(process_system, client, drain_timeout=0)
        assert (await handle.status()).state is State.RUNNING
        async with process_system.instance():
            (marks / "go").touch()
            status = await handle.wait(TIMEOUT)
        assert (status.exit_code, status.attempt) == (4, 1)
        assert (marks / "starts").read_text() == "started\n"


async def test_what_a_dead_instance_ran_is_adopted_after_its_lease(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    async with process_system.client() as client:
        async with process_system.instance(instance_id="dead", lease_seconds=1):
            handle = await client.submit(process_system.task(gated(marks)))
            await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
        async with process_system.instance(instance_id="heir", lease_seconds=1):
            (marks / "go").touch()
            status = await handle.wait(TIMEOUT)
        assert (status.exit_code, status.attempt, status.takeovers) == (4, 1, 1)
        assert (marks / "starts").read_text() == "started\n"


async def test_a_container_is_adopted_and_started_once_by_the_engines_word(
    docker_system: DockerSystem,
) -> None:
    async with docker_system.client() as client:
        handle = await client.submit(docker_system.task("sleep 3; echo done; exit 4"))
        since = (await client.status(handle.id)).accepted_at
        assert since is not None
        await drained(docker_system, client, drain_timeout=0)
        async with docker_system.instance():
            status = await handle.wait(TIMEOUT)
        assert (status.exit_code, status.attempt) == (4, 1)
        assert [line async for line in handle.logs()] == ["done"]
        starts = docker_system.engine.start_events("dispatcher-", since.timestamp())
        assert [count for name, count in starts.items() if handle.id in name] == [1]


async def test_what_has_not_begun_goes_back_when_draining(process_system: ProcessSystem) -> None:
    async with process_system.client() as client:
        async with process_system.instance(num_consumers=1) as dispatcher:
            first = await client.submit(process_system.task("sleep 0.5"))
            await wait_until(in_state(client, first.id, State.RUNNING), TIMEOUT)
            second = await client.submit(process_system.task("exit 0"))
            await stopped(dispatcher)
            assert (await first.status()).state is State.SUCCEEDED
            assert (await second.status()).state is State.QUEUED
        async with process_system.instance():
            assert (await second.wait(TIMEOUT)).state is State.SUCCEEDED


async def test_a_second_call_to_drain_does_not_wait(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    async with process_system.client() as client, process_system.instance(drain_timeout=3600) as dispatcher:
        handle = await client.submit(process_system.task(gated(marks)))
        await wait_until(in_state(client, handle.id, State.RUNNING), TIMEOUT)
        dispatcher.drain()
        dispatcher.drain()
        await wait_until(lambda: dispatcher.lifecycle == "stopped", TIMEOUT)
        (marks / "go").touch()


async def test_an_instance_leaves_the_list_when_it_has_drained(process_system: ProcessSystem) -> None:
    async with process_system.client() as client, process_system.instance(instance_id="gone") as dispatcher:
        assert [instance.id for instance in await client.instances()] == ["gone"]
        await stopped(dispatcher)
        assert await client.instances() == []
        with process_system.redis.client() as redis:
            assert redis.xinfo_consumers("dispatcher:tasks", "dispatchers") == []
        await anyio.lowlevel.checkpoint()
