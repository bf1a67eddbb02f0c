"""What was handed in, and what its producers were told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import redis

from dispatcher.client import Client, DispatcherError, Handle, Task
from tests.chaos.truth import stream_of


@dataclass(frozen=True)
class Order:
    """A task with the ways in which it may end (see ``Result.ending``); none named: any."""

    task: Task
    endings: frozenset[str] = frozenset({"succeeded"})


@dataclass
class Book:
    """Every submission with its answer. One whose reply was lost may have been accepted or not."""

    accepted: set[str] = field(default_factory=set)
    maybe: set[str] = field(default_factory=set)
    anonymous: int = 0
    endings: dict[str, frozenset[str]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    #: Tasks of which somebody has seen a result.
    ended: set[str] = field(default_factory=set)
    lies: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, task_id: str, order: Order) -> None:
        """Its producer was told that it is accepted."""
        with self.lock:
            self.accepted.add(task_id)
            self.maybe.discard(task_id)
            self._expect(task_id, order)

    def doubt(self, order: Order) -> None:
        """Its producer was told nothing."""
        with self.lock:
            if order.task.id is None:
                self.anonymous += 1
            elif order.task.id not in self.accepted:
                self.maybe.add(order.task.id)
                self._expect(order.task.id, order)

    def cancel(self, task_id: str) -> None:
        """Somebody is about to ask for its end."""
        with self.lock:
            self.cancelled.add(task_id)

    def saw_end(self, task_ids: Sequence[str]) -> None:
        """Results have come."""
        with self.lock:
            self.ended.update(task_ids)

    def open(self) -> list[str]:
        """Accepted, and no result was seen yet; in a fixed order."""
        with self.lock:
            return sorted(self.accepted - self.ended)

    def _expect(self, task_id: str, order: Order) -> None:
        if order.endings:
            self.endings[task_id] = order.endings


class Desk:
    """Hands tasks in and writes the answers down. May be used from many threads."""

    def __init__(self, book: Book, client: Client, plain: Callable[[], redis.Redis]) -> None:
        self._book = book
        self._client = client
        self._plain = plain

    def submit(self, order: Order) -> str:
        """By the Python client; the id. Raises DispatcherError, and then it may be accepted."""
        answer = self.submit_many([order])[0]
        if isinstance(answer, DispatcherError):
            raise answer
        return answer

    def submit_many(self, orders: Sequence[Order]) -> list[str | DispatcherError]:
        """By the Python client, in few round trips."""
        answers: list[str | DispatcherError] = []
        for order, answer in zip(
            orders, self._client.submit_many([order.task for order in orders]), strict=True
        ):
            if isinstance(answer, Handle):
                self._book.accept(answer.id, order)
                answers.append(answer.id)
            else:
                self._book.doubt(order)
                answers.append(answer)
        return answers

    def submit_twice(self, order: Order) -> str:
        """A task with an idempotency key, handed in until two answers have come, as a careful
        producer does: both must name one task. Raises DispatcherError before the first."""
        first = self.submit(order)
        second = self.submit(order)
        if second != first:
            with self._book.lock:
                self._book.lies.append(f"key {order.task.idempotency_key}: {first} and {second}")
        return first

    def xadd(self, order: Order) -> str:
        """As a program of any language does it; the id. Raises redis.RedisError, and then it may
        be accepted."""
        task = order.task
        with self._plain() as client:
            try:
                entry = client.xadd(stream_of(task.queue), {"task": task.document()})
            except redis.RedisError:
                self._book.doubt(order)
                raise
        assert isinstance(entry, bytes)
        task_id = task.id or f"{task.queue}.{entry.decode()}"
        self._book.accept(task_id, order)
        return task_id
