"""What both sources share: deliveries in, never more than there are free consumers.

Taking is a script that does not block, and is the same for both. What blocks is a doorbell on a
connection of its own, which takes nothing, so nothing is lost when it is cut or cancelled: see
``dispatcher.queue.stream`` and ``dispatcher.queue.list``. The reader looks for itself whenever it
has free consumers, and now and then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from random import uniform

import anyio
import structlog

from dispatcher.errors import QueueError
from dispatcher.model import Delivery
from dispatcher.queue.connection import connect, read_after
from dispatcher.queue.store import Store
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)

#: Seconds after which the reader looks without having been called: what other instances put
#: back into `ready` rings no bell here.
POLL_SECONDS = 1.0
#: Seconds between two rings while the first has not been answered (every consumer is busy).
RING_PAUSE = 0.05
#: Seconds between tries to listen again while Redis is away: at first, and at the longest.
FIRST_PAUSE = 0.1
MAX_PAUSE = 5.0

#: Called with the operation, the task id and the asker's word of a control message.
OnControl = Callable[[str, str, str], None]


class Source(ABC):
    """Takes tasks from the queues this instance serves, and hears what it is told."""

    def __init__(
        self,
        store: Store,
        url: str,
        *,
        instance: str,
        incarnation: str,
        lease_seconds: float,
        queues: Mapping[str, int],
        daemon: str,
        on_control: OnControl,
    ) -> None:
        self._url = url
        self._keys = store.keys
        self._store = store
        self._instance = instance
        self._incarnation = incarnation
        self._lease_seconds = lease_seconds
        self._queues = queues
        self._daemon = daemon
        self._on_control = on_control
        self._bell = anyio.Event()

    async def take(self, n: int) -> list[Delivery]:
        """Up to ``n`` tasks, leased to this instance; empty if there is nothing.

        Raises QueueUnavailable.
        """
        self._bell = anyio.Event()
        return await self._take(n, self._queues)

    async def take_adoptable(self, n: int) -> list[Delivery]:
        """Up to ``n`` tasks whose containers may be on this daemon and are in nobody's hands.

        Raises QueueUnavailable.
        """
        return await self._take(n, {})

    async def _take(self, n: int, queues: Mapping[str, int]) -> list[Delivery]:
        return await self._store.take(
            n,
            instance=self._instance,
            incarnation=self._incarnation,
            lease=self._lease_seconds,
            queues=queues,
            daemon=self._daemon,
        )

    async def wait(self) -> None:
        """Return when there may be something to take; at the latest after POLL_SECONDS."""
        with anyio.move_on_after(uniform(POLL_SECONDS / 2, POLL_SECONDS)):  # noqa: S311 - jitter
            await self._bell.wait()

    async def pause(self) -> None:
        """Return after about POLL_SECONDS."""
        await anyio.sleep(uniform(POLL_SECONDS / 2, POLL_SECONDS))  # noqa: S311 - jitter

    def ring(self) -> None:
        """Make the reader look now."""
        self._bell.set()

    @abstractmethod
    async def listen(self) -> None:
        """Ring for what is new until cancelled; reconnects with backoff."""

    async def _listen_to_streams(self, *streams: str) -> None:
        """Ring for new entries of these, and hear the control stream."""
        control = self._keys.control(self._instance)
        cursors = dict.fromkeys((*streams, control), "0-0")
        pause = RetryPause(FIRST_PAUSE, MAX_PAUSE)
        redis = connect(self._url, max_connections=1)
        try:
            while True:
                try:
                    heard = await read_after(redis, 1, cursors)
                except QueueError as error:
                    log.debug("doorbell.disconnected", error=str(error))
                    await pause.wait()
                    continue
                pause.reset()
                await self._heard(heard, cursors, control)
        finally:
            with anyio.CancelScope(shield=True):
                await redis.aclose()

    async def _heard(
        self, heard: list[tuple[str, str, dict[bytes, bytes]]], cursors: dict[str, str], control: str
    ) -> None:
        rang = False
        for key, entry_id, fields in heard:
            cursors[key] = entry_id
            if key == control:
                operation, task_id, asked = (
                    fields.get(name, b"").decode("utf-8", "replace") for name in (b"op", b"id", b"asked")
                )
                self._on_control(operation, task_id, asked)
            else:
                rang = True
        if rang and self._bell.is_set():
            await anyio.sleep(RING_PAUSE)
        if rang:
            self.ring()
