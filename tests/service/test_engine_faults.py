"""An engine that ends, hangs or has no room left, below tasks that run. Each test has its own."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from dispatcher import service
from dispatcher.backends import docker as docker_backend
from dispatcher.client import AsyncHandle, Reason, State, TaskStatus
from tests.support.own_engine import OwnEngine, own_engine
from tests.support.redis_server import RedisUnderTest
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
    if signum is signal.SIGTERM and not live_restore:
        # If it was told to end before it failed, it is not known whether it would have.
        assert attempts.pop("fails") in {1, 2}
    last = 1 if live_restore else 2
    expected = {"dies": last, "gives up": last, "fails": 1, "succeeds": 1}
    assert attempts == {name: expected[name] for name in attempts}
    assert starts == {name: dict.fromkeys(range(1, end.attempt + 1), 1) for name, end in ends.items()}


async def test_an_engine_that_hangs_beyond_the_lease(
    redis_server: RedisUnderTest, registry: RegistryUnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_INTERVAL", 0)
