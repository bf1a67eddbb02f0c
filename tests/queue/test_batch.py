"""Calls that come while one is under way go together in the next."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import anyio
import pytest

from dispatcher.errors import QueueUnavailable
from dispatcher.queue.batch import Batch


class Work:
    """Doubles numbers; each call waits for its gate."""

    def __init__(self, limit: int = 100) -> None:
        self.batches: list[list[int]] = []
        self.gate = anyio.Event()
        self.under_way = anyio.Event()
        self.running = 0
        self.batch = Batch(self._run, limit)
        self.answers: dict[int, int] = {}

    async def _run(self, items: Sequence[int]) -> Sequence[int]:
        self.running += 1
        assert self.running == 1, "one call at a time"
        self.batches.append(list(items))
        self.under_way.set()
        try:
            await self.gate.wait()
            if -1 in items:
                raise ValueError("minus one")
            return [2 * item for item in items]
        finally:
            self.running -= 1

    async def call(self, item: int) -> None:
        self.answers[item] = await self.batch.call(item)


async def test_a_lone_caller_is_served_at_once() -> None:
    work = Work()
    work.gate.set()
    assert [await work.batch.call(n) for n in (1, 2)] == [2, 4]
    assert work.batches == [[1], [2]]


async def test_what_gathers_goes_together_within_the_limit() -> None:
    work = Work(limit=4)
    async with anyio.create_task_group() as group:
        group.start_soon(work.call, 0)
        await work.under_way.wait()
        for number in range(1, 11):
            group.start_soon(work.call, number)
        await anyio.wait_all_tasks_blocked()
        work.gate.set()
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert work.answers == {n: 2 * n for n in range(11)}


async def test_an_error_reaches_each_caller_of_its_batch_and_no_other() -> None:
    work = Work()
    failed = []

    async def fails(item: int) -> None:
        with pytest.raises(ValueError, match="minus one"):
            await work.batch.call(item)
        failed.append(item)

    async with anyio.create_task_group() as group:
        group.start_soon(work.call, 0)
        await work.under_way.wait()
        group.start_soon(fails, -1)
        group.start_soon(fails, 5)
        await anyio.wait_all_tasks_blocked()
        work.gate.set()
    assert sorted(failed) == [-1, 5]
    await work.call(7)
    assert work.answers == {0: 0, 7: 14}


async def test_each_caller_is_raised_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    failed: list[QueueUnavailable] = []
    cause = ConnectionResetError("peer")

    async def run(items: Sequence[int]) -> Sequence[int]:
        await work.gate.wait()
        raise QueueUnavailable(f"{len(items)} items") from cause

    async def fails(item: int) -> None:
        with pytest.raises(QueueUnavailable) as refusal:
            await work.batch.call(item)
        failed.append(refusal.value)

    monkeypatch.setattr(work.batch, "_run", run)
    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(fails, number)
            await anyio.wait_all_tasks_blocked()
        work.gate.set()
    assert len({id(error) for error in failed}) == 4
    assert [str(error) for error in failed] == ["1 items", *["3 items"] * 3]
    for error in failed:
        assert error.__cause__ is not None, "what it came from is told as well"
        assert error.__cause__.__cause__ is cause
        frames = traceback.extract_tb(error.__traceback__)
        assert len([frame for frame in frames if frame.name == "fails"]) == 1


async def test_a_caller_cancelled_in_time_takes_its_item_back() -> None:
    work = Work()
    async with anyio.create_task_group() as group:
        group.start_soon(work.call, 0)
        await work.under_way.wait()
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(work.call, 1)
            group.start_soon(work.call, 2)
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
        work.gate.set()
    assert work.batches == [[0], [2]]
    assert work.answers == {0: 0, 2: 4}


async def test_a_caller_cancelled_while_it_sends_for_others_sends_on() -> None:
    work = Work()
    async with anyio.create_task_group() as group:
        group.start_soon(work.call, 0)
        await work.under_way.wait()
        leader = anyio.CancelScope()

        async def lead() -> None:
            with leader:
                await work.call(1)

        group.start_soon(lead)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(work.call, 2)
        await anyio.wait_all_tasks_blocked()
        gate, work.gate, work.under_way = work.gate, anyio.Event(), anyio.Event()
        gate.set()
        await work.under_way.wait()
        leader.cancel()
        await anyio.wait_all_tasks_blocked()
        work.gate.set()
    assert work.batches == [[0], [1, 2]]
    assert work.answers[2] == 4
