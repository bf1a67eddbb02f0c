"""The line that pulls wait in: how many at once, how many of one registry, which one next.

Pulls that tasks wait for go first, in the order they came. One that is made ahead of its tasks
gets only what is left, and gives way when a pull that somebody waits for finds no place. Nothing
is held while a place is awaited, and what waits for one registry never keeps another's waiting.

A registry that asks to be left alone is: for as long as it said, or else longer each time. The
first pull after that goes alone, and the others follow when it has come.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import uniform
from typing import Literal

import anyio

from dispatcher.backends.base import PullProgress
from dispatcher.errors import BackendError

#: Seconds a registry is left alone that does not say for how long: at first, and at the longest.
FIRST_COOL_DOWN = 1.0
MAX_COOL_DOWN = 300.0
#: The longest that a registry's own word is taken for: what it says may be a mistake.
MAX_RETRY_AFTER = 900.0

PullOutcome = Literal["pulled", "failed", "cancelled"]


@dataclass(eq=False)
class Pull:
    """One pull, shared by all who wait for its image."""

    image: str
    registry: str
    progress: PullProgress
    #: Whether it was begun for tasks that nobody has taken yet.
    ahead: bool = False
    #: Ids of the tasks that wait for it, in the order they came.
    waiting_tasks: list[str] = field(default_factory=list)
    #: Whether it is one of the MAX_CONCURRENT_PULLS.
    active: bool = False
    #: Times that it was under way.
    tries: int = 0
    outcome: PullOutcome = "cancelled"
    error: BackendError | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    #: When it moved last, on the loop's clock.
    moved_at: float = -math.inf
    #: Set when its turn has come.
    called: anyio.Event = field(default_factory=anyio.Event)
    #: The pull that was told to give way to this one.
    displaces: Pull | None = None

    @property
    def waiters(self) -> int:
        """How many tasks wait for it."""
        return len(self.waiting_tasks)

    @property
    def leaving(self) -> bool:
        """Whether it was told to end without its image."""
        return self.scope.cancel_called


@dataclass
class _Registry:
    active: int = 0
    #: Until when it is left alone, on the loop's clock.
    cool_until: float = -math.inf
    #: How often it has asked for that since a pull from it came through.
    refusals: int = 0


class PullLine:
    """Gives pulls their turns."""

    def __init__(self, *, at_once: int, per_registry: int) -> None:
        self._at_once = at_once
        self._per_registry = per_registry
        self._waiting: list[Pull] = []
        self._active: list[Pull] = []
        self._registries: dict[str, _Registry] = {}
        self._cooled = anyio.Event()

    @property
    def full(self) -> bool:
        """Whether every place is taken."""
        return len(self._active) >= self._at_once

    def has_room(self, registry: str) -> bool:
        """Whether a pull from ``registry`` would have its turn at once."""
        found = self._registries.get(registry, _Registry())
        return not (self.full or self._registry_full(found) or found.cool_until > anyio.current_time())

    @property
    def under_way(self) -> list[Pull]:
        """Pulls that hold a place."""
        return list(self._active)

    @property
    def order(self) -> list[Pull]:
        """Pulls under way, then those that wait, the next first."""
        return [*self._active, *self._next()]

    @property
    def cooling(self) -> dict[str, float]:
        """Registries that are left alone, and the seconds until they are asked again."""
        now = anyio.current_time()
        return {name: r.cool_until - now for name, r in self._registries.items() if r.cool_until > now}

    def is_cooling(self, registry: str) -> bool:
        """Whether ``registry`` is left alone now."""
        found = self._registries.get(registry)
        return found is not None and found.cool_until > anyio.current_time()

    async def run(self) -> None:
        """Call those who wait for a registry when it may be asked again; until cancelled."""
        while True:
            self._cooled = anyio.Event()
            with anyio.move_on_after(min(self.cooling.values(), default=math.inf)):
                await self._cooled.wait()
            self._call()

    @asynccontextmanager
    async def turn(self, pull: Pull) -> AsyncIterator[None]:
        """Wait for the turn of ``pull``, and hold its place inside."""
        self._waiting.append(pull)
        try:
            self._call()
            await pull.called.wait()
            yield
        finally:
            if pull.active:
                pull.active = False
                self._active.remove(pull)
                self._of(pull).active -= 1
            else:
                self._waiting.remove(pull)
            pull.called, pull.displaces = anyio.Event(), None
            self._call()
            self._tidy()

    def wanted(self, pull: Pull) -> None:
        """A task waits now for what was begun ahead."""
        pull.ahead = False
        self._call()

    def refused(self, registry: str, retry_after: float | None) -> float:
        """``registry`` asks to be left alone, for ``retry_after`` seconds where it said so.

        Returns the seconds that it will be.
        """
        found = self._registries.setdefault(registry, _Registry())
        seconds = min(MAX_COOL_DOWN, FIRST_COOL_DOWN * 2 ** min(found.refusals, 16))
        seconds = uniform(seconds / 2, seconds)  # noqa: S311 - jitter, not a secret
        if retry_after is not None:
            # Never before it said, and not everybody at the moment it said.
            asked = min(MAX_RETRY_AFTER, retry_after)
            seconds = max(seconds, uniform(asked, 1.1 * asked))  # noqa: S311 - jitter
        if found.cool_until <= anyio.current_time():  # others that were under way say the same
            found.refusals += 1
        found.cool_until = max(found.cool_until, anyio.current_time() + seconds)
        self._cooled.set()
        return seconds

    def answered(self, registry: str) -> None:
        """``registry`` has given an image, or said outright why not."""
        if found := self._registries.get(registry):
            found.refusals = 0  # the turn of that pull ends now, and others follow

    # --- whose turn it is ---------------------------------------------------------------

    def _of(self, pull: Pull) -> _Registry:
        return self._registries.setdefault(pull.registry, _Registry())

    def _tidy(self) -> None:
        """Forget registries that there is nothing to know of, and refusals of long ago."""
        waited_for = {pull.registry for pull in self._waiting}
        long_ago = anyio.current_time() - MAX_COOL_DOWN
        for name, found in list(self._registries.items()):
            if (
                not found.active
                and name not in waited_for
                and (not found.refusals or found.cool_until < long_ago)
            ):
                del self._registries[name]

    def _next(self) -> list[Pull]:
        return sorted(self._waiting, key=lambda pull: pull.ahead)

    def _call(self) -> None:
        """Give places to those whose turn it is."""
        if self.full and not any(other.ahead for other in self._active):
            return
        for pull in self._next():
            registry = self._of(pull)
            if registry.cool_until > anyio.current_time():
                continue
            if not self.full and not self._registry_full(registry):
                self._waiting.remove(pull)
                self._active.append(pull)
                registry.active += 1
                pull.active = True
                pull.called.set()
            elif not pull.ahead:
                self._make_way(pull, of_its_registry=self._registry_full(registry))

    def _registry_full(self, registry: _Registry) -> bool:
        return registry.active >= (1 if registry.refusals else self._per_registry)

    def _make_way(self, pull: Pull, *, of_its_registry: bool) -> None:
        """End the youngest pull that nobody waits for yet and whose place would do."""
        if pull.displaces in self._active:
            return  # it is on its way out
        for other in reversed(self._active):
            if other.ahead and not other.leaving and (other.registry == pull.registry or not of_its_registry):
                pull.displaces = other
                other.scope.cancel()
                return
