"""Tells that containers have ended: one for all that are waited for.

Two sources, since each alone fails: the engine's events, which come at once but go silent
when a stream breaks or an engine restarts; and a list of all containers of ours, taken
every ten seconds and after each reconnect, which misses nothing but is late. Neither is
taken at its word: a waiter that is woken inspects its container.

It also keeps in mind when the engine was away: see ``docker_absence``.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import anyio
import structlog
from anyio import from_thread
from urllib3.exceptions import ReadTimeoutError

from dispatcher.backends.docker_absence import Absence, absence_of, ended_by_signal
from dispatcher.backends.docker_client import (
    CONTROL_TIMEOUT,
    Engine,
    StreamClient,
    engine_time,
    events_between,
)
from dispatcher.backends.docker_spec import NAMESPACE_LABEL
from dispatcher.errors import BackendError
from dispatcher.model import Exit
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)

#: Seconds between two lists: how late an end is noticed whose event got lost.
RELIST_INTERVAL = 10.0
#: Seconds without an event until the stream is taken for dead and opened again. A peer that
#: vanished without a word is not noticed otherwise.
EVENTS_SILENCE = 60.0
#: Seconds until the events are asked for again, doubled from failure to failure.
_BACKOFF_INITIAL = 0.1
_BACKOFF_MAX = 5.0
#: Seconds until a list is tried again that failed, while somebody waits for it: at first, at most.
_RELIST_PAUSES = (0.25, 1.0)
#: Seconds that an end is kept back for want of the engine's events, while it answers otherwise:
#: then it counts as the program's own.
JUDGE_TIMEOUT = 30.0
#: Absences of the engine and signals it sent that are kept in mind. A wait that was told of an
#: end asks right after the engine is back; who asks later than that is never answered.
_ABSENCES = 16
_SIGNALS = 4096

#: What a wait looks up for. "die" comes after the engine has written the exit down, "oom"
#: before or after it. "kill" means that the engine sent a signal, for whomever.
_EVENTS = {"type": "container", "event": ["die", "destroy", "oom", "kill"], "label": NAMESPACE_LABEL}
_NANO = 1_000_000_000
_RUNNING = frozenset({"running", "paused", "restarting", "created"})

T = TypeVar("T")


class Watcher:
    """Wakes who waits for a container when it may have ended."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: defaultdict[str, set[anyio.Event]] = defaultdict(set)
        self._relist = anyio.Event()
        #: The engine's time of the last event seen, in whole Unix seconds. Events are asked for
        #: from there on: an engine answers the request before it begins to listen for us.
        self._seen: int | None = None
        #: How often the stream broke since it was last open: 0 while it is.
        self._failures = 0
        #: When the request for the last list was sent, on the loop's clock. Each has a connection
        #: of its own: an engine that is shutting down goes on answering on those it has.
        self._listed = time.monotonic()
        #: Set after each list or failure to get one.
        self._looked = anyio.Event()
        #: Once the stream broke, and until it is known whether the engine is still the same: when
        #: it had listed and when it had answered last before.
        self._away: tuple[float, float] | None = None
        #: The absence that is being judged.
        self._judged: tuple[float, float] | None = None
        self._absences: deque[Absence] = deque(maxlen=_ABSENCES)
        #: Containers that the engine was heard sending a signal to, and when by its clock.
        self._signals: deque[tuple[str, float]] = deque(maxlen=_SIGNALS)

    @contextlib.contextmanager
    def watching(self, container_id: str) -> Iterator[anyio.Event]:
        """An event that is set once the container may have ended, or is gone.

        Look at the container after entering: its end may have come before.
        """
        woken = anyio.Event()
        self._waiting[container_id].add(woken)
        try:
            yield woken
        finally:
            waiting = self._waiting[container_id]
            waiting.discard(woken)
            if not waiting:
                del self._waiting[container_id]

    async def ended_with_engine(self, container_id: str, ended: Exit) -> bool:
        """Whether this end is explained by an absence of the engine that we saw.

        Waits until the engine is back, if it is away or about to go.
        """
        if ended.exit_code == 0 or ended.oom:
            return False
        suspicious = ended_by_signal(ended) or any(one == container_id for one, _ in self._signals)
        asked = time.monotonic()
        patience = math.inf
        while self._away is not None or (suspicious and self._listed < asked):
            if self._listed >= asked:
                # It is there, and only its events can't be had. An end is not kept back for ever.
                patience = min(patience, time.monotonic() + JUDGE_TIMEOUT)
            if time.monotonic() > patience:
                log.warning("docker.end_not_judged", container_id=container_id)
                break
            self._relist.set()
            await self._looked.wait()
        return any(absence.explains(container_id, ended) for absence in self._absences)

    async def run(self) -> None:
        """Watch until cancelled, whatever the engine does meanwhile."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_events, name="docker events")
            tasks.start_soon(self._list_again_and_again, name="docker relist")

    async def _follow_events(self) -> None:
        while True:
            error = ""
            try:
                if self._seen is None:
                    self._seen = int(await self._engine.call(engine_time))
                silent = await self._engine.stream(
                    self._read_events, limiter=self._engine.watching, silence=EVENTS_SILENCE
                )
                if silent:
                    continue
            except BackendError as lost:
                error = str(lost)
            if not self._failures:
                # One that is being judged now is another.
                away = self._away
                since = self._listed if away is None or away is self._judged else away[0]
                self._away = since, self._engine.answered
            self._failures += 1
            log.warning("docker.events_lost", failures=self._failures, error=error)
            self._engine.forget_version()
            backoff = min(_BACKOFF_MAX, _BACKOFF_INITIAL * 2 ** min(self._failures, 10))
            # Every instance of an engine loses it in the same moment: come back apart.
            await anyio.sleep(random.uniform(backoff / 2, backoff))  # noqa: S311

    def _read_events(self, client: StreamClient) -> bool:
        """In a thread: pass the events on until the stream ends. Whether it was only silent."""
        events: Any = client.events(since=self._seen, filters=_EVENTS, decode=True)
        from_thread.run_sync(self._connected)
        try:
            for event in events:
                from_thread.run_sync(self._heard, event)
        except ReadTimeoutError:
            return True
        return False

    def _connected(self) -> None:
        self._failures = 0
        # An engine replays but its last 256 events, and none from before its own start.
        self._relist.set()

    def _heard(self, event: dict[str, Any]) -> None:
        self._seen = event["time"]
        if event["Action"] == "kill":
            self._signals.append((event["id"], event["timeNano"] / _NANO))
        else:
            self._wake(event["id"])

    def _wake(self, container_id: str) -> None:
        for woken in self._waiting.get(container_id, ()):
            woken.set()

    async def _list_again_and_again(self) -> None:
        pause = RetryPause(*_RELIST_PAUSES)
        failing = False
        while True:
            with anyio.move_on_after(RELIST_INTERVAL):
                await self._relist.wait()
            self._relist = anyio.Event()
            failed = None
            # First: who is woken by the list wants to know. The one goes on without the other.
            for look in (self._judge_absence, self._list):
                try:
                    await look()
                except BackendError as error:
                    failed = error
            if failed is not None and not failing:
                log.warning("docker.relist_failed", error=str(failed))
            failing = failed is not None
            looked, self._looked = self._looked, anyio.Event()
            looked.set()
            if failing or self._away is not None:
                await pause.wait()
            else:
                pause.reset()

    async def _list(self) -> None:
        # Before the list is taken: what comes to be waited for meanwhile may not be in it.
        waited_for = set(self._waiting)
        asked = time.monotonic()
        running = await self._ask(_running)
        self._listed = asked
        for container_id in waited_for - running:
            self._wake(container_id)

    async def _ask(self, work: Callable[[StreamClient], T]) -> T:
        """Ask by a new connection."""
        return await self._engine.stream(work, limiter=self._engine.watching, silence=CONTROL_TIMEOUT)

    async def _judge_absence(self) -> None:
        """Find out whether an engine that is back is the one that was there before."""
        if self._away is None or self._failures:
            return
        self._judged = listed, answered = self._away
        now = await self._engine.call(engine_time)
        # To its clock; rather too early, by the time its answer took, than too late.
        ahead = now - time.monotonic()
        remembered = await self._ask(partial(events_between, since=0.0, until=now))
        absence = absence_of(
            remembered, since=listed + ahead, answered=answered + ahead, until=now, heard=self._signals
        )
        if absence is not None:
            log.warning("docker.engine_restarted", away_seconds=round(absence.until - absence.since, 3))
            self._absences.append(absence)
        if self._away is self._judged:
            self._away = None


def _running(client: Any) -> set[str]:
    """Ids of the containers of ours that have not ended, in one request."""
    found = client.containers(all=True, filters={"label": NAMESPACE_LABEL})
    return {container["Id"] for container in found if container["State"] in _RUNNING}
