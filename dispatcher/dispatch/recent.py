"""What was noted lately, as long as there is room for it."""

from __future__ import annotations

import math

import anyio


class Recent:
    """Names, and when each was noted last; beyond ``most`` the oldest is forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        #: By name, on the loop's clock; the latest last.
        self._noted: dict[str, float] = {}

    def note(self, name: str) -> None:
        """Note ``name`` now."""
        self.forget(name)
        if len(self._noted) >= self._most:
            del self._noted[next(iter(self._noted))]
        self._noted[name] = anyio.current_time()

    def forget(self, name: str) -> None:
        """As if ``name`` had never been noted."""
        self._noted.pop(name, None)

    def has(self, name: str, within: float = math.inf) -> bool:
        """Whether ``name`` was noted in the last ``within`` seconds."""
        return anyio.current_time() - self._noted.get(name, -math.inf) < within
