"""Pulls that go wrong or come late, and who must not notice: a real engine, a registry that fails."""

from __future__ import annotations

from functools import partial

import pytest

from dispatcher.client import AsyncClient, Reason, State, Task
from dispatcher.service import Dispatcher
from tests.support.faulty_registry import Fault, FaultyRegistry
from tests.support.registry import RegistryUnderTest
from tests.support.system import DockerSystem
from tests.support.waiting import wait_until

TIMEOUT = 60
MIB = 1024 * 1024


def wanting(image: str, **fields: object) -> Task:
    return Task.model_validate({"image": image, "command": ["true"], **fields})


async def is_in(client: AsyncClient, task_id: str, state: State) -> bool:
    return (await client.status(task_id)).state is state


async def has(dispatcher: Dispatcher, image: str) -> bool:
    return bool(await dispatcher.backend.image_id(image))


async def test_a_registry_that_wants_to_be_left_alone_delays_only_its_own_images(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry, registry: RegistryUnderTest
) -> None:
    names = ["throttled-1", "throttled-2"]
    images = [faulty_registry.add(name) for name in names]
    for name in names:
        faulty_registry.fault(name, Fault(status=429, retry_after="600"))
    well = registry.push(docker_system.engine, "well")
    async with docker_system.client() as client, docker_system.instance() as dispatcher:
        held_up = [await client.submit(wanting(image)) for image in images for _ in range(2)]
        await wait_until(lambda: faulty_registry.host in dispatcher.images.cooling, TIMEOUT)
        assert dispatcher.images.cooling[faulty_registry.host] > 500, "for as long as it said"
        others = [await client.submit(wanting(well)), await client.submit(docker_system.task("exit 0"))]
        for other in others:
            assert (await other.wait(TIMEOUT)).state is State.SUCCEEDED
        assert {(await handle.status()).state for handle in held_up} == {State.PULLING}
        assert sum(map(faulty_registry.pulls, names)) <= 2, "it is not asked again meanwhile"


async def test_what_a_registry_throttled_goes_on_in_the_same_attempt(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    image = faulty_registry.add("throttled-once")
    faulty_registry.fault("throttled-once", Fault(status=429, retry_after="1"))
    async with docker_system.client() as client, docker_system.instance() as dispatcher:
        handle = await client.submit(wanting(image))
        await wait_until(lambda: faulty_registry.host in dispatcher.images.cooling, TIMEOUT)
        faulty_registry.heal("throttled-once")
        status = await handle.wait(TIMEOUT)
    assert (status.state, status.attempt) == (State.SUCCEEDED, 1)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=401), Reason.IMAGE_UNAUTHORIZED),
        (Fault(status=403, body=b"not for you"), Reason.IMAGE_UNAUTHORIZED),
        (Fault(status=404), Reason.IMAGE_NOT_FOUND),
        (Fault(bad_json=True), Reason.IMAGE_PULL_FAILED),
    ],
    ids=["401", "403", "404", "bad manifest"],
)
async def test_what_will_not_change_ends_the_task_with_its_reason(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry, fault: Fault, reason: Reason
) -> None:
    image = faulty_registry.add("refused")
    faulty_registry.fault("refused", fault)
    async with docker_system.running() as client:
        status = await (await client.submit(wanting(image, max_attempts=5))).wait(TIMEOUT)
        [letter] = await client.dead()
    assert (status.state, status.reason, status.attempt) == (State.FAILED, reason, 1)
    assert letter.reason == reason


async def test_what_the_engine_takes_for_no_name_ends_the_task(docker_system: DockerSystem) -> None:
    """Upper case before the first / is a registry's name to some engines, and a mistake to others."""
    async with docker_system.running() as client:
        status = await (await client.submit(wanting("UPPER/case:1", max_attempts=5))).wait(TIMEOUT)
    assert (status.reason, status.attempt) == (Reason.IMAGE_NOT_FOUND, 1)
    assert "UPPER/case" in status.message


async def test_a_pull_that_stalls_leaves_its_place_to_the_next(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    stalling = faulty_registry.add("stalling", layers=[4 * MIB])
    faulty_registry.fault("stalling", Fault(stall_after=MIB))
    next_in_line = faulty_registry.add("next-in-line")
    flags = {"max_concurrent_pulls": 1, "pull_stall_timeout": 4.0, "infra_max_attempts": 1}
    async with docker_system.running(**flags) as client:
        first = await client.submit(wanting(stalling))
        await wait_until(lambda: faulty_registry.sending("stalling") > 0, TIMEOUT)
        second = await client.submit(wanting(next_in_line))
        assert (await second.wait(TIMEOUT)).state is State.SUCCEEDED
        status = await first.wait(TIMEOUT)
    assert status.reason is Reason.IMAGE_PULL_FAILED
    assert "no progress for 4 s" in status.message


async def test_what_waits_behind_busy_consumers_finds_its_image_there(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    image = faulty_registry.add("soon-wanted", layers=[MIB])
    async with (
        docker_system.client() as client,
        docker_system.instance(num_consumers=1) as dispatcher,
    ):
        busy = await client.submit(docker_system.task("sleep 600", grace_period=0))
        await wait_until(partial(is_in, client, busy.id, State.RUNNING), TIMEOUT)
        behind = await client.submit(wanting(image))
        await wait_until(partial(has, dispatcher, image), TIMEOUT)
        assert (await behind.status()).state is State.QUEUED, "it has not been taken"
        await busy.cancel()
        assert (await behind.wait(TIMEOUT)).state is State.SUCCEEDED
    assert faulty_registry.pulls("soon-wanted") == 1


async def test_what_finds_no_consumer_when_its_image_has_come_is_given_to_others(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    image = faulty_registry.add("late", layers=[MIB])
    faulty_registry.fault("late", Fault(stall_after=1000))
    async with docker_system.client() as client, docker_system.instance(num_consumers=1):
        late = await client.submit(wanting(image))
        await wait_until(lambda: faulty_registry.sending("late") > 0, TIMEOUT)
        busy = await client.submit(docker_system.task("sleep 600", grace_period=0))
        await wait_until(partial(is_in, client, busy.id, State.RUNNING), TIMEOUT)
        faulty_registry.heal("late")
        await wait_until(partial(is_in, client, late.id, State.QUEUED), TIMEOUT)
        async with docker_system.instance(num_consumers=1):
            assert (await late.wait(TIMEOUT)).state is State.SUCCEEDED
        assert await is_in(client, busy.id, State.RUNNING)
        await busy.cancel()
        await busy.wait(TIMEOUT)


async def test_no_more_wait_for_images_than_may(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    images = [faulty_registry.add(f"crowd-{n}", layers=[MIB]) for n in range(3)]
    for n in range(3):
        faulty_registry.fault(f"crowd-{n}", Fault(stall_after=1000))
    async with (
        docker_system.client() as client,
        docker_system.instance(max_waiting_pulls=1, look_ahead=0) as dispatcher,
    ):
        handles = [await client.submit(wanting(image)) for image in images]

        async def sent_away() -> bool:
            states = [(await handle.status()).state for handle in handles]
            return sorted(states) == [State.PULLING, State.SCHEDULED, State.SCHEDULED]

        await wait_until(sent_away, TIMEOUT)
        assert dispatcher.images.waiting == 1
        warm = await client.submit(docker_system.task("exit 0"))
        assert (await warm.wait(TIMEOUT)).state is State.SUCCEEDED
        for n in range(3):
            faulty_registry.heal(f"crowd-{n}")
        for handle in handles:
            assert (await handle.wait(TIMEOUT)).state is State.SUCCEEDED
