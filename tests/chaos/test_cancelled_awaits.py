"""A delivery is cancelled at each of its awaits in turn: nothing is orphaned, the task ends once.

What cancels a delivery in earnest is a scope: its lease was lost, or its instance ends. Here a
scope around each is cancelled at the k-th suspension, for every k until runs come to their end.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import anyio
import pytest

from dispatcher.client import AsyncClient, Task
from dispatcher.model import Delivery
from dispatcher.queue.leases import Lease
from dispatcher.service import Dispatcher
from tests.chaos.checker import Account, check
from tests.chaos.truth import STREAM, Ledger, ResultStream, open_ids, waiting
from tests.support.redis_server import RedisUnderTest
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until

TIMEOUT = 60.0
LEASE = 1.0
#: Deliveries at the same time.
CONSUMERS = 8
#: Suspensions that are tried for each kind of task: more than a run of it has.
MOST = {"exits": 50, "late": 75, "plain": 55}

Run = Callable[[Delivery, Lease], Coroutine[None, None, None]]


class Steps(Generator[Any, Any, None]):
    """Goes through a coroutine, and calls ``suspended`` each time that it waits for something."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], suspended: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._suspended = suspended

    def __await__(self) -> Generator[Any, Any, None]:
        return self

    def send(self, value: Any) -> Any:
        awaited = self._coroutine.send(value)
        self._suspended()
        return awaited

    def throw(self, *error: Any) -> Any:
        awaited = self._coroutine.throw(*error)
        self._suspended()
        return awaited


class Cancelling:
    """Runs deliveries; of each kind of task the k-th that comes is cancelled at its k-th suspension."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._numbers: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))
        self._known: set[bytes] = set()
        self.over = 0
        #: Which suspension each kind was cancelled at, and which it did not come to.
        self.cancelled: defaultdict[str, set[int]] = defaultdict(set)
        self.completed: defaultdict[str, set[int]] = defaultdict(set)

    async def run(self, delivery: Delivery, lease: Lease) -> None:
        document = dict(delivery.fields)[b"task"] if delivery.fields is not None else delivery.document
        if document in self._known:  # one that was cancelled has come back
            await self._run(delivery, lease)
            return
        self._known.add(document)
        kind = kind_of(Task.model_validate_json(document).id or "")
        await self._run_until(next(self._numbers[kind]), kind, self._run(delivery, lease))
        self.over += 1

    async def _run_until(self, last: int, kind: str, coroutine: Coroutine[Any, Any, None]) -> None:
        numbers = itertools.count(1)
        with anyio.CancelScope() as scope:

            def suspended() -> None:
                if next(numbers) == last:
                    scope.cancel()

            await Steps(coroutine, suspended)
            self.completed[kind].add(last)
            return
        self.cancelled[kind].add(last)


def kind_of(task_id: str) -> str:
    return task_id.partition("-")[0]


class Tasks:
    """Tasks of each kind, with what is expected of them."""

    def __init__(self, system: ProcessSystem) -> None:
        self.system = system
        self.ledger = Ledger(system.directory / "ledger")
        self.endings: dict[str, set[str]] = {}

    def _new(self, kind: str, script: str, ending: str, **fields: Any) -> list[Task]:
        ids = [f"{kind}-{number}" for number in range(1, MOST[kind] + 1)]
        self.endings |= {task_id: {ending} for task_id in ids}
        return [self.system.task(self.ledger.script(script), id=task_id, **fields) for task_id in ids]

    async def hand_in(self, client: AsyncClient) -> None:
        await client.submit_many(self._new("exits", "exit 3", "failed:exit:3"))
        await client.submit_many(
            self._new("late", "sleep 600", "failed:timeout", timeout=0.3, grace_period=0.3)
        )
        with self.system.redis.client() as redis:
            for task in self._new("plain", "exit 3", "failed:exit:3"):
                redis.xadd(STREAM, {"task": task.document()})

    def account(self) -> Account:
        with self.system.redis.client() as redis:
            return Account(
                accepted=frozenset(self.endings),
                endings=self.endings,
                results=ResultStream(redis).news(),
                starts=self.ledger.starts(),
                waiting=waiting(redis),
                left=[path.name for path in self.system.directory.glob("process/attempts/*/*")],
            )


async def drained(instance: Dispatcher) -> None:
    instance.drain()
    await wait_until(lambda: instance.lifecycle == "stopped", TIMEOUT)


@pytest.mark.timeout(180)
async def test_whatever_await_is_cancelled_the_task_ends_once(
    redis_server: RedisUnderTest, tmp_path: Path
) -> None:
    system = ProcessSystem(redis_server, tmp_path)
    tasks = Tasks(system)
    flags: dict[str, Any] = {
        "lease_seconds": LEASE, "num_consumers": CONSUMERS, "max_deliveries": 100, "reconcile_grace": 1,
    }  # fmt: skip
    async with system.client() as client:
        async with system.instance(**flags) as hurt:
            cancelling = Cancelling(hurt.intake._run)
            hurt.intake._run = cancelling.run
            await tasks.hand_in(client)
            await wait_until(lambda: cancelling.over == len(tasks.endings), TIMEOUT)
            await wait_until(lambda: hurt.slots.used == len(hurt.keeper.held), TIMEOUT)
            await drained(hurt)
            assert (hurt.slots.used, dict(hurt.keeper.held)) == (0, {})
        for kind, most in MOST.items():
            # Every await was hit, and the last of these numbers were beyond the end.
            assert cancelling.cancelled[kind] >= set(range(1, 16))
            assert max(cancelling.cancelled[kind]) < most

        def all_ended() -> bool:
            with redis_server.client() as redis:
                return not open_ids(redis)

        async with system.instance(**flags) as healthy:
            await wait_until(all_ended, TIMEOUT)
            await wait_until(lambda: not tasks.account().left, TIMEOUT)
            await wait_until(lambda: healthy.slots.used == 0, TIMEOUT)
    account = tasks.account()
    assert not check(account).broken()
    # Where it was removed again between its creation and its start, that attempt is over; but no
    # program was begun in two attempts.
    assert set(Counter(task_id for task_id, _ in account.starts).values()) == {1}
