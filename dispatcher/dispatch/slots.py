"""The consumers of one instance: NUM_CONSUMERS slots, each held by the task it runs."""

from __future__ import annotations

from collections import deque

import anyio


class Slots:
    """Counts free consumers. Tasks whose image has arrived come before the reader."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = capacity
        self._reserved = 0
        self._returning: deque[anyio.Event] = deque()
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
            self._returning.popleft().set()
            self._free -= 1
        if self._free > 0:
            self._changed.set()

    async def return_within(self, seconds: float) -> bool:
        """Take one slot ahead of the reader; False if none was free for ``seconds``."""
        if self._free > 0:
            self._free -= 1
            return True
        mine = anyio.Event()
        self._returning.append(mine)
        try:
            with anyio.move_on_after(seconds):
                await mine.wait()
        except BaseException:
            if mine.is_set():
                self.release()
            raise
        finally:
            if not mine.is_set():
                self._returning.remove(mine)
        return mine.is_set()


class Slot:
    """One delivery's hold on a slot: begins held, may be let go of and taken again."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.held = True

    def release(self) -> None:
        """Let go; nothing if it is not held."""
        if self.held:
            self.held = False
            self._slots.release()

    async def regain(self, seconds: float) -> bool:
        """Take a slot again within ``seconds``; whether that succeeded."""
        self.held = await self._slots.return_within(seconds)
        return self.held
