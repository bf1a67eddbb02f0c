"""Pulls as they are seen from outside; and tasks whose image has come to an instance that is full."""

from __future__ import annotations

import re

import anyio
import pytest

from dispatcher.client import AsyncClient, State, Task
from dispatcher.dispatch import pipeline
from dispatcher.service import Dispatcher
from tests.support.faulty_registry import Fault, FaultyRegistry
from tests.support.redis_server import free_port
from tests.support.system import DockerSystem
from tests.support.waiting import wait_until

TIMEOUT = 30.0
SLOW = Fault(drip=300_000)


async def status_of(client: AsyncClient, task_id: str, state: State) -> bool:
    return (await client.status(task_id)).state is state


def metric(dispatcher: Dispatcher, name: str) -> float:
    """Of an instance; 0 before it has a value."""
    found = re.search(rf"^{name} (\S+)$", dispatcher.telemetry.exposition().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def events(system: DockerSystem) -> list[dict[str, str]]:
    with system.redis.client() as redis:
        found = redis.xrange("{dispatcher:tasks}:events")
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


async def test_how_a_pull_goes_is_seen_by_those_who_wait_and_by_everybody(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    first = faulty_registry.add("seen-first", layers=[5_000_000])
    second = faulty_registry.add("seen-second")
    faulty_registry.fault("seen-first", SLOW)
    async with docker_system.client() as client, docker_system.instance(max_concurrent_pulls=1) as dispatcher:
        pulled = await client.submit(Task(image=first, command=["true"]))
        await wait_until(lambda: status_of(client, pulled.id, State.PULLING), TIMEOUT)
        waits = await client.submit(Task(image=second, command=["true"]))

        async def both_are_told() -> bool:
            found = [(await handle.status()).pull for handle in (pulled, waits)]
            return all(found) and bool(found[0] and found[0].bytes_done and found[0].layers_total)

        await wait_until(both_are_told, TIMEOUT)
        status = await pulled.status()
        assert (status.image, status.state) == (first, State.PULLING)
        assert status.pull is not None
        assert (status.pull.active, status.pull.position, status.pull.layers_total) == (True, 0, 2)
        assert 0 < status.pull.bytes_done <= status.pull.bytes_total
        status = await waits.status()
        assert status.image == second
        assert status.pull is not None
        assert (status.pull.active, status.pull.position) == (False, 1)
        (instance,) = await client.instances()
        assert [
            (p["image"], p["registry"], p["active"], p["ahead"], p["waiters"], p["waiting"], p["tries"])
            for p in instance.info["pulls"]
        ] == [
            (first, faulty_registry.host, True, False, 1, [pulled.id], 1),
            (second, faulty_registry.host, False, False, 1, [waits.id], 0),
        ]
        assert instance.info["cooling"] == {}
        assert metric(dispatcher, "dispatcher_image_pulls_in_flight") == 1
        assert metric(dispatcher, "dispatcher_image_pull_waiters") == 2
        await wait_until(
            lambda: any(e["kind"] == "image.pull_progress" for e in events(docker_system)), TIMEOUT
        )
        faulty_registry.heal("seen-first")
        ended = [await handle.wait(TIMEOUT) for handle in (pulled, waits)]
        assert [(s.state, s.image, s.pull) for s in ended] == [
            (State.SUCCEEDED, first, None),
            (State.SUCCEEDED, second, None),
        ]
        assert metric(dispatcher, "dispatcher_image_pull_bytes_total") > 5_000_000
        assert metric(dispatcher, "dispatcher_start_gate") >= 1
        await wait_until(lambda: len([e for e in events(docker_system) if "outcome" in e]) == 2, TIMEOUT)
    told = events(docker_system)
    of_first = [event["kind"] for event in told if event["image"] == first]
    assert of_first[0] == "image.pull_started"
    assert of_first[-1] == "image.pull_ended"
    assert {e["outcome"] for e in told if e["kind"] == "image.pull_ended"} == {"pulled"}
    assert {event["instance"] for event in told} == {instance.id}


async def test_a_registry_that_is_left_alone_is_seen(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    image = faulty_registry.add("throttled")
    faulty_registry.fault("throttled", Fault(status=429, retry_after="60"))
    async with docker_system.client() as client, docker_system.instance() as dispatcher:
        handle = await client.submit(Task(image=image, command=["true"]))

        async def is_left_alone() -> bool:
            pull = (await handle.status()).pull
            return pull is not None and pull.cooling_seconds is not None

        await wait_until(is_left_alone, TIMEOUT)
        pull = (await handle.status()).pull
        assert pull is not None
        assert (pull.registry, pull.active) == (faulty_registry.host, False)
        assert 30 < (pull.cooling_seconds or 0) <= 66
        assert metric(dispatcher, "dispatcher_registries_cooling") == 1
        (instance,) = await client.instances()
        assert instance.info["cooling"].keys() == {faulty_registry.host}
        await wait_until(lambda: "registry.cooling" in [e["kind"] for e in events(docker_system)], TIMEOUT)
        (cooling,) = [event for event in events(docker_system) if event["kind"] == "registry.cooling"]
        assert cooling["registry"] == faulty_registry.host
        assert float(cooling["seconds"]) >= 60
        await handle.cancel()
        assert (await handle.wait(TIMEOUT)).state is State.CANCELLED


async def test_a_pull_tried_again_is_counted(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    image = faulty_registry.add("once-wrong")
    faulty_registry.fault("once-wrong", Fault(drop="reset"))
    async with docker_system.client() as client, docker_system.instance() as dispatcher:
        handle = await client.submit(Task(image=image, command=["true"]))
        await wait_until(
            lambda: "image.pull_ended" in [e["kind"] for e in events(docker_system)],
            TIMEOUT,
            what="no failure",
        )
        faulty_registry.heal("once-wrong")
        assert (await handle.wait(TIMEOUT)).attempt == 1
        assert metric(dispatcher, "dispatcher_image_pull_retries_total") >= 1


async def test_one_whose_image_has_come_to_a_full_instance_is_kept_for_its_daemon(
    docker_system: DockerSystem, faulty_registry: FaultyRegistry
) -> None:
    """And all the while the Redis for events is dead, which nobody notices."""
    image = faulty_registry.add("come-to-full")
    faulty_registry.fault("come-to-full", Fault(stall_after=1_000))
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    async with (
        docker_system.client() as client,
        docker_system.instance(num_consumers=1, state_redis_url=nowhere) as dispatcher,
    ):
        cold = await client.submit(Task(image=image, command=["true"]))
        await wait_until(lambda: status_of(client, cold.id, State.PULLING), TIMEOUT)
        busy = await client.submit(docker_system.task("exec sleep 600", grace_period=0.0))
        await wait_until(lambda: status_of(client, busy.id, State.RUNNING), TIMEOUT)
        faulty_registry.heal("come-to-full")
        await wait_until(lambda: status_of(client, cold.id, State.QUEUED), TIMEOUT)
        with docker_system.redis.client() as redis:
            prefers = redis.hget(f"{{dispatcher:tasks}}:task:{cold.id}", "prefers")
            assert redis.zcard("{dispatcher:tasks}:ready:default") == 1
        assert prefers == dispatcher.health.daemon.encode()
        await busy.cancel()
        with anyio.fail_after(TIMEOUT):
            status = await cold.wait()
        assert (status.state, status.attempt) == (State.SUCCEEDED, 1)
        assert faulty_registry.pulls("come-to-full") == 1


@pytest.mark.parametrize("queue", ["high", "low"])
async def test_one_whose_image_has_come_goes_before_what_nobody_has_taken(
    docker_system: DockerSystem,
    faulty_registry: FaultyRegistry,
    monkeypatch: pytest.MonkeyPatch,
    queue: str,
) -> None:
    monkeypatch.setattr(pipeline, "CONSUMER_WAIT", TIMEOUT)
    image = faulty_registry.add(f"first-{queue}")
    faulty_registry.fault(f"first-{queue}", Fault(stall_after=1_000))
    async with docker_system.client() as client, docker_system.instance(num_consumers=1) as dispatcher:
        cold = await client.submit(Task(image=image, command=["true"], queue=queue))
        await wait_until(lambda: status_of(client, cold.id, State.PULLING), TIMEOUT)
        busy = await client.submit(docker_system.task("exec sleep 600", grace_period=0.0))
        await wait_until(lambda: status_of(client, busy.id, State.RUNNING), TIMEOUT)
        behind = await client.submit(docker_system.task("true", queue="high"))
        faulty_registry.heal(f"first-{queue}")
        await wait_until(lambda: not dispatcher.images.waiting, TIMEOUT)
        await busy.cancel()
        began = (await cold.wait(TIMEOUT)).started_at
        late = (await behind.wait(TIMEOUT)).started_at
    assert began is not None
    assert late is not None
    assert began < late
