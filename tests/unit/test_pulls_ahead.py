"""Pulls that are begun before anybody waits for them: for the places that nobody else wants."""

from __future__ import annotations

import anyio

from dispatcher.errors import ImagePullFailed, RegistryThrottled
from tests.unit.pulling import Governed, Waiters, a_task, governed, settled

A, B, C, D = (f"one.test/{name}:1" for name in "abcd")
X, Y = "two.test/x:1", "two.test/y:1"


async def test_what_is_pulled_ahead_gives_way_to_what_is_wanted() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for image in (A, B, C):
            await told.governor.ahead(a_task(image).reference)
            await settled()
        assert set(told.backend.under_way) == {A, B}, "and no third waits in the line"
        assert len(told.governor.pulls) == 2
        await tasks.want("t1", X)
        assert set(told.backend.under_way) == {A, X}, "the youngest has gone"
        await tasks.want("t2", A)
        await tasks.want("t3", Y)
        assert set(told.backend.under_way) == {A, X}, "somebody waits for both"
        told.backend.end(A)
        await settled()
        assert tasks.ends["t2"] == "pulled"
        assert set(told.backend.under_way) == {X, Y}

    await governed(scenario)


async def test_one_place_is_made_for_one_pull() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for image in (A, B):
            await told.governor.ahead(a_task(image).reference)
            await settled()
        tasks.start(f"t{X}", X)
        while not any(pull.leaving for pull in told.governor.pulls):
            await anyio.lowlevel.checkpoint()
        told.governor._line._call()  # the line is looked through again
        await settled()
        assert set(told.backend.under_way) == {A, X}

    await governed(scenario)


async def test_each_who_finds_no_place_has_one_made() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for image in (A, B):
            await told.governor.ahead(a_task(image).reference)
            await settled()
        tasks.start("t1", X)
        await tasks.want("t2", Y)
        assert set(told.backend.under_way) == {X, Y}

    await governed(scenario)


async def test_who_lost_the_place_made_for_it_to_another_has_one_more_made() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        line = told.governor._line
        await tasks.want("t1", X)
        told.backend.end(X, RegistryThrottled("429", retry_after=600.0))
        await settled()
        for image in (A, B):
            await told.governor.ahead(a_task(image).reference)
            await settled()
        tasks.start("t2", D)
        while not any(pull.leaving for pull in told.governor.pulls):
            await anyio.lowlevel.checkpoint()
        line._registries["two.test"].cool_until = anyio.current_time()  # just now: X is before D
        await settled()
        assert set(told.backend.under_way) == {X, D}

    await governed(scenario)


async def test_a_failure_ahead_is_left_to_who_wants_it() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        pull = await told.governor.ahead(a_task(A).reference)
        assert pull is not None
        await settled()
        told.backend.end(A, ImagePullFailed("reset"))
        await settled()
        assert (pull.outcome, told.backend.pulls[A]) == ("failed", 1)

    await governed(scenario)
