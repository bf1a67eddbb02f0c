"""An engine that ends, hangs or has no room left, below tasks that run. Each test has its own."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from dispatcher import service
from dispatcher.backends import docker as docker_backend
from dispatcher.client import AsyncHandle, Reason, State, Task, TaskStatus
from dispatcher.errors import BackendError, NoCapacity
from tests.support.own_engine import OwnEngine, own_engine
from tests.support.redis_server import RedisUnderTest
from tests.support.registry import RegistryUnderTest
from tests.support.system import DockerSystem
from tests.support.waiting import wait_until

TIMEOUT = 60
MIB = 1024 * 1024

pytestmark = [
    pytest.mark.timeout(120),
    # The client library forgets to close a socket that nobody listens to.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no test waits for the next look at the engine's health."""
    monkeypatch.setattr(service, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(docker_backend, "PROBE_TIMEOUT", 1.0)


@pytest.fixture(autouse=True)
def no_socket_for_later_tests() -> Iterator[None]:
    """What the client library has forgotten is closed here, where that is allowed."""
    yield
    gc.collect()


async def started(*handles: AsyncHandle) -> None:
    """Wait until the containers of all of these run, or have run."""

    async def look() -> bool:
        states = {(await handle.status()).state for handle in handles}
        return states <= {State.RUNNING, State.SUCCEEDED, State.FAILED}

    await wait_until(look, TIMEOUT, what="all started")


async def end_of(handle: AsyncHandle) -> TaskStatus:
    return await handle.wait(TIMEOUT)


async def nothing_left(engine: OwnEngine) -> None:
    await wait_until(lambda: not engine.client.containers(all=True), TIMEOUT, what="no container left")


def starts_by_task(engine: OwnEngine, handles: dict[str, AsyncHandle]) -> dict[str, dict[int, int]]:
    """Of each task: how often a container was started, by attempt."""
    found: dict[str, dict[int, int]] = {}
    for name, handle in handles.items():
        ours = {k: v for k, v in engine.starts().items() if f"-{handle.id}-" in k}
        found[name] = {int(k.rpartition("-")[2]): v for k, v in ours.items()}
    return found


def scripts(seconds: int) -> dict[str, str]:
    """Programs whose first attempt lasts so long, or until it is told to end."""
    first_lasts = (
        f"i=0; while [ $DISPATCHER_ATTEMPT = 1 ] && [ $i -lt {seconds} ]; do i=$((i+1)); sleep 1 & wait; done"
    )
    return {
        # As a program ends that does nothing about SIGTERM, if it is not process 1.
        "dies": f"trap 'exit 143' TERM; {first_lasts}; exit 0",
        "gives up": f"trap 'exit 3' TERM; {first_lasts}; exit 0",
        # Both take no notice of SIGTERM.
        "fails": "sleep 2; exit 7",
        "succeeds": "sleep 2; exit 0",
    }


@pytest.mark.parametrize("live_restore", [False, True], ids=["plain", "live-restore"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
async def test_an_engine_that_begins_anew(
    redis_server: RedisUnderTest, tmp_path: Path, signum: signal.Signals, live_restore: bool
) -> None:
    with own_engine(live_restore=live_restore) as engine:
        system = DockerSystem(redis_server, tmp_path, engine.under_test)
        async with system.client() as client, system.instance(reconcile_grace=1) as instance:
            # Without live-restore the engine ends them; with it they outlast its absence, or nearly.
            programs = scripts(3 if live_restore else 600)
            handles = {name: await client.submit(system.task(script)) for name, script in programs.items()}
            await started(*handles.values())
            await anyio.to_thread.run_sync(engine.end, signum)
            await wait_until(lambda: "backend" in instance.ready, TIMEOUT)
            await anyio.to_thread.run_sync(engine.start)
            await wait_until(lambda: not instance.ready, TIMEOUT)
            ends = {name: await end_of(handle) for name, handle in handles.items()}
            await nothing_left(engine)
        starts = await anyio.to_thread.run_sync(starts_by_task, engine, handles)
    assert (ends["fails"].state, ends["fails"].reason, ends["fails"].exit_code) == (
        State.FAILED,
        Reason.EXIT,
        7,
    )
    for name in ("dies", "gives up", "succeeds"):
        assert (ends[name].state, ends[name].exit_code) == (State.SUCCEEDED, 0), name
    # What ended with its engine is given another attempt, though the task allows but one failure.
    attempts = {name: end.attempt for name, end in ends.items()}
    if not live_restore:
        # If it was told to end before it failed, it is not known whether it would have.
        assert attempts.pop("fails") in {1, 2}
    last = 1 if live_restore else 2
    expected = {"dies": last, "gives up": last, "fails": 1, "succeeds": 1}
    assert attempts == {name: expected[name] for name in attempts}
    assert starts == {name: dict.fromkeys(range(1, end.attempt + 1), 1) for name, end in ends.items()}


async def test_an_engine_that_hangs_beyond_the_lease(
    redis_server: RedisUnderTest, registry: RegistryUnderTest, tmp_path: Path
) -> None:
    lease = 1.0
    with own_engine() as engine:
        system = DockerSystem(redis_server, tmp_path, engine.under_test)
        # Not to be compressed, so that a pull takes its time.
        cold, later = (
            registry.push(engine.under_test, name, payload=os.urandom(16 * MIB)) for name in ("hung", "later")
        )
        flags = {"lease_seconds": lease, "max_concurrent_pulls": 1, "pull_stall_timeout": 1}
        async with (
            system.client() as client,
            system.instance(instance_id="a", **flags) as first,
            system.instance(instance_id="b", **flags) as second,
        ):
            with engine.under_test.counting_starts("dispatcher-") as starts:
                running = [await client.submit(system.task("sleep 4; exit 0")) for _ in range(3)]
                await started(*running)
                pulled = await client.submit(Task(image=cold, command=["true"]))
                await wait_until(lambda: any(x.images.pulls for x in (first, second)), TIMEOUT)
                with engine.hung():
                    began = anyio.current_time()
                    for instance in (first, second):
                        await wait_until(lambda: "backend" in instance.ready, TIMEOUT)  # noqa: B023 - ends first
                        await wait_until(lambda: not instance.images.pulls, TIMEOUT)  # noqa: B023
                    await wait_until(lambda: anyio.current_time() - began > 3 * lease, TIMEOUT)
                    statuses = [await handle.status() for handle in running]
                    assert {status.state for status in statuses} == {State.RUNNING}
                    assert {status.takeovers for status in statuses} == {0}
                ends = [await end_of(handle) for handle in running]
                # Both by the one slot there is for pulls.
                then = await client.submit(Task(image=later, command=["true"]))
                ends_of_pulled = [await end_of(handle) for handle in (pulled, then)]
            assert not first.ready
            assert not second.ready
    assert {(end.state, end.attempt, end.takeovers) for end in ends} == {(State.SUCCEEDED, 1, 0)}
    assert {end.state for end in ends_of_pulled} == {State.SUCCEEDED}
    assert len(starts) == len(running) + 2
    assert set(starts.values()) == {1}


async def test_a_full_disk_costs_no_task_its_life(
    redis_server: RedisUnderTest, registry: RegistryUnderTest, tmp_path: Path
) -> None:
    with own_engine(data_bytes=64 * MIB) as engine:
        image = registry.push(engine.under_test, "full", payload=os.urandom(4 * MIB))
        system = DockerSystem(redis_server, tmp_path, engine.under_test)
        async with system.running() as client:
            runs = await client.submit(system.task("sleep 2; exit 5"))
            await started(runs)
            with capture_logs() as logged, engine.full():
                waits = await client.submit(system.task("exit 0"))
                cold = await client.submit(Task(image=image, command=["true"]))

                def told(task_id: str, kind: type[BackendError]) -> int:
                    return [
                        (entry.get("task_id"), entry.get("kind"))
                        for entry in logged
                        if entry["event"] == "task.backend_error"
                    ].count((task_id, kind.__name__))

                await wait_until(lambda: told(waits.id, NoCapacity) > 1, TIMEOUT)
                await wait_until(lambda: told(cold.id, NoCapacity), TIMEOUT)
                # What runs is not concerned.
                end = await end_of(runs)
            assert (end.reason, end.exit_code, end.attempt) == (Reason.EXIT, 5, 1)
            end = await end_of(waits)
            assert (end.state, end.attempt) == (State.SUCCEEDED, 1)
            end = await end_of(cold)
            assert (end.state, end.attempt) == (State.SUCCEEDED, 1)
            starts = await anyio.to_thread.run_sync(engine.starts)
            await nothing_left(engine)
    assert set(starts.values()) == {1}
