"""Things that go wrong beside a task, and what must not follow from them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from redis import Redis

import dispatcher.service
from dispatcher.backends.base import Confirm
from dispatcher.backends.process import ProcessBackend
from dispatcher.client import AsyncClient, AsyncHandle, Reason, State
from dispatcher.errors import BackendError, BackendUnreachable, ConfigurationError
from dispatcher.model import Attempt, Handle, Health
from dispatcher.service import Dispatcher
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until

TIMEOUT = 30


def is_in(handle: AsyncHandle, state: State) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return (await handle.status()).state is state

    return look


async def left_over(system: ProcessSystem) -> list[Handle]:
    """Every container of this system, whoever made it."""
    with system.redis.client() as redis:
        namespace = redis.hget("{dispatcher:tasks}:meta:counters", "namespace")
    assert isinstance(namespace, bytes)
    backend = ProcessBackend(system.directory / "process")
    async with anyio.create_task_group() as group:
        await group.start(backend.run)
        found = await backend.find(namespace.decode())
        group.cancel_scope.cancel()
    return found


async def end(instance: Dispatcher) -> None:
    instance.drain()
    await wait_until(lambda: instance.lifecycle == "stopped", TIMEOUT)


async def ended(client: AsyncClient, handles: list[Any]) -> set[State]:
    return {(await client.wait(handle.id, timeout=TIMEOUT)).state for handle in handles}


async def test_nothing_is_left_of_what_ended_under_a_short_lease(process_system: ProcessSystem) -> None:
    async with process_system.client() as client, process_system.instance(lease_seconds=0.5) as instance:
        handles = await client.submit_many([process_system.task("exit 0") for _ in range(60)])
        assert await ended(client, handles) == {State.SUCCEEDED}
        await end(instance)
        assert await left_over(process_system) == []


async def test_a_drain_removes_what_ends_while_it_waits(process_system: ProcessSystem) -> None:
    async with process_system.client() as client, process_system.instance() as instance:
        handle = await client.submit(process_system.task("sleep 0.3"))
        await wait_until(is_in(handle, State.RUNNING), TIMEOUT)
        await end(instance)
        assert (await handle.status()).state is State.SUCCEEDED
        assert await left_over(process_system) == []


async def test_a_stop_that_fails_starts_no_second_attempt_beside_the_first(
    process_system: ProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ProcessBackend.stop
    failures: list[int] = []

    async def stop(self: ProcessBackend, handle: Handle, grace: float) -> None:
        if not failures:
            failures.append(handle.attempt)
            raise BackendError("the engine had a bad moment")
        await real(self, handle, grace)

    monkeypatch.setattr(ProcessBackend, "stop", stop)
    async with process_system.running() as client:
        handle = await client.submit(process_system.task("sleep 600", grace_period=0.2))
        await wait_until(is_in(handle, State.RUNNING), TIMEOUT)
        await handle.cancel()
        status = await handle.wait(TIMEOUT)
        assert (status.state, status.attempt, failures) == (State.CANCELLED, 1, [1])

        async def all_gone() -> bool:
            return not await left_over(process_system)

        await wait_until(all_gone, TIMEOUT)


async def test_what_runs_is_not_judged_by_a_policy_that_came_later(process_system: ProcessSystem) -> None:
    marks = process_system.directory
    async with process_system.client() as client:
        async with process_system.instance(drain_timeout=0) as instance:
            script = f"until [ -e {marks}/go ]; do sleep 0.05; done; exit 4"
            handle = await client.submit(process_system.task(script, timeout=600))
            await wait_until(is_in(handle, State.RUNNING), TIMEOUT)
            await end(instance)
        async with process_system.instance(task_default_timeout=5, task_max_timeout=5):
            await wait_until(is_in(handle, State.RUNNING), TIMEOUT)
            (marks / "go").touch()
            status = await handle.wait(TIMEOUT)
    assert (status.reason, status.exit_code) == (Reason.EXIT, 4)


async def test_a_drain_does_not_wait_for_a_long_grace(process_system: ProcessSystem) -> None:
    async with process_system.client() as client:
        async with process_system.instance(drain_timeout=0) as instance:
            script = "trap 'exit 9' USR1; trap '' TERM; while :; do sleep 0.05; done"
            handle = await client.submit(process_system.task(script, grace_period=3600))
            await wait_until(is_in(handle, State.RUNNING), TIMEOUT)
            await handle.cancel()

            async def cause_is_recorded() -> bool:
                with process_system.redis.client() as redis:
                    return bool(redis.hget(f"{{dispatcher:tasks}}:task:{handle.id}", "cause") == b"cancel")

            await wait_until(cause_is_recorded, TIMEOUT)
            with anyio.fail_after(10):
                await end(instance)
        assert (await handle.status()).state is State.RUNNING
        # Whoever adopts it goes on with the cancellation.
        async with process_system.instance(drain_timeout=0):
            await wait_until(is_in(handle, State.RUNNING), TIMEOUT)
            [left] = await left_over(process_system)
            await _kill(process_system, left)
            assert (await handle.wait(TIMEOUT)).state is State.CANCELLED


def ticked_since(redis: Redis, before: Any) -> bool:
    """Whether the instance has done its housekeeping once more."""
    return bool(redis.hget("{dispatcher:tasks}:meta:counters", "last_tick") != before)


async def _kill(system: ProcessSystem, handle: Handle) -> None:
    backend = ProcessBackend(system.directory / "process")
    async with anyio.create_task_group() as group:
        await group.start(backend.run)
        await backend.stop(handle, 0)
        group.cancel_scope.cancel()


async def test_one_task_the_engine_does_not_answer_to_stops_no_other(
    process_system: ProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ProcessBackend.launch

    async def launch(self: ProcessBackend, attempt: Attempt, confirm: Confirm) -> Handle:
        if attempt.task_id == "sticky":
            raise BackendUnreachable("create timed out")
        return await real(self, attempt, confirm)

    monkeypatch.setattr(ProcessBackend, "launch", launch)
    async with process_system.running(infra_max_attempts=2) as client:
        sticky = await client.submit(process_system.task("exit 0", id="sticky"))
        handles = await client.submit_many([process_system.task("exit 0") for _ in range(20)])
        with anyio.fail_after(20):
            assert await ended(client, handles) == {State.SUCCEEDED}
        status = await sticky.wait(TIMEOUT)
        assert (status.state, status.reason) == (State.FAILED, Reason.BACKEND_ERROR)


async def test_an_instance_whose_engine_is_away_takes_nothing(
    process_system: ProcessSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher.service, "WATCH_SECONDS", 0.1)
    async with process_system.client() as client, process_system.instance() as instance:
        real = instance.backend.probe

        async def away() -> Health:
            return Health(ok=False, detail="gone fishing")

        monkeypatch.setattr(instance.backend, "probe", away)
        await wait_until(lambda: "backend" in instance.ready, TIMEOUT)
        handle = await client.submit(process_system.task("exit 0"))
        with process_system.redis.client() as redis:
            for _ in range(2):
                before = redis.hget("{dispatcher:tasks}:meta:counters", "last_tick")
                await wait_until(lambda: ticked_since(redis, before), TIMEOUT)  # noqa: B023 - ends first
                assert redis.xlen("dispatcher:tasks") == 1
        monkeypatch.setattr(instance.backend, "probe", real)
        assert (await handle.wait(TIMEOUT)).state is State.SUCCEEDED


async def test_a_queue_that_was_emptied_goes_on_under_its_name(process_system: ProcessSystem) -> None:
    async with process_system.client() as client, process_system.instance():
        with process_system.redis.client() as redis:
            before = redis.hget("{dispatcher:tasks}:meta:counters", "namespace")
            redis.flushall()

            def named_again() -> bool:
                return bool(redis.hget("{dispatcher:tasks}:meta:counters", "namespace") == before)

            await wait_until(named_again, TIMEOUT)
        handle = await client.submit(process_system.task("exit 0"))
        assert (await handle.wait(TIMEOUT)).state is State.SUCCEEDED


async def test_a_living_instance_keeps_its_name_to_itself(process_system: ProcessSystem) -> None:
    async with process_system.instance(instance_id="one", lease_seconds=1) as instance:
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigurationError, match="'one'"), flatten_subgroups=True):
            async with process_system.instance(instance_id="one", lease_seconds=1):
                pytest.fail("two of one name")
        assert instance.lifecycle == "running"


async def test_the_name_of_one_that_was_killed_is_free_after_its_lease(process_system: ProcessSystem) -> None:
    async with process_system.client() as client:
        async with process_system.instance(instance_id="one", lease_seconds=1) as instance:
            # As if it had been killed: it does not get to say that it leaves.
            async def nothing() -> None: ...

            instance.recovery.leave = nothing  # type: ignore[method-assign]
        async with process_system.instance(instance_id="one", lease_seconds=1):
            handle = await client.submit(process_system.task("exit 0"))
            assert (await handle.wait(TIMEOUT)).state is State.SUCCEEDED
