"""What a Docker engine lets happen between two looks at a container that somebody else made."""

from __future__ import annotations

from functools import partial

import anyio
import pytest
from anyio import to_thread

from dispatcher.backends.docker_containers import Containers, Removal
from dispatcher.errors import BackendError, ImageNotFound
from dispatcher.model import Handle
from tests.backends.conformance import Pause, agree, running
from tests.backends.docker_harness import DockerHarness
from tests.support.engine import EngineUnderTest
from tests.support.waiting import wait_until

TAG = "adoption/of-its-own:1"


async def ended(harness: DockerHarness, handle: Handle) -> bool:
    found = await to_thread.run_sync(harness.inspect, handle.container_id)
    return bool(found["State"]["Status"] == "exited")


async def test_one_that_ran_between_look_and_removal_is_told_from_one_that_never_did(
    docker_harness: DockerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its creator was paused before the start, and goes on at the worst of moments."""
    creator, adopter = docker_harness.backend(), docker_harness.backend()
    attempt, pause = docker_harness.attempt("exit 0"), Pause()
    made: list[Handle] = []
    remove = Containers.remove

    async def start_it_first(self: Containers, handle: Handle) -> Removal:
        pause.released.set()
        await wait_until(partial(ended, docker_harness, handle), 30)
        return await remove(self, handle)

    async def note(handle: Handle) -> None:
        made.append(handle)
        raise BackendError("not started")

    async def create() -> None:
        try:
            await creator.launch(attempt, pause)
        except BackendError:
            pass  # it was removed behind its back

    async with running(creator), running(adopter), anyio.create_task_group() as tasks:
        tasks.start_soon(create)
        await pause.reached.wait()
        monkeypatch.setattr(Containers, "remove", start_it_first)
        with pytest.raises(BackendError):
            await adopter.launch(attempt, note)
    assert made[-1].replaces == frozenset(), "it may have run, and nobody is told that it has not"


async def test_one_that_was_never_started_is_replaced(docker_harness: DockerHarness) -> None:
    creator, adopter = docker_harness.backend(), docker_harness.backend()
    attempt, pause = docker_harness.attempt("exit 0"), Pause()
    made: list[Handle] = []

    async def note(handle: Handle) -> None:
        made.append(handle)

    async with running(creator), running(adopter), anyio.create_task_group() as tasks:
        tasks.start_soon(creator.launch, attempt, pause)
        await pause.reached.wait()
        [first] = await adopter.find(attempt.namespace)
        handle = await adopter.launch(attempt, note)
        tasks.cancel_scope.cancel()
        await adopter.wait(handle)
    assert made[-1].replaces == {first.container_id}


async def test_what_was_replaced_is_known_if_the_adopter_dies_before_its_start_as_well(
    docker_harness: DockerHarness,
) -> None:
    creator, adopter, last = (docker_harness.backend() for _ in range(3))
    attempt, pauses = docker_harness.attempt("exit 0"), [Pause(), Pause()]
    made: list[Handle] = []

    async def note(handle: Handle) -> None:
        made.append(handle)

    async with running(creator), running(adopter), running(last), anyio.create_task_group() as tasks:
        replaced = set()
        for backend, pause in zip((creator, adopter), pauses, strict=True):
            tasks.start_soon(backend.launch, attempt, pause)
            await pause.reached.wait()
            [created] = await last.find(attempt.namespace)
            replaced.add(created.container_id)
        handle = await last.launch(attempt, note)
        tasks.cancel_scope.cancel()
        await last.wait(handle)
    assert made[-1].replaces == replaced
    assert len(replaced) == 2


async def test_what_runs_is_adopted_without_its_image(
    docker_harness: DockerHarness, engine: EngineUnderTest
) -> None:
    backend = docker_harness.backend()
    repository, _, tag = TAG.partition(":")
    engine.client.tag(engine.image, repository, tag)
    attempt = docker_harness.attempt("sleep 60", image=TAG)
    async with running(backend):
        first = await backend.launch(attempt, agree)
        await to_thread.run_sync(partial(engine.client.remove_image, TAG, force=True))
        again = await backend.launch(attempt, agree)
        assert (again.container_id, again.adopted) == (first.container_id, True)
        await backend.stop(again, 0)
        await backend.remove(again)
        with pytest.raises(ImageNotFound):
            await backend.launch(attempt, agree)
