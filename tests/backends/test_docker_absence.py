"""What an engine's absence explains. How engines really end is in tests/service/test_engine_faults.py."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.to_thread
import pytest

from dispatcher.backends.docker_absence import Absence, absence_of
from dispatcher.errors import ContainerGone
from dispatcher.model import Exit
from tests.backends.conformance import UNTIL_KILL, agree, phase, running, says
from tests.backends.docker_harness import DockerHarness

ABSENCE = Absence(since=100.0, until=110.0, signalled=frozenset({"told"}))


def event(when: float, action: str = "die", container_id: str = "other") -> dict[str, Any]:
    return {
        "Type": "container",
        "Action": action,
        "Actor": {"ID": container_id},
        "timeNano": int(when * 1_000_000_000),
    }


@pytest.mark.parametrize(
    ("code", "when", "container_id", "explained"),
    [
        (137, 105, "other", True),
        (143, 105, "other", True),
        (255, 105, "other", True),
        (137, 100, "other", True),
        (137, 110, "other", True),
        # Before and after.
        (137, 99, "other", False),
        (137, 111, "other", False),
        (3, 99, "told", False),
        # What a program does that is told to end.
        (3, 105, "told", True),
        (1, 105, "other", False),
        # It has done what it was there for.
        (0, 105, "told", False),
        (0, 105, "other", False),
    ],
)
def test_which_ends_are_explained(code: int, when: float, container_id: str, explained: bool) -> None:
    assert ABSENCE.explains(container_id, Exit(code, 50.0, when)) is explained


def test_want_of_memory_is_the_programs_own() -> None:
    assert not ABSENCE.explains("other", Exit(137, 50.0, 105.0, oom=True))


def test_an_engine_that_remembers_what_was_before_is_the_same() -> None:
    remembered = [event(95.0), event(105.0, "kill", "told")]
    assert absence_of(remembered, since=90.0, answered=96.0, until=110.0, heard=[]) is None


def test_one_that_remembers_nothing_older_than_its_absence_is_another() -> None:
    remembered = [event(105.0, "kill", "by the next"), event(105.1, "die", "by the next")]
    heard = [("long ago", 50.0), ("by the last", 101.0)]
    absence = absence_of(remembered, since=90.0, answered=104.0, until=110.0, heard=heard)
    assert absence == Absence(90.0, 110.0, frozenset({"by the next", "by the last"}))
    assert absence_of([], since=90.0, answered=104.0, until=110.0, heard=[]) == Absence(90.0, 110.0)


async def test_what_we_stop_ourselves_is_no_loss(docker_harness: DockerHarness) -> None:
    backend = docker_harness.backend()
    async with running(backend):
        # As if the engine had been away all the time.
        backend._watcher._absences.append(Absence(0.0, 1e12))
        stopped, killed = [await backend.launch(docker_harness.attempt(UNTIL_KILL), agree) for _ in range(2)]
        await backend.stop(stopped, 0)
        assert (await backend.wait(stopped)).exit_code == 137
        await anyio.to_thread.run_sync(docker_harness.engine.client.kill, killed.container_id)
        with pytest.raises(ContainerGone, match="together with its engine"):
            await backend.wait(killed)
        # It is still there, to be removed.
        await backend.remove(killed)
        assert await phase(backend, killed) is None


async def test_a_container_that_somebody_else_kills_has_ended_by_itself(
    docker_harness: DockerHarness,
) -> None:
    backend = docker_harness.backend()
    async with running(backend):
        handle = await backend.launch(docker_harness.attempt(UNTIL_KILL), agree)
        await says(backend, handle, b"ready")
        await anyio.to_thread.run_sync(docker_harness.engine.client.kill, handle.container_id)
        assert (await backend.wait(handle)).exit_code == 137
