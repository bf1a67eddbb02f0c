"""What nobody cares for any more is cleared up; all else is left alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import TaskGroup
from structlog.testing import capture_logs

from dispatcher.backends.base import Backend
from dispatcher.dispatch import reconcile
from dispatcher.dispatch.reconcile import Reconciler
from dispatcher.errors import BackendError, BackendUnreachable, QueueUnavailable
from dispatcher.model import Attempt, Handle, Health, Phase
from dispatcher.queue.connection import command
from dispatcher.queue.exchange import Submission
from dispatcher.queue.store import Store
from dispatcher.task import Task
from tests.backends.conformance import UNTIL_KILL, Harness, Pause, fresh_namespace, launch, running
from tests.backends.conformance import phase as phase_of
from tests.backends.docker_harness import DockerHarness
from tests.backends.process_harness import ProcessHarness
from tests.support.redis_server import RedisUnderTest
from tests.support.waiting import wait_until

TIMEOUT = 30
#: Shorter than any test could notice, where a test is not about it.
GRACE = 0.05

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["process", "docker"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """Each backend in turn, with its real daemon."""
    found: ProcessHarness | DockerHarness
    if request.param == "process":
        found = ProcessHarness(tmp_path)
    else:
        found = DockerHarness(request.getfixturevalue("engine"))
    yield found
    found.tidy()


@pytest.fixture
def process_harness(tmp_path: Path) -> Iterator[ProcessHarness]:
    """Where the backend does not matter."""
    harness = ProcessHarness(tmp_path)
    yield harness
    harness.tidy()


@pytest.fixture
async def store(redis_server: RedisUnderTest) -> AsyncIterator[Store]:
    """An empty queue."""
    store = Store(redis_server.url, "dispatcher:tasks")
    yield store
    await store.aclose()


@pytest.fixture(autouse=True)
def short_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "STOP_GRACE", 0.2)


async def standing_as(store: Store, standing: str) -> str:
    """A task to whose first attempt a container stands so; its id. Never seen by Redis if unknown."""
    task_id = f"left-{fresh_namespace()[:8]}"
    if standing == "unknown":
        return task_id
    await store.enqueue(Submission.of(Task(image="busybox", id=task_id)))
    if standing == "ended":
        await store.cancel(task_id)
    elif standing == "later attempt":
        await command(store.redis, "HSET", store.keys.record(task_id), "attempt", 2)
    return task_id


async def left_in(phase: Phase, backend: Backend, attempt: Attempt, creators: TaskGroup) -> Handle:
    """A container that was left behind in this phase; the creator of one that was not started
    hangs there in ``creators``."""
    if phase is Phase.CREATED:
        pause = Pause()
        creators.start_soon(_launch_late, backend, attempt, pause)
        await pause.reached.wait()
        return next(one for one in await backend.find(attempt.namespace) if one.task_id == attempt.task_id)
    handle = await launch(backend, attempt)
    if phase is Phase.EXITED:
        await backend.stop(handle, 0)
    return replace(handle, phase=phase)


async def _launch_late(backend: Backend, attempt: Attempt, pause: Pause) -> None:
    with contextlib.suppress(BackendError):
        await backend.launch(attempt, pause)


@asynccontextmanager
async def reconciling(*reconcilers: Reconciler) -> AsyncIterator[None]:
    """Let these look again and again."""
    async with anyio.create_task_group() as group:
        for one in reconcilers:
            group.start_soon(one.run, name="reconcile")
        yield
        group.cancel_scope.cancel()


async def ids(backend: Backend, *namespaces: str) -> set[str]:
    return {one.container_id for namespace in namespaces for one in await backend.find(namespace)}


async def gone(backend: Backend, *handles: Handle) -> None:
    """Wait until these are removed."""

    async def look() -> bool:
        return not {h.container_id for h in handles} & await ids(backend, *{h.namespace for h in handles})

    await wait_until(look, TIMEOUT)


def nobody() -> list[str]:
    return []


async def test_only_what_nobody_cares_for_is_cleared_up(harness: Harness, store: Store) -> None:
    backend, foreign = harness.backend(), fresh_namespace()
    kept: dict[str, Handle] = {}
    cleared: list[Handle] = []
    async with running(backend), anyio.create_task_group() as creators:
        for standing in ("ended", "later attempt", "unknown", "current"):
            for phase in Phase:
                attempt = harness.attempt(UNTIL_KILL, task_id=await standing_as(store, standing))
                handle = await left_in(phase, backend, attempt, creators)
                if standing == "current" or (standing, phase) == ("unknown", Phase.RUNNING):
                    kept[f"{standing} {phase}"] = handle
                else:
                    cleared.append(handle)
        for phase in (Phase.EXITED, Phase.RUNNING):
            attempt = harness.attempt(UNTIL_KILL, task_id=await standing_as(store, "ended"))
            attempt = replace(attempt, namespace=foreign)
            kept[f"foreign {phase}"] = await left_in(phase, backend, attempt, creators)
        reconciler = Reconciler(backend, store, namespace=harness.namespace, grace=GRACE, held=nobody)
        with capture_logs() as logged:
            async with reconciling(reconciler):
                await gone(backend, *cleared)
                await reconciler.look()
        assert await ids(backend, harness.namespace, foreign) == {one.container_id for one in kept.values()}
        for handle in kept.values():
            if handle.phase is Phase.RUNNING:
                assert await phase_of(backend, handle) is Phase.RUNNING
        creators.cancel_scope.cancel()
    assert reconciler.leaked == 1
    reports = [entry for entry in logged if entry["event"] == "container.unknown"]
    assert [(entry["container_id"], entry["log_level"]) for entry in reports] == [
        (kept["unknown running"].container_id, "warning")
    ]


async def test_several_at_once_do_each_other_no_harm(harness: Harness, store: Store) -> None:
    backends = [harness.backend() for _ in range(3)]
    async with running(*backends), anyio.create_task_group() as creators:
        left = [
            await left_in(
                phase, backends[0], harness.attempt(UNTIL_KILL, task_id=await standing_as(store, "ended")),
                creators,
            )
            for phase in (*Phase, Phase.RUNNING)
        ]  # fmt: skip
        reconcilers = [
            Reconciler(backend, store, namespace=harness.namespace, grace=GRACE, held=nobody, interval=0.05)
            for backend in backends
        ]
        with capture_logs() as logged:
            async with reconciling(*reconcilers):
                await gone(backends[0], *left)
        creators.cancel_scope.cancel()
    assert [entry for entry in logged if entry["log_level"] == "error"] == []


# --- on one backend -----------------------------------------------------------------------


async def test_nothing_is_touched_before_the_grace_is_over(
    process_harness: ProcessHarness, store: Store
) -> None:
    backend = process_harness.backend()
    async with running(backend), anyio.create_task_group() as creators:
        attempt = process_harness.attempt(UNTIL_KILL, task_id=await standing_as(store, "ended"))
        handle = await left_in(Phase.RUNNING, backend, attempt, creators)
        reconciler = Reconciler(backend, store, namespace=handle.namespace, grace=0.5, held=nobody)
        began = anyio.current_time()
        assert await reconciler.look() == pytest.approx(0.5)
        # Seen to be left over twice, and not for long enough.
        assert await reconciler.look() < 0.5
        assert await phase_of(backend, handle) is Phase.RUNNING
        async with reconciling(reconciler):
            await gone(backend, handle)
        assert anyio.current_time() - began >= 0.5


async def test_an_absence_of_the_daemon_begins_each_grace_anew(
    process_harness: ProcessHarness, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = process_harness.backend()
    absences = 0

    async def probe() -> Health:
        nonlocal absences
        absences += 1
        return Health(ok=False, detail="gone fishing")

    async with running(backend), anyio.create_task_group() as creators:
        attempt = process_harness.attempt("exit 0", task_id=await standing_as(store, "ended"))
        handle = await left_in(Phase.EXITED, backend, attempt, creators)
        reconciler = Reconciler(
            backend, store, namespace=handle.namespace, grace=0.5, held=nobody, interval=0.05
        )
        with monkeypatch.context() as patch:
            await reconciler.look()
            patch.setattr(backend, "probe", probe)
            async with reconciling(reconciler):
                await wait_until(lambda: absences, TIMEOUT)
        back = anyio.current_time()
        async with reconciling(reconciler):
            await gone(backend, handle)
        assert anyio.current_time() - back >= 0.5


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("probe", BackendUnreachable()),
        ("find", BackendUnreachable()),
        ("standing", QueueUnavailable()),
        ("stop", BackendUnreachable()),
        ("remove", BackendError()),
        ("find", ZeroDivisionError()),
        ("remove", ZeroDivisionError()),
    ],
)
async def test_what_fails_is_tried_again(
    process_harness: ProcessHarness,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    error: Exception,
) -> None:
    backend, watcher = process_harness.backend(), process_harness.backend()
    target = store if part == "standing" else backend
    real, failures = getattr(target, part), 0

    async def failing(*arguments: Any) -> Any:
        nonlocal failures
        if failures < 2:
            failures += 1
            raise error
        return await real(*arguments)

    async with running(backend, watcher), anyio.create_task_group() as creators:
        attempt = process_harness.attempt(UNTIL_KILL, task_id=await standing_as(store, "ended"))
        handle = await left_in(Phase.RUNNING, backend, attempt, creators)
        monkeypatch.setattr(target, part, failing)
        reconciler = Reconciler(
            backend, store, namespace=handle.namespace, grace=GRACE, held=nobody, interval=0.05
        )
        with capture_logs() as logged:
            async with reconciling(reconciler):
                await gone(watcher, handle)
    assert failures == 2
    mistakes = [entry for entry in logged if entry["log_level"] == "error"]
    assert len(mistakes) == (2 if isinstance(error, ZeroDivisionError) else 0)
    assert all(entry["exc_info"] for entry in mistakes)


async def test_a_task_held_here_keeps_its_container_but_not_that_of_an_earlier_attempt(
    process_harness: ProcessHarness, store: Store
) -> None:
    backend = process_harness.backend()
    async with running(backend), anyio.create_task_group() as creators:
        unknown = process_harness.attempt("exit 0", task_id=await standing_as(store, "unknown"))
        earlier = process_harness.attempt(UNTIL_KILL, task_id=await standing_as(store, "later attempt"))
        kept = await left_in(Phase.EXITED, backend, unknown, creators)
        handle = await left_in(Phase.RUNNING, backend, earlier, creators)
        held = {unknown.task_id, earlier.task_id}
        reconciler = Reconciler(
            backend, store, namespace=handle.namespace, grace=GRACE, held=lambda: held, interval=0.05
        )
        async with reconciling(reconciler):
            await gone(backend, handle)
            assert await phase_of(backend, kept) is Phase.EXITED
            held.clear()
            await gone(backend, kept)


async def test_what_stands_otherwise_after_the_stop_is_not_removed(
    process_harness: ProcessHarness, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = process_harness.backend()
    answers = ["stale", "stale", "stale", "current"]

    async def standing(attempts: list[tuple[str, int]]) -> list[str]:
        return [answers.pop(0) for _ in attempts]

    async with running(backend), anyio.create_task_group() as creators:
        handle = await left_in(Phase.RUNNING, backend, process_harness.attempt(UNTIL_KILL), creators)
        monkeypatch.setattr(store, "standing", standing)
        reconciler = Reconciler(backend, store, namespace=handle.namespace, grace=GRACE, held=nobody)
        async with reconciling(reconciler):
            await wait_until(lambda: not answers, TIMEOUT)
        assert await phase_of(backend, handle) is Phase.EXITED


async def test_an_unknown_one_is_reported_until_it_ends_and_then_removed(
    process_harness: ProcessHarness, store: Store
) -> None:
    backend = process_harness.backend()
    async with running(backend), anyio.create_task_group() as creators:
        handle = await left_in(Phase.RUNNING, backend, process_harness.attempt(UNTIL_KILL), creators)
        reconciler = Reconciler(
            backend, store, namespace=handle.namespace, grace=GRACE, held=nobody, interval=0.05
        )
        async with reconciling(reconciler):
            await wait_until(lambda: reconciler.leaked == 1, TIMEOUT)
            await backend.stop(handle, 0)
            await gone(backend, handle)
            await wait_until(lambda: reconciler.leaked == 0, TIMEOUT)


async def test_a_daemon_that_is_back_is_looked_at_at_once(
    process_harness: ProcessHarness, store: Store
) -> None:
    backend = process_harness.backend()
    async with running(backend), anyio.create_task_group() as creators:
        reconciler = Reconciler(backend, store, namespace=process_harness.namespace, grace=1e-9, held=nobody)
        async with reconciling(reconciler):
            await anyio.wait_all_tasks_blocked()
            attempt = process_harness.attempt("exit 0", task_id=await standing_as(store, "ended"))
            handle = await left_in(Phase.EXITED, backend, attempt, creators)
            reconciler.wake()
            await gone(backend, handle)
