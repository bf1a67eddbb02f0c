"""A steady stream of tasks of every kind, as many as the world can take."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from dispatcher.client import Backoff
from tests.chaos.book import Order
from tests.chaos.truth import ResultStream
from tests.chaos.world import AWAY, LEASE, World

#: Seconds between looks at how many tasks are open, and after Redis was away.
PACE = 0.15
#: Seconds for the producer to end: it may be waiting for a Redis that does not answer.
END_TIMEOUT = 60.0

_FAILED_3 = frozenset({"failed:exit:3"})
_TIMED_OUT = frozenset({"failed:timeout"})
_AGAIN = Backoff(initial=0.2, max=1)
#: Fails the first attempt and no other: infrastructure may have spent an attempt before.
_FAIL_ONCE = '[ "$DISPATCHER_ATTEMPT" -gt 1 ] || exit 9'


class Mix:
    """Draws tasks: most are short, some outlast a lease, some are delayed, retried or timed out."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._numbers = itertools.count(1)
        self._prefix = f"{rng.randrange(16**4):04x}"
        self._kinds: list[tuple[int, Callable[[str], Order]]] = [
            (56, self._short),
            (12, self._failing),
            (7, self._busy),
            (6, self._long),
            (6, self._retried),
            (7, self._delayed),
            (3, self._timed_out),
        ]

    def draw(self) -> Order:
        """The next task; half of them have an id of their own."""
        weights = [weight for weight, _ in self._kinds]
        kind = self._rng.choices([kind for _, kind in self._kinds], weights)[0]
        queue = self._rng.choices(["default", "high", "low"], [6, 2, 2])[0]
        order = kind(queue)
        named = self._rng.random() < 0.5
        return _with(order, id=self.name("task")) if named else order

    def name(self, what: str) -> str:
        """A name that is used once in this world."""
        return f"{what}-{self._prefix}-{next(self._numbers)}"

    def _short(self, queue: str) -> Order:
        return self._world.order("exit 0", queue=queue)

    def _failing(self, queue: str) -> Order:
        return self._world.order("exit 3", queue=queue, endings=_FAILED_3)

    def _busy(self, queue: str) -> Order:
        return self._world.order(f"sleep {self._rng.uniform(0.2, 1):.2f}", queue=queue)

    def _long(self, queue: str) -> Order:
        return self._world.order(f"sleep {self._rng.uniform(1.2, 2.5) * LEASE:.2f}", queue=queue)

    def _retried(self, queue: str) -> Order:
        return self._world.order(_FAIL_ONCE, queue=queue, max_attempts=2, backoff=_AGAIN)

    def _delayed(self, queue: str) -> Order:
        return self._world.order("exit 0", queue=queue, delay=round(self._rng.uniform(0.2, 2), 2))

    def _timed_out(self, queue: str) -> Order:
        timeout = round(self._rng.uniform(0.3, 1), 2)
        return self._world.order("sleep 60", queue=queue, timeout=timeout, grace_period=1, endings=_TIMED_OUT)


def _with(order: Order, **fields: object) -> Order:
    return Order(order.task.model_copy(update=fields), order.endings)


class Producer:
    """Keeps ``backlog`` tasks open until it is left; a thread of its own, as a producer would be."""

    def __init__(self, world: World, rng: random.Random, *, backlog: int) -> None:
        self.mix = Mix(world, rng)
        self._world = world
        self._rng = rng
        self._backlog = backlog
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="producer")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enough.set()
        self._thread.join(END_TIMEOUT)

    def _produce(self) -> None:
        book = self._world.book
        with self._world.server.client() as client:
            stream = ResultStream(client)
            while not self._enough.wait(PACE):
                try:
                    book.saw_end([result.task_id for result in stream.news()])
                    wanted = self._backlog - len(book.open())
                    while wanted > 0 and not self._enough.is_set():
                        wanted -= self._hand_in(min(wanted, 10))
                except AWAY:
                    continue  # what was handed in is in the book; the next round goes on

    def _hand_in(self, count: int) -> int:
        """A few tasks in one of the ways; how many. Raises what ``AWAY`` names."""
        desk, draw = self._world.desk, self.mix.draw
        way = self._rng.random()
        if way < 0.6:
            for answer in desk.submit_many([draw() for _ in range(count)]):
                if isinstance(answer, Exception):
                    raise answer
            return count
        if way < 0.9:
            for _ in range(count):
                desk.xadd(draw())
            return count
        desk.submit_twice(_with(draw(), id=None, idempotency_key=self.mix.name("key")))
        return 1
