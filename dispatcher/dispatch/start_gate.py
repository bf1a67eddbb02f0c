"""How many containers are started at the same time: a limit that finds itself.

An engine that is given more starts than it can work on finishes none of them sooner, and each of
them later: on two cores a launch took 165 ms alone, 334 ms beside three others and 2,667 ms beside
thirty-one, at the same rate from four on. How many a host works on at once is not known
beforehand, and changes with what else runs there.

The limit follows the latency, as TCP Vegas does for a network and Netflix' concurrency-limits for a
service (https://github.com/Netflix/concurrency-limits, "Gradient"): what a launch takes in a full
gate is compared with what one takes alone. Both of them rather guess the second from the fastest
seen, which a busy system never shows; here it is measured. A launch that happened to be alone in
the gate tells it for nothing. When the gate is busy and no such launch was seen for long, or what
is known makes no sense any more, one is let through alone: a probe. It holds the others back for a
moment, never longer than ``_patience`` for the gate to empty, and as long again for its own launch.

An engine shares itself among the launches, so ``n`` times as many take at most ``n`` times as long.
From this follow the step, which goes to the target and not past it, and the least limit: two at
once can't take more than twice as long each. Two also leave a place beside a launch that hangs.
One that hangs for ``HANGS_AFTER`` keeps no place at all.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median, median_low

import anyio
import structlog

log = structlog.get_logger(__name__)

#: Bounds of the limit. More than the most only queue up for the backend's control threads.
LEAST = 2
MOST = 16
#: A launch in a full gate is meant to take so many times one alone, and may take so many. On two
#: cores throughput is whole at four at once, where it is 2.0, and a tenth less at three.
TARGET = 2.1
ALLOWED = 2.2
#: Outside of these ratios the launch alone has changed since it was measured, or was a chance one.
DOUBTFUL = (0.8, 3.0)
#: Launches that a median is taken of, at least. Two medians in a row must agree on a step: one alone
#: may be a moment in which something else kept the host busy.
WINDOW = 8
#: So many launches alone are remembered, for so many seconds; their median counts.
SOLOS = 5
SOLO_MEMORY = 300.0
#: Seconds that so many are trusted in a busy gate; fewer are for a shorter time.
BASE_AGE = 60.0
#: Seconds after a launch alone in which a doubt asks for no other, and that a gate must have been
#: busy for before it is worth a probe: a short burst goes through with what is known.
SETTLED_AFTER = 5.0
#: Seconds from a probe that came to nothing to the next.
PROBE_PAUSE = 30.0
#: Bounds, in seconds, of how long a probe holds others back while the gate empties, and again
#: while it launches: twice a usual launch.
PATIENCE = (1.0, 5.0)
#: Seconds in the gate from which on a launch counts as hanging. In a burst of 32 they took 3.
HANGS_AFTER = 30.0


class Launch:
    """One passage through the gate."""

    def __init__(self, gate: StartGate) -> None:
        self._gate = gate
        self.called = anyio.Event()
        #: When it will look after the gate's deadlines by itself; only the first who waits does.
        self.wakes_at = math.inf
        #: When it was let in; None before that.
        self.entered: float | None = None
        #: Nobody else was inside so far.
        self.alone = False
        #: The stretch of time with a full gate that it was let in during.
        self.stretch: int | None = None
        self.succeeded = False

    def started(self) -> None:
        """The container was created and started by this launch, just now.

        Launches that fail or adopt say nothing: how long they take tells nothing about a start.
        """
        if not self.succeeded:
            self.succeeded = True
            self._gate._learn(self)


class _Probe:
    """A launch alone is being sought: first the gate empties, then one is let in."""

    def __init__(self, until: float) -> None:
        #: When others are let in again, whatever has come of it.
        self.until = until
        self.launch: Launch | None = None


class StartGate:
    """Lets launches in, first come, first served, and learns from them how many at once."""

    def __init__(self, *, limit: int | None = None) -> None:
        """``limit``: how many at the same time as long as nothing is known; twice this host's
        processors by default."""
        self._limit = _within_bounds(2 * (os.cpu_count() or 1) if limit is None else limit)
        self._waiting: OrderedDict[Launch, None] = OrderedDict()
        self._inside: OrderedDict[Launch, None] = OrderedDict()
        self._hanging: set[Launch] = set()
        self._busy_since: float | None = None
        #: Goes up whenever the gate is not full, or has another limit.
        self._stretch = 0
        #: Seconds of launches in a full gate, since it was last judged by them.
        self._window: list[float] = []
        #: What that would have made of the limit, had it counted by itself.
        self._proposed: int | None = None
        #: When launches alone ended, and what they took.
        self._solos: deque[tuple[float, float]] = deque(maxlen=SOLOS)
        self._usual = 0.0
        self._in_doubt = False
        self._probe: _Probe | None = None
        self._next_probe = -math.inf

    @property
    def limit(self) -> int:
        """How many launches are let in at the same time, those that hang not counted."""
        return self._limit

    @asynccontextmanager
    async def launching(self) -> AsyncIterator[Launch]:
        """Wait for a place among those who launch, and hold it while the context lasts."""
        launch = Launch(self)
        await self._enter(launch)
        try:
            yield launch
        finally:
            self._leave(launch)

    # --- in and out ---------------------------------------------------------------------

    async def _enter(self, launch: Launch) -> None:
        self._waiting[launch] = None
        self._admit()
        try:
            while launch.entered is None:
                launch.called = anyio.Event()
                launch.wakes_at = self._deadline() if self._is_first(launch) else math.inf
                with anyio.move_on_after(launch.wakes_at - anyio.current_time()):
                    await launch.called.wait()
                self._admit()
        except BaseException:
            self._leave(launch)
            raise

    def _leave(self, launch: Launch) -> None:
        for place in (self._waiting, self._inside):
            place.pop(launch, None)
        self._hanging.discard(launch)
        if self._probe is not None and self._probe.launch is launch:
            self._end_probe(succeeded=launch.succeeded)
        self._admit()

    def _admit(self) -> None:
        """Let in who may enter now. Must follow everything that changes who may."""
        now = anyio.current_time()
        while self._inside and now >= self._hangs_at():
            self._hanging.add(self._inside.popitem(last=False)[0])
        while self._waiting and self._may_enter(now):
            self._let_in(now)
        if len(self._inside) < self._limit:
            self._stretch += 1
        if not self._waiting:
            self._busy_since = None
            return
        if self._busy_since is None:
            self._busy_since = now
        first = next(iter(self._waiting))
        if self._deadline() < first.wakes_at:
            first.called.set()

    def _may_enter(self, now: float) -> bool:
        if self._probe is not None:
            if now < self._probe.until:
                return self._probe.launch is None and not self._inside
            self._end_probe(succeeded=False)
        if len(self._inside) >= self._limit or len(self._inside) + len(self._hanging) >= MOST:
            return False
        if self._wants_probe(now):
            self._probe = _Probe(now + self._patience)
            return not self._inside
        return True

    def _let_in(self, now: float) -> None:
        launch, _ = self._waiting.popitem(last=False)
        launch.entered, launch.alone = now, not self._inside
        if len(self._inside) == 1:
            next(iter(self._inside)).alone = False
        self._inside[launch] = None
        if len(self._inside) == self._limit:
            launch.stretch = self._stretch
        if self._probe is not None:
            self._probe.launch, self._probe.until = launch, now + self._patience
        launch.called.set()

    # --- time ---------------------------------------------------------------------------

    def _is_first(self, launch: Launch) -> bool:
        return next(iter(self._waiting)) is launch

    def _hangs_at(self) -> float:
        """When the one that is inside for longest will count as hanging."""
        entered = next(iter(self._inside)).entered
        return math.inf if entered is None else entered + HANGS_AFTER

    def _deadline(self) -> float:
        """When time alone will let somebody in."""
        hangs_at = self._hangs_at() if self._inside else math.inf
        return hangs_at if self._probe is None else min(self._probe.until, hangs_at)

    @property
    def _patience(self) -> float:
        least, most = PATIENCE
        return min(most, max(least, 2 * self._usual))

    # --- what a launch alone takes ------------------------------------------------------

    def _wants_probe(self, now: float) -> bool:
        if now < self._next_probe:
            return False
        if not self._solos:
            return True
        age = now - self._solos[-1][0]
        if self._in_doubt:
            return age >= SETTLED_AFTER
        busy = self._busy_since is not None and now - self._busy_since >= SETTLED_AFTER
        return busy and age >= BASE_AGE * len(self._solos) / SOLOS

    def _end_probe(self, *, succeeded: bool) -> None:
        self._probe = None
        if not succeeded:
            self._next_probe = anyio.current_time() + PROBE_PAUSE

    def _learn(self, launch: Launch) -> None:
        """Take account of a container that was started just now."""
        if launch.entered is None or launch in self._hanging:
            return
        now = anyio.current_time()
        seconds = now - launch.entered
        if launch.alone:
            if self._in_doubt:
                self._solos.clear()
                self._in_doubt = False
            while self._solos and now - self._solos[0][0] >= SOLO_MEMORY:
                self._solos.popleft()
            self._solos.append((now, seconds))
            self._usual = seconds
            if not self._waiting:
                # Not a probe: the gate has not been busy, and what it saw when it was is of then.
                self._window.clear()
                self._proposed = None
        elif launch.stretch == self._stretch:
            self._window.append(seconds)
            if len(self._window) >= max(WINDOW, self._limit):
                self._usual = median(self._window)
                self._window.clear()
                if self._solos:
                    self._judge(self._usual / median_low(seconds for _, seconds in self._solos))

    def _judge(self, ratio: float) -> None:
        """Choose the limit by what a launch took in a full gate, as a multiple of one alone."""
        low, high = DOUBTFUL
        self._in_doubt = not low <= ratio <= high
        if ratio < low:
            return  # faster than alone: there is nothing to compare with until another probe
        seen, self._proposed = self._proposed, self._step(ratio)
        steps = sorted((self._limit, self._proposed, self._limit if seen is None else seen))
        # The middle one: the smaller of two steps in one direction, none if they disagree.
        limit = steps[1]
        if limit != self._limit:
            log.debug("start_gate.limit_changed", limit=limit, was=self._limit, ratio=round(ratio, 2))
            self._limit, self._proposed = limit, None
            self._stretch += 1
            self._admit()

    def _step(self, ratio: float) -> int:
        limit = _within_bounds(min(2 * self._limit, int(self._limit * TARGET / ratio)))
        return max(limit, self._limit) if ratio <= ALLOWED else limit


def _within_bounds(limit: int) -> int:
    return max(LEAST, min(MOST, limit))
