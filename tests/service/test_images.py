"""Pulls, against a real engine and a real registry."""

from __future__ import annotations

import anyio

from dispatcher.client import Reason, State, Task
from tests.support.registry import RegistryUnderTest
from tests.support.system import DockerSystem
from tests.support.waiting import wait_until

TIMEOUT = 60
#: Enough that a pull takes longer than a start.
PAYLOAD = bytes(8_000_000)


async def test_many_tasks_share_one_cold_pull(
    docker_system: DockerSystem, registry: RegistryUnderTest
) -> None:
    image = registry.push(docker_system.engine, "shared", payload=PAYLOAD)
    before = registry.manifest_requests("shared")
    async with docker_system.running() as client:
        handles = [await client.submit(Task(image=image, command=["true"])) for _ in range(5)]
        async with anyio.create_task_group() as group:
            for handle in handles:
                group.start_soon(handle.wait, TIMEOUT)
        assert {(await handle.status()).state for handle in handles} == {State.SUCCEEDED}
    assert registry.manifest_requests("shared") - before == 1


async def test_a_task_that_waits_for_an_image_holds_no_consumer(
    docker_system: DockerSystem, registry: RegistryUnderTest
) -> None:
    image = registry.push(docker_system.engine, "cold", payload=PAYLOAD)
    async with docker_system.client() as client, docker_system.instance(num_consumers=1) as dispatcher:
        # A pull that hangs, as a slow registry makes it: the real one begins when it is let go.
        gate = anyio.Event()
        prepare = dispatcher.backend.prepare

        async def slow(*args: object) -> None:
            await gate.wait()
            await prepare(*args)  # type: ignore[arg-type]

        dispatcher.backend.prepare = slow  # type: ignore[method-assign,assignment]
        cold = await client.submit(Task(image=image, command=["true"]))

        async def pulling() -> bool:
            return (await cold.status()).state is State.PULLING

        await wait_until(pulling, TIMEOUT)
        warm = await client.submit(docker_system.task("exit 0"))
        assert (await warm.wait(TIMEOUT)).state is State.SUCCEEDED
        assert (await cold.status()).state is State.PULLING
        gate.set()
        assert (await cold.wait(TIMEOUT)).state is State.SUCCEEDED


async def test_an_unknown_image_is_a_dead_letter(
    docker_system: DockerSystem, registry: RegistryUnderTest
) -> None:
    async with docker_system.running() as client:
        handle = await client.submit(Task(image=f"{registry.host}/nobody/knows:1"))
        status = await handle.wait(TIMEOUT)
        assert (status.state, status.reason) == (State.FAILED, Reason.IMAGE_NOT_FOUND)
        assert [letter.reason for letter in await client.dead()] == ["image_not_found"]


async def test_an_image_that_must_not_be_pulled_is_not(
    docker_system: DockerSystem, registry: RegistryUnderTest
) -> None:
    image = registry.push(docker_system.engine, "never")
    async with docker_system.running() as client:
        handle = await client.submit(Task(image=image, command=["true"], pull_policy="never"))
        assert (await handle.wait(TIMEOUT)).reason is Reason.IMAGE_NOT_FOUND
    assert registry.manifest_requests("never") == 0


async def test_a_registry_that_is_not_there_spends_the_infrastructure_budget(
    docker_system: DockerSystem,
) -> None:
    async with docker_system.running(infra_max_attempts=2) as client:
        handle = await client.submit(Task(image="127.0.0.1:9/none:1", max_attempts=1))
        status = await handle.wait(TIMEOUT)
        assert (status.reason, status.attempt) == (Reason.IMAGE_PULL_FAILED, 2)


async def test_a_task_that_waits_for_an_image_is_cancelled_with_its_pull(docker_system: DockerSystem) -> None:
    async with docker_system.client() as client, docker_system.instance() as dispatcher:
        begun, ended = anyio.Event(), anyio.Event()

        async def hang(*_: object) -> None:
            begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        dispatcher.backend.prepare = hang  # type: ignore[method-assign,assignment]
        handle = await client.submit(Task(image="127.0.0.1:9/none:1"))

        async def pulling() -> bool:
            return (await handle.status()).state is State.PULLING

        await wait_until(pulling, TIMEOUT)
        with anyio.fail_after(TIMEOUT):
            await begun.wait()
        await handle.cancel()
        assert (await handle.wait(TIMEOUT)).state is State.CANCELLED
        with anyio.fail_after(TIMEOUT):
            await ended.wait()
        await wait_until(lambda: not dispatcher.images.pulls, TIMEOUT)


async def test_a_pull_that_stalls_is_given_up(docker_system: DockerSystem) -> None:
    async with (
        docker_system.client() as client,
        docker_system.instance(pull_stall_timeout=0.2, infra_max_attempts=1) as dispatcher,
    ):

        async def hang(*_: object) -> None:
            await anyio.sleep_forever()

        dispatcher.backend.prepare = hang  # type: ignore[method-assign,assignment]
        handle = await client.submit(Task(image="127.0.0.1:9/none:1"))
        status = await handle.wait(TIMEOUT)
    assert status.reason is Reason.IMAGE_PULL_FAILED
    assert "no progress" in status.message
