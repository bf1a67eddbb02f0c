"""Hours within a moment: an event loop whose clock goes on only when nothing is left to do."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
#: Seconds of a turn of the loop in which nothing is waited for: more than its clock's resolution.
TURN = 1e-8


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: what would be waited is added to the time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for another: nothing would ever go on")
        if not ready and timeout is not None:
            # A turn takes some time, as in earnest: a loop lets timers go that are due in less than
            # its clock can tell, and who looks whether it is time would look for ever.
            self.now += max(TURN, timeout)
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """What ``coroutine`` returns, with all its sleeps and timeouts, at once.

    It may wait for nothing outside of this process. Raises RuntimeError if it would wait for ever.
    """
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)
