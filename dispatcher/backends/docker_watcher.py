"""Tells that containers have ended: one for all that are waited for.

Two sources, since each alone fails: the engine's events, which come at once but go silent
when a stream breaks or an engine restarts; and a list of all containers of ours, taken
every ten seconds and after each reconnect, which misses nothing but is late. Neither is
taken at its word: a waiter that is woken inspects its container.
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import anyio
import structlog
from anyio import from_thread
from urllib3.exceptions import ReadTimeoutError

from dispatcher.backends.docker_client import Engine, StreamClient
from dispatcher.backends.docker_spec import NAMESPACE_LABEL, unix_time
from dispatcher.errors import BackendError

log = structlog.get_logger(__name__)

#: Seconds between two lists: how late an end is noticed whose event got lost.
RELIST_INTERVAL = 10.0
#: Seconds without an event until the stream is taken for dead and opened again. A peer that
#: vanished without a word is not noticed otherwise.
EVENTS_SILENCE = 60.0
#: Seconds until the events are asked for again, doubled from failure to failure.
_BACKOFF_INITIAL = 0.1
_BACKOFF_MAX = 5.0

#: What a wait looks up for. "die" comes after the engine has written the exit down, "oom"
#: before or after it.
_EVENTS = {"type": "container", "event": ["die", "destroy", "oom"], "label": NAMESPACE_LABEL}
_RUNNING = frozenset({"running", "paused", "restarting", "created"})


class Watcher:
    """Wakes who waits for a container when it may have ended."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: defaultdict[str, set[anyio.Event]] = defaultdict(set)
        self._relist = anyio.Event()
        #: The engine's time of the last event seen, in whole Unix seconds. Events are asked for
        #: from there on: an engine answers the request before it begins to listen for us.
        self._seen: int | None = None
        self._failures = 0

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
                    self._seen = await self._engine.call(_engine_time)
                silent = await self._engine.stream(
                    self._read_events, limiter=self._engine.watching, silence=EVENTS_SILENCE
                )
                if silent:
                    continue
            except BackendError as lost:
                error = str(lost)
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
                from_thread.run_sync(self._ended, event["id"], event["time"])
        except ReadTimeoutError:
            return True
        return False

    def _connected(self) -> None:
        self._failures = 0
        # An engine replays but its last 256 events, and none from before its own start.
        self._relist.set()

    def _ended(self, container_id: str, time: int) -> None:
        self._seen = time
        self._wake(container_id)

    def _wake(self, container_id: str) -> None:
        for woken in self._waiting.get(container_id, ()):
            woken.set()

    async def _list_again_and_again(self) -> None:
        while True:
            with anyio.move_on_after(RELIST_INTERVAL):
                await self._relist.wait()
            self._relist = anyio.Event()
            # Before the list is taken: what comes to be waited for meanwhile may not be in it.
            waited_for = set(self._waiting)
            if not waited_for:
                continue
            try:
                running = await self._engine.call(_running)
            except BackendError as error:
                log.warning("docker.relist_failed", error=str(error))
                continue
            for container_id in waited_for - running:
                self._wake(container_id)


def _engine_time(client: Any) -> int:
    return int(unix_time(client.info()["SystemTime"]) or 0)


def _running(client: Any) -> set[str]:
    """Ids of the containers of ours that have not ended, in one request."""
    found = client.containers(all=True, filters={"label": NAMESPACE_LABEL})
    return {container["Id"] for container in found if container["State"] in _RUNNING}
