"""Pauses between tries."""

from __future__ import annotations

from random import uniform

import anyio


class RetryPause:
    """Waits longer from try to try: ``first`` seconds, doubled each time up to ``longest``.

    Half of each pause is kept and half is drawn, so that many who fail together do not try
    again together (M. Brooker, "Exponential Backoff And Jitter", 2015: equal jitter).
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    async def wait(self) -> None:
        """Pause before the next try."""
        pause, self._next = self._next, min(self._longest, self._next * 2)
        await anyio.sleep(uniform(pause / 2, pause))  # noqa: S311 - jitter, not a secret

    def reset(self) -> None:
        """What was tried has succeeded: the next pause is the first again."""
        self._next = self._first
