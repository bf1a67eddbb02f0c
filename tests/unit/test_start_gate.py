"""The gate for starts, on simulated engines in virtual time."""

from __future__ import annotations

import os
import random
from collections import deque
from statistics import mean

import anyio
import pytest

from dispatcher.dispatch import start_gate
from dispatcher.dispatch.start_gate import HANGS_AFTER, MOST, Launch, StartGate
from tests.support import virtual_time
from tests.unit.simulated_engine import ALONE, Engine, Load

#: What a launch in a burst may take at most, as a multiple of one alone, and the least rate.
SLOWER = 2.2
RATE = 0.97


@pytest.mark.parametrize(("cores", "first"), [(1, 16), (2, 2), (2, 16), (3, 6), (8, 2), (64, 2), (64, 16)])
def test_a_busy_gate_finds_the_limit_of_its_engine(cores: int, first: int) -> None:
    async def scene() -> None:
        load = Load(Engine(cores), StartGate(limit=first))
        await load.for_seconds(70)
        slower, rate = load.seen(20, 70)
        assert slower <= SLOWER
        assert rate >= RATE

    virtual_time.run(scene())


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_after_single_launches_has_nearly_the_whole_rate(seed: int) -> None:
    async def scene() -> None:
        load = Load(Engine(2, seed=seed), StartGate(limit=4))
        for _ in range(5):
            await load.one()
        began = anyio.current_time()
        load.launched.clear()
        async with anyio.create_task_group() as group:
            for _ in range(32):
                group.start_soon(load.one)
        slower, _ = load.seen(began, anyio.current_time() + 1)
        # The last of them are fewer than the engine could work on.
        ideal = 31 / load.engine.rate() + ALONE
        assert slower <= SLOWER
        assert ideal / (anyio.current_time() - began) >= RATE - 0.02

    virtual_time.run(scene())


def test_it_follows_an_engine_that_becomes_slower_and_recovers() -> None:
    async def scene() -> None:
        load = Load(Engine(8), StartGate(limit=16))

        async def change() -> None:
            await anyio.sleep(20)
            load.engine.alone = 3 * ALONE
            await anyio.sleep(80)
            slower, rate = load.seen(40, 100)
            assert slower <= SLOWER
            assert rate >= RATE
            load.engine.alone = ALONE

        async with anyio.create_task_group() as group:
            group.start_soon(change)
            group.start_soon(load.for_seconds, 150)
        slower, rate = load.seen(110, 150)
        assert slower <= SLOWER
        assert rate >= RATE

    virtual_time.run(scene())


@pytest.mark.parametrize(
    ("ratios", "limit"),
    [
        ([2.0, 2.0], 4),
        ([2.15, 2.15], 4),  # more than is aimed at, and allowed
        ([2.6, 2.0], 4),  # one window alone
        ([2.0, 2.6, 1.4], 4),  # two that disagree
        ([2.6, 2.6], 3),
        ([1.3, 1.3], 6),
        ([1.2, 2.0, 1.2], 4),
        ([1.0, 1.6], 5),  # the smaller step
        ([2.6, 2.95, 2.6], 3),  # what was seen at another limit says nothing
        ([0.5, 0.5], 4),  # faster than alone: to be measured again first
    ],
)
def test_two_windows_in_a_row_make_a_step(ratios: list[float], limit: int) -> None:
    async def scene() -> None:
        gate = StartGate(limit=4)
        await launches(gate, [1.0] * start_gate.SOLOS, at_once=False)
        await launches(gate, in_windows(ratios), at_once=True)
        assert gate.limit == limit

    virtual_time.run(scene())


def test_windows_of_two_bursts_do_not_make_one_step() -> None:
    async def scene() -> None:
        gate = StartGate(limit=4)
        for _ in range(2):
            await launches(gate, [1.0] * start_gate.SOLOS, at_once=False)
            await launches(gate, in_windows([2.6]), at_once=True)
        assert gate.limit == 4

    virtual_time.run(scene())


def in_windows(ratios: list[float]) -> list[float]:
    """Seconds of launches that fill one window with each of these."""
    windows = [each for each in ratios for _ in range(start_gate.WINDOW)]
    # Those that are let in before the gate is full, or end after that, are in no window.
    return [ratios[0]] * 3 + windows + [ratios[-1]] * 3


async def launches(gate: StartGate, seconds: list[float], *, at_once: bool) -> None:
    """Launches that take so long, whatever else is under way."""

    async def launch(takes: float) -> None:
        async with gate.launching() as launch:
            await anyio.sleep(takes)
            launch.started()

    async with anyio.create_task_group() as group:
        for takes in seconds:
            if at_once:
                group.start_soon(launch, takes)
            else:
                await launch(takes)


def test_a_first_launch_that_was_slow_by_chance_is_soon_outweighed() -> None:
    async def scene() -> None:
        load = Load(Engine(2), StartGate(limit=4))
        load.engine.alone = 3 * ALONE
        await load.one()
        load.engine.alone = ALONE
        await load.for_seconds(100)
        slower, _ = load.seen(15, 100)
        assert slower <= SLOWER

    virtual_time.run(scene())


def test_a_change_that_is_no_cause_for_doubt_is_noticed_in_time() -> None:
    async def scene() -> None:
        load = Load(Engine(2), StartGate(limit=4))
        await load.for_seconds(5)
        load.engine.alone = 0.7 * ALONE  # what was measured before it allows three times as long
        await load.for_seconds(60)
        slower, _ = load.seen(40, 65)
        assert slower <= SLOWER

    virtual_time.run(scene())


def test_no_more_than_the_backend_can_serve_hang_at_the_same_time() -> None:
    async def scene() -> None:
        gate = StartGate(limit=4)
        inside: list[bool] = []
        widest: list[int] = []

        async def hang() -> None:
            async with gate.launching():
                inside.append(True)
                widest.append(len(inside))
                await anyio.sleep(1_000)
                inside.pop()

        async with anyio.create_task_group() as group:
            for _ in range(40):
                group.start_soon(hang)
        assert max(widest) == MOST

    virtual_time.run(scene())


@pytest.mark.parametrize("hanging", [1, 4])
def test_launches_that_hang_hold_the_others_back_for_a_moment_only(hanging: int) -> None:
    async def scene() -> None:
        load = Load(Engine(2), StartGate(limit=4))

        async def hang() -> None:
            async with load.gate.launching():
                await anyio.sleep(120)

        async with anyio.create_task_group() as group:
            for _ in range(hanging):  # the first of them is a probe
                group.start_soon(hang)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(load.for_seconds, 70)
        first = min(when for when, _ in load.launched)
        assert first < (1.0 if hanging < 4 else HANGS_AFTER) + 2
        _, rate = load.seen(HANGS_AFTER + 2, 70)
        assert rate >= RATE

    virtual_time.run(scene())


def test_a_probe_that_fails_is_not_tried_again_at_once() -> None:
    async def scene() -> None:
        gate = StartGate(limit=4)
        inside: list[bool] = []
        widest: list[int] = []

        async def failing() -> None:
            async with gate.launching():
                inside.append(True)
                widest.append(len(inside))
                await anyio.sleep(ALONE)
                inside.pop()

        async with anyio.create_task_group() as group:
            for _ in range(400):
                group.start_soon(failing)
        assert anyio.current_time() < 400 / 4 * ALONE + 1
        assert gate.limit == 4, "launches that fail say nothing"
        assert max(widest) == 4

    virtual_time.run(scene())


def test_who_came_first_enters_first() -> None:
    async def scene() -> None:
        gate = StartGate(limit=3)
        order = []

        async def launch(number: int) -> None:
            async with gate.launching() as launch:
                order.append(number)
                await anyio.sleep(ALONE)
                launch.started()

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(launch, number)
        assert order == list(range(50))

    virtual_time.run(scene())


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_limit_holds_and_no_place_is_lost(seed: int) -> None:
    """Launches succeed, fail, adopt, hang and are cancelled, while they wait and inside."""
    chance = random.Random(seed)

    async def scene() -> None:
        load = Load(Engine(chance.choice([1, 2, 8]), seed=seed), StartGate(limit=chance.randint(2, 16)))
        order: deque[int] = deque()
        entered: dict[Launch, float] = {}

        async def launch(number: int) -> None:
            with anyio.move_on_after(chance.choice([0, 0.05, 1, 5, 1_000])):
                order.append(number)
                try:
                    async with load.gate.launching() as launch:
                        assert order.popleft() == number
                        entered[launch] = anyio.current_time()
                        check()
                        try:
                            await act(launch)
                        finally:
                            del entered[launch]
                finally:
                    if number in order:
                        order.remove(number)

        async def act(launch: Launch) -> None:
            how = chance.random()
            if how < 0.02:
                await anyio.sleep(4 * HANGS_AFTER)
            if how < 0.1:
                raise ConnectionError
            await load.engine.launch()
            if how < 0.9:
                launch.started()

        def check() -> None:
            now = anyio.current_time()
            working = sum(now - when < HANGS_AFTER for when in entered.values())
            # Those are more that were inside when the limit shrank; nobody enters beside them.
            assert working <= load.gate.limit
            assert len(entered) <= MOST

        async def survived(number: int) -> None:
            try:
                await launch(number)
            except ConnectionError:
                pass

        async with anyio.create_task_group() as group:
            for number in range(300):
                if chance.random() < 0.2:
                    await anyio.sleep(chance.expovariate(2))
                group.start_soon(survived, number)
        assert not entered
        # All of it is there again: as many as the limit are inside at once.
        load.launched.clear()
        await load.for_seconds(60)
        assert load.seen(load.launched[0][0] + 30, load.launched[0][0] + 60)[1] >= RATE

    virtual_time.run(scene())


def test_who_waits_costs_nothing_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand who wait are not woken for each one that enters."""
    looks = 0
    admit = StartGate._admit

    def counted(gate: StartGate) -> None:
        nonlocal looks
        looks += 1
        admit(gate)

    monkeypatch.setattr(start_gate.StartGate, "_admit", counted)

    async def scene() -> None:
        load = Load(Engine(2), StartGate(limit=4))
        async with anyio.create_task_group() as group:
            for _ in range(1_000):
                group.start_soon(load.one)

    virtual_time.run(scene())
    assert looks < 1_000 * 4


def test_a_host_of_few_and_of_many_processors_begins_within_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def limit() -> int:
        return StartGate().limit

    limits = []
    for cores in (None, 1, 2, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        limits.append(virtual_time.run(limit()))
    assert limits == [2, 2, 4, 16]


def test_the_engine_of_these_tests_behaves_as_it_is_meant_to() -> None:
    async def scene() -> None:
        engine = Engine(2)
        took = []

        async def launch() -> None:
            began = anyio.current_time()
            await engine.launch()
            took.append(anyio.current_time() - began)

        await launch()
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(launch)
        assert took[0] == pytest.approx(ALONE, rel=0.4)
        assert mean(took[1:]) == pytest.approx(4 * ALONE, rel=0.2)

    virtual_time.run(scene())
