"""An engine whose starts share its processors, and who asks it for them; in virtual time."""

from __future__ import annotations

import asyncio
import math
import random
from heapq import heapify, heappop, heappush
from itertools import count
from statistics import median

import anyio

from dispatcher.dispatch.start_gate import MOST, Launch, StartGate

#: Seconds that a launch takes alone on the simulated engine: what was measured on a real one. It
#: varies by this much, as a logarithm's standard deviation.
ALONE = 0.165
NOISE = 0.1


class Engine:
    """Works on so many launches at once; more share it evenly."""

    def __init__(self, cores: int, *, seed: int = 1) -> None:
        self._cores = cores
        self._random = random.Random(seed)
        #: Seconds of work of a launch.
        self.alone = ALONE
        #: Seconds of work done so far on each launch that was there all the time, as of ``_seen``.
        self._worked = 0.0
        self._seen = 0.0
        #: The launches under way, by how much must have been worked when they are done.
        self._ends: list[tuple[float, int, asyncio.Event]] = []
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None

    async def launch(self) -> None:
        """Take the time of one launch, which varies."""
        self._work()
        done = asyncio.Event()
        job = (self._worked + self.alone * self._random.lognormvariate(0, NOISE), next(self._numbers), done)
        heappush(self._ends, job)
        self._wait_for_next()
        try:
            await done.wait()
        except asyncio.CancelledError:
            if job in self._ends:
                self._work()
                self._ends.remove(job)
                heapify(self._ends)
                self._wait_for_next()
            raise

    @property
    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._ends))

    def _work(self) -> None:
        now = anyio.current_time()
        if self._ends:
            self._worked += (now - self._seen) * self._speed
        self._seen = now

    def _wait_for_next(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ends:
            left = max(0.0, self._ends[0][0] - self._worked) / self._speed
            self._timer = asyncio.get_running_loop().call_later(left, self._one_is_done)

    def _one_is_done(self) -> None:
        self._work()
        heappop(self._ends)[2].set()
        self._wait_for_next()

    def rate(self) -> float:
        """The most launches a second that up to MOST at once can have, in the mean."""
        return min(MOST, self._cores) / (self.alone * math.exp(NOISE**2 / 2))


class Load:
    """Launches through a gate, one after another comes free or as they are told to."""

    def __init__(self, engine: Engine, gate: StartGate) -> None:
        self.engine = engine
        self.gate = gate
        #: (when, seconds) of each launch that succeeded.
        self.launched: list[tuple[float, float]] = []
        self.inside: set[Launch] = set()

    async def one(self) -> None:
        """One launch."""
        async with self.gate.launching() as launch:
            entered = anyio.current_time()
            self.inside.add(launch)
            try:
                await self.engine.launch()
                launch.started()
                self.launched.append((anyio.current_time(), anyio.current_time() - entered))
            finally:
                self.inside.discard(launch)

    async def for_seconds(self, seconds: float) -> None:
        """As many waiting as a busy instance has, for so long; then those that are left."""
        until = anyio.current_time() + seconds

        async def consumer() -> None:
            while anyio.current_time() < until:
                await self.one()

        async with anyio.create_task_group() as group:
            for _ in range(2 * MOST):
                group.start_soon(consumer)

    def seen(self, begin: float, end: float) -> tuple[float, float]:
        """The median of what launches took then, as a multiple of one alone, and the part of the
        possible rate that they had."""
        took = [seconds for when, seconds in self.launched if begin <= when < end]
        return median(took) / self.engine.alone, len(took) / (end - begin) / self.engine.rate()
