"""The governor of pulls, on a backend whose pulls end when the test says so."""

from __future__ import annotations

import math

import anyio
import pytest

from dispatcher.dispatch import images as images_module
from dispatcher.dispatch import pull_line
from dispatcher.dispatch.pull_line import PullLine
from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ImageInvalid,
    ImageNotFound,
    ImagePullFailed,
    NoCapacity,
    RegistryThrottled,
)
from tests.unit.pulling import Governed, Waiters, a_task, governed, no_pauses, settled

A, B, C, D = (f"one.test/{name}:1" for name in "abcd")
X, Y = "two.test/x:1", "two.test/y:1"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pauses(monkeypatch.setattr)


# --- sharing --------------------------------------------------------------------------------


async def test_all_who_want_an_image_share_one_pull() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for n in range(20):
            await tasks.want(f"t{n}", A)
        [pull] = told.governor.pulls
        assert (pull.waiters, pull.waiting_tasks[:2]) == (20, ["t0", "t1"])
        told.backend.end(A)
        await settled()
        assert set(tasks.ends.values()) == {"pulled"}
        assert told.backend.pulls == {A: 1}
        assert told.pulled == [(A, "", f"id of {A}", True)]
        assert told.used == [A] * 20

    await governed(scenario)


async def test_an_image_that_was_just_there_is_not_asked_for_again() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        told.backend.present.add(A)
        for _ in range(5):
            assert not await told.governor.needs_pull(a_task(A), "t.1")
        assert told.backend.looks[A] == 1
        told.backend.present.clear()
        assert not await told.governor.needs_pull(a_task(A), "t.1"), (
            "for some seconds it is taken to be there"
        )
        told.governor.forget(A)
        assert await told.governor.needs_pull(a_task(A), "t.1")

    await governed(scenario)


async def test_what_a_pull_policy_asks_for() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        needs_pull = told.governor.needs_pull
        with pytest.raises(ImageNotFound, match="pull_policy is never"):
            await needs_pull(a_task(A, pull_policy="never"), "t.1")
        assert await needs_pull(a_task(A), "t.1")
        told.backend.present.add(B)
        assert not await needs_pull(a_task(B, pull_policy="never"), "t.1")
        assert await needs_pull(a_task(B, pull_policy="always"), "t.1")

    await governed(scenario)


async def test_the_pull_ends_with_the_last_who_waits_for_it() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        await tasks.want("t2", A)
        tasks.scopes["t1"].cancel()
        await settled()
        assert A in told.backend.under_way
        tasks.scopes["t2"].cancel()
        await tasks.want("t3", A)  # while the first is on its way out
        assert told.backend.pulls == {A: 2}
        assert told.ended == ["cancelled"]
        told.backend.end(A)
        await settled()
        assert tasks.ends == {"t1": "cancelled", "t2": "cancelled", "t3": "pulled"}
        assert told.governor.pulls == []

    await governed(scenario)


async def test_what_was_pulled_for_an_attempt_need_not_be_pulled_for_it_again() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        always = a_task(A, pull_policy="always")
        async with anyio.create_task_group() as group:
            group.start_soon(told.governor.pull, always, "t", "t.1")
            await settled()
            told.backend.end(A)
        assert not await told.governor.needs_pull(always, "t.1")
        assert await told.governor.needs_pull(always, "t.2")
        assert await told.governor.needs_pull(always, "other.1")

    await governed(scenario)


# --- places to wait -------------------------------------------------------------------------


async def test_no_more_may_wait_than_there_are_places() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        place = told.governor.place
        with place("one.test") as first, place("two.test") as second:
            assert (first, second, told.governor.waiting) == (0.0, 0.0, 2)
            delays = []
            for _ in range(50):
                with place("one.test") as delay:
                    delays.append(delay)
            assert told.governor.waiting == 2
        assert delays[0] >= images_module.FIRST_RETURN
        assert delays[-1] - delays[0] == pytest.approx(49 / images_module.RETURN_RATE, abs=0.5)
        with place("one.test") as delay:
            assert delay == 0.0

    await governed(scenario, max_waiting=2)


async def test_a_daemon_without_room_is_sent_nothing_more_for_a_while() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        told.backend.end(A, NoCapacity("no space left on device"))
        await settled()
        assert (tasks.ends, told.backend.pulls[A]) == ({"t1": "NoCapacity"}, 1)
        pause = images_module.FIRST_FULL_PAUSE
        with told.governor.place("two.test") as delay:
            assert pause / 2 - 1 <= delay <= pause
        assert await told.governor.ahead(a_task(B).reference) is None

    await governed(scenario)


async def test_a_registry_that_is_left_alone_takes_no_places_from_others() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        place = told.governor.place
        told.governor._line.refused("one.test", 600.0)
        with place("one.test") as its_own, place("one.test") as one_too_many, place("two.test") as another:
            assert its_own == another == 0.0
            assert one_too_many > 0

    await governed(scenario, max_waiting=1)


# --- turns ----------------------------------------------------------------------------------


async def test_pulls_take_turns_and_tell_their_order() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for n, image in enumerate([A, B, C, D]):
            await tasks.want(f"t{n}", image)
        assert [(pull.image, pull.active) for pull in told.governor.pulls] == [
            (A, True), (B, True), (C, False), (D, False),
        ]  # fmt: skip
        told.backend.end(B)
        await settled()
        assert [(pull.image, pull.active) for pull in told.governor.pulls] == [
            (A, True), (C, True), (D, False),
        ]  # fmt: skip

    await governed(scenario)


async def test_a_registry_has_its_own_share() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        for n, image in enumerate([A, B, X]):
            await tasks.want(f"t{n}", image)
        assert set(told.backend.under_way) == {A, X}

    await governed(scenario, at_once=2, per_registry=1)


# --- failures -------------------------------------------------------------------------------


async def test_what_may_be_otherwise_in_a_moment_is_tried_again_within_a_budget() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        for _ in range(images_module.PULL_TRIES):
            assert tasks.ends == {"t1": "cancelled"}
            told.backend.end(A, ImagePullFailed("connection reset"))
            await settled()
        assert tasks.ends == {"t1": "ImagePullFailed"}
        assert told.backend.pulls[A] == images_module.PULL_TRIES == told.ended.count("failed")

    await governed(scenario)


async def test_one_that_comes_through_later_is_a_pull_like_any() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        told.backend.end(A, ImagePullFailed("unexpected EOF"))
        await settled()
        told.backend.end(A)
        await settled()
        assert tasks.ends == {"t1": "pulled"}
        kinds = ["image.pull_started", "image.pull_ended"]
        assert told.kinds(A) == kinds * 2

    await governed(scenario)


async def test_an_answer_that_is_no_image_is_an_answer() -> None:
    """A registry that was throttled and now says 404 is well: its pulls need not go one by one."""

    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        told.backend.end(A, RegistryThrottled("429", retry_after=0.0))
        await settled()
        told.backend.end(A, ImageNotFound("404"))
        await settled()
        await tasks.want("t2", B)
        await tasks.want("t3", C)
        assert set(told.backend.under_way) == {B, C}

    await governed(scenario)


@pytest.mark.parametrize("error", [ImageNotFound("no"), ImageInvalid("no"), BackendUnreachable("no")])
async def test_what_will_not_change_is_not_tried_again(error: BackendError) -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        await tasks.want("t2", A)
        told.backend.end(A, error)
        await settled()
        assert set(tasks.ends.values()) == {type(error).__name__}
        assert told.backend.pulls[A] == 1

    await governed(scenario)


async def test_one_that_stalls_is_given_up_at_once() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        with anyio.fail_after(10):
            while tasks.ends["t1"] == "cancelled":
                await anyio.sleep(0.01)
        assert tasks.ends["t1"] == "Stalled"
        assert told.backend.pulls[A] == 1

    await governed(scenario, stall_timeout=0.05)


async def test_one_that_may_be_waiting_for_others_layers_is_left_as_long_as_they_come() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        await tasks.want("t2", B)
        began = anyio.current_time()
        with anyio.fail_after(10):
            while anyio.current_time() - began < 0.5:
                told.backend.move(A, 1, 100)
                await anyio.sleep(0.01)
            assert tasks.ends["t2"] == "cancelled", "it still waits"
            told.backend.move(B, 50, 100)
            while tasks.ends["t2"] == "cancelled":
                told.backend.move(A, 2, 100)
                await anyio.sleep(0.01)
        assert tasks.ends == {"t1": "cancelled", "t2": "Stalled"}, "in the middle of a layer"

    await governed(scenario, stall_timeout=0.1)


async def test_progress_is_counted_and_told() -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        told.backend.move(A, 10, 100)
        told.backend.move(A, 60, 100)
        [pull] = told.governor.pulls
        assert (pull.progress.bytes_done, pull.progress.bytes_total, told.bytes) == (60, 100, 60)

    await governed(scenario)


# --- registries that want to be left alone --------------------------------------------------


async def test_a_registry_that_refuses_is_left_alone_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        told.backend.end(A, RegistryThrottled("429", retry_after=0.2))
        began = anyio.current_time()
        await settled()
        assert 0 < told.governor.cooling["one.test"] <= 0.22
        await tasks.want("t2", B)
        await tasks.want("t3", X)
        assert set(told.backend.under_way) == {X}, "the other image of that registry waits as well"
        with anyio.fail_after(10):
            while A not in told.backend.under_way:
                await anyio.sleep(0.005)
        assert anyio.current_time() - began >= 0.2
        assert B not in told.backend.under_way, "one asks whether it is well again"
        told.backend.end(A)
        await settled()
        assert B in told.backend.under_way
        assert told.governor.cooling == {}

    await governed(scenario, at_once=4)


async def test_refusals_make_the_pause_longer_until_a_pull_comes_through() -> None:
    line = PullLine(at_once=1, per_registry=1)
    pull_line.FIRST_COOL_DOWN = 1.0  # put back by the fixture
    pauses = []
    for _ in range(12):
        pauses.append(line.refused("one.test", None))
        line._registries["one.test"].cool_until = -math.inf
    for n, pause in enumerate(pauses):
        full = min(pull_line.MAX_COOL_DOWN, 2.0**n)
        assert full / 2 <= pause <= full
    line.answered("one.test")
    assert line.refused("one.test", None) <= 1.0
    assert line.refused("one.test", 1e9) <= 1.1 * pull_line.MAX_RETRY_AFTER


async def test_those_who_wait_hear_of_a_second_refusal() -> None:
    """The one that asks again fails for good; the rest must go on when the pause is over."""

    async def scenario(told: Governed, tasks: Waiters) -> None:
        await tasks.want("t1", A)
        await tasks.want("t2", B)
        with anyio.fail_after(10):
            while tasks.open:
                for image in list(told.backend.under_way):
                    told.backend.end(image, RegistryThrottled("429", retry_after=0.02))
                await anyio.sleep(0.005)
        assert set(tasks.ends.values()) == {"RegistryThrottled"}

    await governed(scenario, at_once=1)
