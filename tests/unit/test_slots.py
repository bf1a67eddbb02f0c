"""The consumers of one instance."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from dispatcher.dispatch.slots import Slot, Slots

LONG = 60.0
WEIGHTS = {"high": 6, "default": 3, "low": 1, "idle": 0}


async def full(capacity: int) -> Slots:
    """Slots that are all held."""
    slots = Slots(capacity, WEIGHTS)
    slots.settle(await slots.reserve())
    return slots


async def test_all_free_slots_are_reserved_and_the_unused_given_back() -> None:
    slots = Slots(3, WEIGHTS)
    assert await slots.reserve() == 3
    assert slots.used == 0, "what is reserved is not held yet"
    slots.settle(1)
    assert slots.used == 1
    assert await slots.reserve() == 2
    slots.settle(0)
    assert slots.used == 1


async def test_a_slot_that_comes_free_during_a_reservation_is_no_part_of_it() -> None:
    slots = await full(2)
    slots.release()
    assert await slots.reserve() == 1
    slots.release()
    slots.settle(1)
    assert slots.used == 1
    assert await slots.reserve() == 1


async def test_who_finds_none_waits_for_one() -> None:
    slots = await full(1)
    reserved = []

    async def reader() -> None:
        reserved.append(await slots.reserve())

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(reader)
            await anyio.wait_all_tasks_blocked()
            assert reserved == []
            slots.release()
    assert reserved == [1]


async def test_who_returns_is_served_before_the_reader() -> None:
    slots = await full(1)
    order = []

    async def reader() -> None:
        slots.settle(await slots.reserve())
        order.append("reader")

    async def returning() -> None:
        assert await slots.return_within(LONG, "default")
        order.append("returning")

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(reader)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(returning)
            await anyio.wait_all_tasks_blocked()
            slots.release()
            await anyio.wait_all_tasks_blocked()
            assert order == ["returning"]
            assert slots.used == 1
            slots.release()
    assert order == ["returning", "reader"]


async def test_who_returns_waits_only_so_long_and_leaves_no_trace() -> None:
    slots = await full(1)
    with anyio.fail_after(5):
        assert not await slots.return_within(0.01, "default")
        slots.release()
        assert slots.used == 0
        assert await slots.return_within(0.0, "default")
        assert slots.used == 1


@pytest.mark.parametrize("served_first", [False, True])
async def test_who_is_cancelled_while_returning_holds_no_slot(served_first: bool) -> None:
    slots = await full(1)
    served = []

    async def returning() -> None:
        served.append(await slots.return_within(LONG, "default"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(returning)
            await anyio.wait_all_tasks_blocked()
            if served_first:
                slots.release()
            group.cancel_scope.cancel()
        assert served in ([], [True])
        if served or not served_first:
            slots.release()
        assert slots.used == 0
        assert await slots.reserve() == 1


async def test_who_is_cancelled_the_moment_it_is_served_gives_its_slot_back() -> None:
    slots = await full(1)
    returning = asyncio.create_task(slots.return_within(LONG, "default"))
    await anyio.wait_all_tasks_blocked()
    slots.release()
    assert slots.used == 1
    returning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await returning
    assert slots.used == 0


async def test_several_who_return_are_served_in_their_order() -> None:
    slots = await full(2)
    order = []

    async def returning(number: int) -> None:
        await slots.return_within(LONG, "default")
        order.append(number)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(returning, number)
                await anyio.wait_all_tasks_blocked()
            slots.release(2)
            await anyio.wait_all_tasks_blocked()
            assert order == [0, 1]
            slots.release()
    assert order == [0, 1, 2]


async def served(slots: Slots, returning: list[str]) -> list[str]:
    """The queues of these who return, in the order in which they get a slot."""
    order: list[str] = []

    async def back(queue: str) -> None:
        assert await slots.return_within(LONG, queue)
        order.append(queue)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for queue in returning:
                group.start_soon(back, queue)
            await anyio.wait_all_tasks_blocked()
            for _ in returning:
                slots.release()
                await anyio.wait_all_tasks_blocked()
    return order


async def test_those_who_return_take_turns_by_their_queues_weights() -> None:
    order = await served(await full(1), ["low"] * 20 + ["default"] * 20 + ["high"] * 20)
    for rounds in range(1, 4):
        first = order[: rounds * 10]
        assert [first.count(q) for q in ("high", "default", "low")] == [rounds * 6, rounds * 3, rounds]
    assert "high" in order[:2], "no queue's turns come in one piece"
    assert "low" in order[:10]


async def test_what_is_owed_to_a_queue_is_not_forgotten_between_two_turns() -> None:
    slots = await full(1)
    first = [(await served(slots, ["low", "high"]))[0] for _ in range(14)]
    assert (first.count("high"), first.count("low")) == (12, 2)


@pytest.mark.parametrize("unserved", ["idle", "of another instance"])
async def test_a_queue_of_weight_0_returns_when_no_other_does(unserved: str) -> None:
    order = await served(await full(1), [unserved, unserved, "low", "high"])
    assert order == ["high", "low", unserved, unserved]


async def test_who_gives_up_leaves_the_turn_to_others_of_all_queues() -> None:
    slots = await full(1)
    order = []

    async def back(queue: str, seconds: float) -> None:
        if await slots.return_within(seconds, queue):
            order.append(queue)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            async with anyio.create_task_group() as cancelled:
                cancelled.start_soon(back, "high", LONG)
                group.start_soon(back, "low", LONG)
                group.start_soon(back, "default", 0.01)
                await anyio.wait_all_tasks_blocked()
                cancelled.cancel_scope.cancel()
            await back("high", 0.02)
            assert order == []
            slots.release()
    assert order == ["low"]
    assert slots.used == 1
    slots.release()
    assert await slots.reserve() == 1


async def test_a_hold_is_let_go_of_once_and_regained() -> None:
    slots = await full(1)
    slot = Slot(slots, "default")
    slot.release()
    slot.release()
    assert (slot.held, slots.used) == (False, 0)
    assert await slot.regain(LONG)
    assert (slot.held, slots.used) == (True, 1)
    slot.release()
    slots.settle(await slots.reserve())
    assert not await slot.regain(0.01)
    slot.release()
    assert (slot.held, slots.used) == (False, 1)
