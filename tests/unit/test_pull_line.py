"""Whose turn it is to pull, and when; hours in a moment."""

from __future__ import annotations

import anyio
import pytest

from dispatcher.dispatch import images, pull_line
from dispatcher.errors import BackendError, ImageNotFound, ImagePullFailed, NoCapacity, RegistryThrottled
from tests.support import virtual_time
from tests.unit.pulling import Governed, Waiters, a_task, governed, settled

A, B, C = (f"one.test/{name}:1" for name in "abc")
X = "two.test/x:1"


def test_who_is_waited_for_goes_before_what_is_pulled_ahead() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for image in (A, B):  # as if both had seen the room that only one of them gets
            told.governor._begin(a_task(image).reference, ahead=True)
        await settled()
        assert set(told.backend.under_way) == {A}
        await tasks.want("t1", X)
        assert (set(told.backend.under_way), told.backend.pulls[B]) == ({X}, 0)
        told.backend.end(X)
        await settled()
        assert set(told.backend.under_way) == {B}

    virtual_time.run(governed(scenario, at_once=1))


def test_what_waits_ahead_is_waited_for_as_soon_as_a_task_wants_it() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for image in (A, B):
            told.governor._begin(a_task(image).reference, ahead=True)
        await settled()
        await tasks.want("t1", B)
        assert set(told.backend.under_way) == {B}

    virtual_time.run(governed(scenario, at_once=1))


def test_nothing_gives_way_whose_place_would_not_do() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        await told.governor.ahead(a_task(X).reference)
        await settled()
        await tasks.want("t2", B)
        assert set(told.backend.under_way) == {A, X}

    virtual_time.run(governed(scenario, at_once=2, per_registry=1))


def test_the_longest_word_of_a_registry_stands() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        line = told.governor._line
        line.refused("one.test", 600.0)
        for _ in range(20):  # pulls that were under way then hear no number
            line.refused("one.test", None)
        assert 600 <= told.governor.cooling["one.test"] <= 660
        assert line._registries["one.test"].refusals == 1, "they are one refusal"
        assert await told.governor.ahead(a_task(A).reference) is None

    virtual_time.run(governed(scenario))


def test_a_registry_is_forgotten_when_there_is_nothing_to_know_of_it() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        known = told.governor._line._registries
        await tasks.want("t1", A)
        told.backend.end(A)
        await settled()
        assert known == {}
        told.governor._line.refused("one.test", None)
        await anyio.sleep(pull_line.MAX_COOL_DOWN / 2)
        await tasks.want("t2", X)
        told.backend.end(X)
        await settled()
        assert known.keys() == {"one.test"}, "it may well refuse again"
        await anyio.sleep(pull_line.MAX_COOL_DOWN)
        await tasks.want("t3", X)
        told.backend.end(X)
        await settled()
        assert known == {}

    virtual_time.run(governed(scenario))


@pytest.mark.parametrize("error", [ImagePullFailed("reset"), RegistryThrottled("429", retry_after=60.0)])
def test_a_try_follows_after_a_pause(error: BackendError) -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        ended = anyio.current_time()
        told.backend.end(A, error)
        await settled()
        while A not in told.backend.under_way:
            await anyio.sleep(0.01)
        least = 60.0 if isinstance(error, RegistryThrottled) else images.FIRST_PAUSE / 2
        assert least <= anyio.current_time() - ended <= 1.2 * max(least, images.FIRST_PAUSE)

    virtual_time.run(governed(scenario))


def test_what_is_refused_ahead_is_not_tried_again() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        pull = await told.governor.ahead(a_task(A).reference)
        assert pull is not None
        await settled()
        told.backend.end(A, RegistryThrottled("429"))
        await anyio.sleep(60.0)
        assert (pull.outcome, told.backend.pulls[A]) == ("failed", 1)

    virtual_time.run(governed(scenario))


def test_each_who_waits_gets_an_error_of_its_own() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        errors = []

        async def want(task_id: str) -> None:
            try:
                await told.governor.pull(a_task(A), task_id, f"{task_id}.1")
            except BackendError as error:
                errors.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(want, "t1")
            group.start_soon(want, "t2")
            await settled()
            told.backend.end(A, ImageNotFound("404"))
        assert [str(error) for error in errors] == [f"{A}: 404"] * 2
        assert errors[0] is not errors[1], "one that is raised twice collects both tracebacks"

    virtual_time.run(governed(scenario))


def test_a_daemon_without_room_is_asked_later_each_time_until_an_image_has_come() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        pauses = []
        for n, error in enumerate([NoCapacity("full"), NoCapacity("full"), None, NoCapacity("full")]):
            await tasks.want(f"t{n}", C)
            told.backend.end(C, error)
            await settled()
            told.backend.present.clear()
            with told.governor.place("one.test") as delay:
                pauses.append(delay)
            await anyio.sleep(delay)
        first = images.FIRST_FULL_PAUSE
        assert first / 2 <= pauses[0] <= first <= pauses[1] <= 2 * first
        assert pauses[2] == 0.0
        assert first / 2 <= pauses[3] <= first

    virtual_time.run(governed(scenario))
