"""The tick and the audit: what is due, what lapsed, what is nowhere. Any instance does it for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import uniform

import anyio
import structlog

from dispatcher.errors import ConfigurationError, Evicted, QueueError
from dispatcher.queue.exchange import AuditPace, Limits, SourceKind, Tick, new_task_id
from dispatcher.queue.store import Store

log = structlog.get_logger(__name__)

#: Seconds between ticks; each instance draws its own moment, so that a few share the work.
TICK_SECONDS = 1.0
#: A gap of half a lease between ticks counts as a standstill; so there are at least four a lease.
TICKS_PER_LEASE = 4
#: A tick never comes sooner than this after the last, however near the next due task is.
MIN_TICK_SECONDS = 0.01
#: Parts of a full audit between two ticks.
MAX_AUDIT_PARTS = 50

_OTHER_SOURCE = "the queues hold tasks as another kind of source, or other instances use them so"


class Recovery:
    """This instance's presence, and its share of the common housekeeping."""

    def __init__(
        self,
        store: Store,
        *,
        instance: str,
        incarnation: str,
        lease_seconds: float,
        limits: Limits,
        source: SourceKind,
        queues: Iterable[str],
        daemon: Callable[[], str],
        info: Callable[[], str],
        on_promoted: Callable[[], None],
        on_evicted: Callable[[Evicted], None],
    ) -> None:
        """``daemon`` tells where this instance's containers run, '' while that does not answer;
        ``info`` what others may know of this instance, as JSON. ``on_evicted`` is told when this
        instance must not go on."""
        self._store = store
        self._instance = instance
        self._incarnation = incarnation
        self._lease_seconds = lease_seconds
        self._limits = limits
        self._source = source
        self._queues = tuple(queues)
        self._daemon = daemon
        self._info = info
        self._on_promoted = on_promoted
        self._on_evicted = on_evicted
        self._namespace = ""
        #: How the next part of the audit is asked for: in a full round without a pause.
        self._audits: AuditPace = "pace"
        #: Queues whose keys held something else at the last tick.
        self._unusable: tuple[str, ...] = ()
        #: Whether the last tick went through.
        self.healthy = False

    async def join(self) -> Tick:
        """The first tick: makes groups and namespace if there are none.

        An instance that had this name and was killed is waited for until its lease is over.
        Raises ConfigurationError if it goes on living, or if the queues are of the other kind
        of source; QueueError.
        """
        tick = await self._tick(self._info())
        wait = self._lease_seconds + TICK_SECONDS
        if tick.rival:
            log.info("instance.name_in_use", instance=self._instance, waits_seconds=wait)
        with anyio.move_on_after(wait):
            while tick.rival:
                await anyio.sleep(min(TICK_SECONDS, self._lease_seconds / TICKS_PER_LEASE))
                tick = await self._tick(self._info())
        if tick.rival:
            raise ConfigurationError([f"INSTANCE_ID: another living instance is called {self._instance!r}"])
        if tick.verdict == "source":
            raise ConfigurationError([f"QUEUE_SOURCE: {self._source} is not allowed: {_OTHER_SOURCE}"])
        self._namespace = tick.namespace
        self.healthy = True
        return tick

    async def leave(self) -> None:
        """Take this instance off the list. Raises QueueUnavailable."""
        await self._tick("")

    async def run(self) -> None:
        """Tick and audit until cancelled."""
        longest = min(TICK_SECONDS, self._lease_seconds / TICKS_PER_LEASE)
        pause = longest
        while True:
            await anyio.sleep(pause)
            pause = uniform(longest / 2, longest)  # noqa: S311 - jitter, not a secret
            try:
                tick = await self._tick(self._info())
                put_back = await self._audit()
            except QueueError as error:
                if self.healthy:
                    log.warning("redis.away", error=str(error))
                self.healthy = False
                # It may come back without its last writes.
                self._audits = "begin"
                continue
            if not self.healthy:
                log.info("redis.back")
            self.healthy = True
            self._tell(tick)
            if tick.promoted or tick.taken_over or tick.lost or put_back:
                self._on_promoted()
            if tick.next_due_ms is not None:
                pause = min(pause, max(MIN_TICK_SECONDS, (tick.next_due_ms - tick.now_ms) / 1000))

    def _tell(self, tick: Tick) -> None:
        if tick.rival:
            self._on_evicted(Evicted(f"another instance took the name {self._instance!r}"))
        elif tick.verdict == "source":
            self._on_evicted(Evicted(_OTHER_SOURCE))
        elif tick.namespace != self._namespace:
            self._on_evicted(Evicted("the queue was emptied and begun anew by others"))
        if tick.taken_over:
            log.warning("tasks.taken_over", count=tick.taken_over)
        if tick.lost:
            log.warning("tasks.lost_with_their_daemon", count=tick.lost)
        if tick.poisoned:
            log.error("tasks.poisoned", count=tick.poisoned)
        if tick.unusable != self._unusable:
            self._unusable = tick.unusable
            if tick.unusable:
                log.error("queues.unusable", queues=tick.unusable, why="their keys hold something else")
        if tick.expired:
            log.info("tasks.expired", count=tick.expired)

    async def _audit(self) -> int:
        """Look through some of the open tasks, or more of them in a full round; how many were put back.

        Bounded, so that the next tick comes in time.
        """
        put_back, vanished = 0, list[str]()
        for _ in range(1 if self._audits == "pace" else MAX_AUDIT_PARTS):
            part = await self._store.audit(self._lease_seconds, self._audits)
            put_back += part.put_back
            vanished += part.vanished
            if part.done:
                self._audits = "pace"
                break
            if self._audits == "begin":
                self._audits = "go on"
        if put_back:
            log.error("tasks.were_nowhere", put_back=put_back)
        for task_id in vanished:
            log.error("task.record_gone", task_id=task_id)
        return put_back

    async def _tick(self, info: str) -> Tick:
        return await self._store.tick(
            instance=self._instance,
            incarnation=self._incarnation,
            info=info,
            lease=self._lease_seconds,
            # Ours, once there is one: a queue that was emptied under us goes on with the names
            # our containers bear, or an attempt could be started again under another.
            namespace=self._namespace or new_task_id(),
            source=self._source,
            daemon=self._daemon(),
            limits=self._limits,
            queues=self._queues,
        )
