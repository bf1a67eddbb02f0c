"""From the queue into consumers' hands, for as long as this instance takes tasks; then the drain.

Two loops take. The reader takes as many tasks as there are free consumers. While all are busy,
the adopter takes only what has a container on this daemon: that runs already, whoever looks after
it, and must have somebody who heeds its timeout and its cancellation. It then holds more tasks
than it has consumers, and takes nothing new until there is room.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Literal

import anyio
import structlog
from anyio.abc import TaskGroup

from dispatcher import failpoints
from dispatcher.dispatch.slots import Slots
from dispatcher.errors import QueueError
from dispatcher.model import Delivery, State
from dispatcher.queue.leases import Lease, LeaseKeeper, Wish
from dispatcher.queue.source import Source

log = structlog.get_logger(__name__)

#: Seconds before Redis is asked again for tasks after it could not be reached.
TAKE_PAUSE = 1.0
#: Containers adopted at once beyond the free consumers; the next look goes on with the rest.
ADOPT_AT_ONCE = 100
#: Seconds that deliveries have to let go once they were told to.
DETACH_TIMEOUT = 15.0
#: Seconds that containers have to end, grace periods included, when a drain stops them.
STOP_TIMEOUT = 120.0

DrainMode = Literal["wait", "detach", "stop"]


class Intake:
    """Takes tasks and hands each to ``run``, until it is drained."""

    def __init__(
        self,
        source: Source,
        slots: Slots,
        keeper: LeaseKeeper,
        *,
        run: Callable[[Delivery, Lease], Coroutine[None, None, None]],
        may_take: Callable[[], Awaitable[None]],
        can_take: Callable[[], bool],
        drain_mode: DrainMode,
        drain_timeout: float,
    ) -> None:
        """``may_take`` returns as soon as what is taken can also be run, and ``can_take`` tells
        whether it can now; ``drain_timeout`` in seconds."""
        self._source = source
        self._slots = slots
        self._keeper = keeper
        self._run = run
        self._may_take = may_take
        self._can_take = can_take
        self._drain_mode = drain_mode
        self._drain_timeout = drain_timeout
        self._draining = anyio.Event()
        self._forced = anyio.Event()

    def drain(self) -> None:
        """Take nothing new and see off what is held; a second call leaves it at once."""
        if self._draining.is_set():
            self._forced.set()
        self._draining.set()

    async def run(self) -> None:
        """Take tasks until draining; return when none is held any more."""
        async with anyio.create_task_group() as deliveries:
            async with anyio.create_task_group() as readers:
                readers.start_soon(self._read, deliveries, name="reader")
                readers.start_soon(self._adopt, deliveries, name="adopter")
                await self._draining.wait()
                readers.cancel_scope.cancel()
            await self._see_off(deliveries)

    # --- taking -------------------------------------------------------------------------

    async def _read(self, deliveries: TaskGroup) -> None:
        while True:
            # What can't be run here is left to others.
            await self._may_take()
            reserved = await self._slots.reserve()
            if not self._can_take():  # it went away while all consumers were busy
                self._slots.settle(0)
                continue
            taken = 0
            failed = False
            try:
                taken = await self._take(deliveries, self._source.take, reserved)
            except QueueError as error:
                log.debug("tasks.not_taken", error=str(error))
                failed = True
            finally:
                self._slots.settle(taken)
            if failed:
                await anyio.sleep(TAKE_PAUSE)
            if not taken:
                await self._source.wait()

    async def _adopt(self, deliveries: TaskGroup) -> None:
        while True:
            await self._source.pause()
            await self._may_take()
            if self._slots.free > 0:
                continue  # the reader adopts what there is
            try:
                taken = await self._take(deliveries, self._source.take_adoptable, ADOPT_AT_ONCE)
            except QueueError as error:
                log.debug("containers.not_adopted", error=str(error))
            else:
                self._slots.overdraw(taken)

    async def _take(
        self, deliveries: TaskGroup, take: Callable[[int], Awaitable[list[Delivery]]], n: int
    ) -> int:
        # Between the taking and the running of a task nothing may come.
        with anyio.CancelScope(shield=True):
            failpoints.reach("before_take")
            taken = await take(n)
            for delivery in taken:
                failpoints.reach("after_take", delivery.task_id)
                # Held from here on: a drain that begins now must see it.
                lease = self._keeper.hold(delivery)
                deliveries.start_soon(self._run, delivery, lease, name=f"task {delivery.task_id}")
        return len(taken)

    # --- the drain ----------------------------------------------------------------------

    async def _see_off(self, deliveries: TaskGroup) -> None:
        """Give back what has not begun; wait for, stop or leave what runs, as DRAIN_MODE says."""
        held = self._keeper.held
        log.info("instance.draining", held=len(held), mode=self._drain_mode, timeout=self._drain_timeout)
        for lease in list(held.values()):
            if lease.state in {State.QUEUED, State.PULLING}:
                lease.request(Wish.DETACH)
        if self._drain_mode != "detach":
            await self._emptied_within(self._drain_timeout)
        if self._drain_mode == "stop" and not self._forced.is_set():
            for lease in list(held.values()):
                lease.request(Wish.STOP)
            await self._emptied_within(STOP_TIMEOUT)
        for lease in list(held.values()):
            lease.request(Wish.DETACH)
        with anyio.move_on_after(DETACH_TIMEOUT) as patience:
            await self._keeper.until_empty()
        # Otherwise what is left to do, such as removing a container that has ended, is done.
        if patience.cancelled_caught:
            deliveries.cancel_scope.cancel()

    async def _emptied_within(self, seconds: float) -> None:
        """Wait until nothing is held, for ``seconds`` or until that is cut short."""

        async def force() -> None:
            await self._forced.wait()
            group.cancel_scope.cancel()

        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as group:
                group.start_soon(force, name="force")
                await self._keeper.until_empty()
                group.cancel_scope.cancel()
