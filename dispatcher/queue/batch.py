"""Calls that come while one is under way go together in the next."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import anyio

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Waiter(Generic[Item, Answer]):
    """One caller's item, and what became of it."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.sent = False
        self.answer: Answer
        self.error: Exception | None = None


class Batch(Generic[Item, Answer]):
    """Runs ``run(items) -> answers`` for many callers, one call at a time.

    A lone caller is served at once: batches form only under load, from what has gathered
    while the last call was under way. A caller that is cancelled before its item was sent
    takes the item back.
    """

    def __init__(self, run: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]], limit: int) -> None:
        self._run = run
        self._limit = limit
        self._waiting: deque[_Waiter[Item, Answer]] = deque()
        self._lock = anyio.Lock()

    async def call(self, item: Item) -> Answer:
        """The answer to ``item``. Raises what ``run`` raised for its batch."""
        waiter: _Waiter[Item, Answer] = _Waiter(item)
        self._waiting.append(waiter)
        try:
            async with self._lock:
                if not waiter.sent:
                    await self._send()
        except BaseException:
            if not waiter.sent:
                self._waiting.remove(waiter)
            raise
        if waiter.error is not None:
            # A copy: one object raised in many tasks would gather all their tracebacks.
            raise copy.copy(waiter.error) from waiter.error
        return waiter.answer

    async def _send(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(self._limit, len(self._waiting)))]
        for waiter in batch:
            waiter.sent = True
        # Others of the batch depend on this call: the caller's own cancellation must not end it.
        with anyio.CancelScope(shield=True):
            try:
                answers = await self._run([waiter.item for waiter in batch])
            except Exception as error:  # noqa: BLE001 - handed to every caller of the batch
                for waiter in batch:
                    waiter.error = error
            else:
                for waiter, answer in zip(batch, answers, strict=True):
                    waiter.answer = answer
