"""The consumers of one instance: NUM_CONSUMERS slots, each held by the task it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import anyio


class Slots:
    """Counts free consumers. Tasks whose image has arrived come before the reader, and among
    themselves in their queue's turn: by weight, and in one queue in the order they came."""

    def __init__(self, capacity: int, weights: Mapping[str, int]) -> None:
        """``weights`` of the queues this instance serves; 0: only when no other queue's returns."""
        self.capacity = capacity
        self._weights = weights
        self._free = capacity
        self._reserved = 0
        #: By queue, who waits for a slot; no queue without anybody.
        self._returning: dict[str, deque[anyio.Event]] = {}
        #: What each queue is owed of the turns, as in ``lua/take.lua``.
        self._credit: dict[str, int] = {}
        self._changed = anyio.Event()

    @property
    def free(self) -> int:
        """Slots that nobody holds or has reserved; below zero after ``overdraw``."""
        return self._free

    @property
    def used(self) -> int:
        """Slots that tasks hold now."""
        return self.capacity - self._free - self._reserved

    async def reserve(self) -> int:
        """Wait until at least one slot is free and nobody returns to one; reserve all that are.

        ``settle`` says how many of them tasks hold from then on.
        """
        while self._free <= 0:
            self._changed = anyio.Event()
            await self._changed.wait()
        self._reserved, self._free = self._free, 0
        return self._reserved

    def settle(self, held: int) -> None:
        """Of what was reserved ``held`` slots have a task now; the rest is free again."""
        rest, self._reserved = self._reserved - held, 0
        self.release(rest)

    def overdraw(self, n: int) -> None:
        """Hold ``n`` slots more, also where there are none: for what runs already."""
        self._free -= n

    def release(self, n: int = 1) -> None:
        """Give ``n`` slots back; those who return are served first."""
        self._free += n
        while self._free > 0 and self._returning:
            queue = self._next_queue()
            first = self._returning[queue][0]
            self._leave(queue, first)
            first.set()
            self._free -= 1
        if self._free > 0:
            self._changed.set()

    def _next_queue(self) -> str:
        """Smooth weighted round robin, as in ``lua/take.lua``: every queue gains its weight, the
        richest is picked and pays the total."""
        weighty = {queue: self._weights[queue] for queue in self._returning if self._weights.get(queue)}
        weights = weighty or dict.fromkeys(self._returning, 1)
        for queue, weight in weights.items():
            self._credit[queue] = self._credit.get(queue, 0) + weight
        best = max(weights, key=self._credit.__getitem__)
        self._credit[best] -= sum(weights.values())
        return best

    def _leave(self, queue: str, event: anyio.Event) -> None:
        self._returning[queue].remove(event)
        if not self._returning[queue]:
            del self._returning[queue]

    async def return_within(self, seconds: float, queue: str) -> bool:
        """Take one slot for a task of ``queue`` ahead of the reader; False if none was free for
        ``seconds``."""
        if self._free > 0:
            self._free -= 1
            return True
        mine = anyio.Event()
        self._returning.setdefault(queue, deque()).append(mine)
        try:
            with anyio.move_on_after(seconds):
                await mine.wait()
        except BaseException:
            if mine.is_set():
                self.release()
            raise
        finally:
            if not mine.is_set():
                self._leave(queue, mine)
        return mine.is_set()


class Slot:
    """One delivery's hold on a slot: begins held, may be let go of and taken again."""

    def __init__(self, slots: Slots, queue: str) -> None:
        """``queue`` is the delivery's."""
        self._slots = slots
        self._queue = queue
        self.held = True

    def release(self) -> None:
        """Let go; nothing if it is not held."""
        if self.held:
            self.held = False
            self._slots.release()

    async def regain(self, seconds: float) -> bool:
        """Take a slot again within ``seconds``; whether that succeeded."""
        self.held = await self._slots.return_within(seconds, self._queue)
        return self.held
