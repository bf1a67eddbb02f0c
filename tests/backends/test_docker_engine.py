"""An engine that goes away, hangs, or has much to do at once, below one Docker backend."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from typing import Any

import anyio
import anyio.to_thread
import pytest
from structlog.testing import capture_logs

from dispatcher.backends.docker import DockerBackend
from dispatcher.errors import (
    BackendUnreachable,
)
from dispatcher.model import Exit, Handle, Phase
from tests.backends.conformance import UNTIL_KILL, UNTIL_TERM, agree, run_to_end, running, says
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def harness(docker_harness: DockerHarness) -> DockerHarness:
    return docker_harness


@pytest.fixture
def backend(harness: DockerHarness) -> DockerBackend:
    return harness.backend()


# --- the engine goes away ---------------------------------------------------------------


async def test_engine_that_is_not_there() -> None:
    backend = DockerBackend(base_url="tcp://127.0.0.1:1", max_pulls=1)
    health = await backend.probe()
    assert not health.ok
    assert health.detail
    with pytest.raises(BackendUnreachable):
        await backend.run(task_status=anyio.TASK_STATUS_IGNORED)


@contextlib.asynccontextmanager
async def relay(target: str) -> Any:
    """A way to the engine that can be cut: yields its address and a function that cuts it."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/relay.sock"
        scopes: set[anyio.CancelScope] = set()
        closed = [False]

        async def copy(source: Any, sink: Any, scope: anyio.CancelScope) -> None:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                while True:
                    await sink.send(await source.receive())
            scope.cancel()

        async def serve(client: Any) -> None:
            async with client:
                if closed[0]:
                    return
                async with await anyio.connect_unix(target.removeprefix("unix://")) as engine:
                    async with anyio.create_task_group() as tasks:
                        scopes.add(tasks.cancel_scope)
                        tasks.start_soon(copy, client, engine, tasks.cancel_scope)
                        tasks.start_soon(copy, engine, client, tasks.cancel_scope)
                    scopes.discard(tasks.cancel_scope)

        def cut(*, keep: bool) -> int:
            closed[0] = not keep
            count = len(scopes)
            for scope in list(scopes):
                scope.cancel()
            return count

        async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            yield f"unix://{path}", cut
            tasks.cancel_scope.cancel()


@pytest.fixture
def needs_unix_socket(engine: EngineUnderTest) -> None:
    if not engine.base_url.startswith("unix://"):
        pytest.skip("the engine is not reached by a Unix socket")


@pytest.mark.usefixtures("needs_unix_socket")
async def test_waiting_survives_the_loss_of_the_engine(
    harness: DockerHarness, engine: EngineUnderTest
) -> None:
    ends: list[Exit] = []

    async def wait(backend: DockerBackend, handle: Handle) -> None:
        ends.append(await backend.wait(handle))

    async with relay(engine.base_url) as (url, cut):
        backend = DockerBackend(base_url=url, max_pulls=1)
        async with running(backend):
            handle = await backend.launch(harness.attempt(UNTIL_KILL), agree)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait, backend, handle)
                await anyio.wait_all_tasks_blocked()
                assert cut(keep=False)
                # It ends while nobody can be told.
                await anyio.to_thread.run_sync(engine.client.kill, handle.container_id)
                await wait_until(lambda: harness.inspect(handle.container_id)["State"]["Status"] == "exited")
                assert not (await backend.probe()).ok
                with pytest.raises(BackendUnreachable):
                    await backend.find(harness.namespace)
                assert ends == []
                cut(keep=True)
    assert [end.exit_code for end in ends] == [137]


@pytest.mark.usefixtures("needs_unix_socket")
async def test_lost_event_stream_is_followed_again(harness: DockerHarness, engine: EngineUnderTest) -> None:
    async with relay(engine.base_url) as (url, cut):
        backend = DockerBackend(base_url=url, max_pulls=1)
        async with running(backend):
            for _ in range(3):
                handle = await backend.launch(harness.attempt("sleep 0.2; exit 3"), agree)
                await wait_until(lambda: cut(keep=True))
                with anyio.fail_after(8):
                    assert (await backend.wait(handle)).exit_code == 3


async def test_silence_is_no_loss(
    harness: DockerHarness, backend: DockerBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dispatcher.backends.docker_watcher.EVENTS_SILENCE", 0.2)
    with capture_logs() as logged:
        async with running(backend):
            _, end = await run_to_end(backend, harness.attempt("sleep 1; exit 3"))
    assert end.exit_code == 3
    assert [entry["event"] for entry in logged if entry["event"].startswith("docker.events")] == []


async def test_probe_of_an_engine_that_hangs_is_bounded(
    harness: DockerHarness, engine: EngineUnderTest, backend: DockerBackend
) -> None:
    if engine.pid is None:
        pytest.skip("not an engine of our own")
    async with running(backend):
        os.kill(engine.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert not (await backend.probe()).ok
            assert time.monotonic() - began < 6
        finally:
            os.kill(engine.pid, signal.SIGCONT)
        assert (await backend.probe()).ok


# --- many -------------------------------------------------------------------------------


async def test_waiting_for_many_holds_no_thread(harness: DockerHarness) -> None:
    backend = harness.backend(control_threads=2)
    count = 12
    ends: list[int] = []

    async def one() -> None:
        handle = await backend.launch(harness.attempt(UNTIL_TERM), agree)
        ends.append((await backend.wait(handle)).exit_code)

    async def all_run() -> bool:
        found = await backend.find(harness.namespace)
        return [one.phase for one in found] == [Phase.RUNNING] * count

    async with running(backend), anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
        await wait_until(all_run, timeout=30)
        began = time.monotonic()
        assert await backend.image_id(harness.engine.image)
        assert time.monotonic() - began < 1
        for handle in await backend.find(harness.namespace):
            await says(backend, handle, b"ready")
            tasks.start_soon(backend.stop, handle, 10)
    assert ends == [3] * count
