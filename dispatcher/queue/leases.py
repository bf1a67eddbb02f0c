"""The leases this instance holds: renewed together, told when they are lost or unwanted."""

from __future__ import annotations

from collections.abc import Mapping
from random import uniform

import anyio
import structlog

from dispatcher.errors import LeaseLost, QueueUnavailable
from dispatcher.model import Delivery, Outcome, State
from dispatcher.queue.store import Action, Budget, Settlement, Store

log = structlog.get_logger(__name__)

#: Renewals a lease: three may fail before it lapses.
RENEWALS_PER_LEASE = 4
#: Longest pause, in seconds, between tries to record a result while Redis is away.
MAX_PAUSE = 5.0


class Lease:
    """This instance's hold on one task."""

    def __init__(self, keeper: LeaseKeeper, delivery: Delivery) -> None:
        self.task_id = delivery.task_id
        self.owner = delivery.owner
        self.state = State.QUEUED
        #: Set when somebody wants the task cancelled.
        self.cancel_requested = anyio.Event()
        #: Set when another instance owns the task; nothing may be written for it any more.
        self.lost = anyio.Event()
        self._keeper = keeper
        if delivery.cancelled:
            self.cancel_requested.set()

    async def mark(self, state: State, fields: Mapping[str, str] | None = None) -> None:
        """Renew, and record that the task is in ``state`` now.

        Raises LeaseLost, QueueUnavailable.
        """
        store = self._keeper.store
        answer = await store.renew(
            self.task_id, self.owner, self._keeper.lease_seconds, {"state": state, **(fields or {})}
        )
        self.state = state
        self.heard(answer)
        if self.lost.is_set():
            raise LeaseLost()

    async def give_up(
        self, action: Action, outcome: Outcome, *, delay: float = 0.0, budget: Budget = "none"
    ) -> None:
        """Record how this delivery ended and let go of it.

        Tries for as long as it takes Redis to come back: a result is never dropped for want of
        patience. Raises LeaseLost if the task is another's by then.
        """
        settlement = Settlement(self.task_id, self.owner, action, outcome, delay, budget)
        pause = 0.2
        while True:
            try:
                answer = await self._keeper.store.finish(settlement)
                break
            except QueueUnavailable as error:
                log.warning("task.finish_delayed", task_id=self.task_id, error=str(error))
            await anyio.sleep(uniform(pause / 2, pause))  # noqa: S311 - jitter, not a secret
            pause = min(MAX_PAUSE, pause * 2)
        self._keeper.forget(self)
        if answer == "lost":
            self.lost.set()
            raise LeaseLost()

    def heard(self, answer: str) -> None:
        """Take in what a renewal was told."""
        if answer == "lost":
            self.lost.set()
            self._keeper.forget(self)
        elif answer == "cancel":
            self.cancel_requested.set()


class LeaseKeeper:
    """Renews every lease of this instance by a quarter of its length."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self.store = store
        self.lease_seconds = lease_seconds
        self._held: dict[str, Lease] = {}

    @property
    def held(self) -> Mapping[str, Lease]:
        """The leases by task id."""
        return self._held

    def hold(self, delivery: Delivery) -> Lease:
        """Begin to renew the lease that ``take`` gave."""
        lease = Lease(self, delivery)
        self._held[lease.task_id] = lease
        return lease

    def rename(self, lease: Lease, task_id: str) -> None:
        """The task goes on under another id (see ``place``)."""
        self.forget(lease)
        lease.task_id = task_id
        self._held[task_id] = lease

    def forget(self, lease: Lease) -> None:
        """Stop renewing: it lapses, or is another's."""
        if self._held.get(lease.task_id) is lease:
            del self._held[lease.task_id]

    def request_cancel(self, task_id: str) -> None:
        """Tell whoever runs the task that it is not wanted; nothing if it is not ours."""
        if lease := self._held.get(task_id):
            lease.cancel_requested.set()

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            await anyio.sleep(self.lease_seconds / RENEWALS_PER_LEASE)
            leases = list(self._held.values())
            if not leases:
                continue
            try:
                answers = await self.store.renew_all([(h.task_id, h.owner) for h in leases], self.lease_seconds)
            except QueueUnavailable as error:
                log.warning("leases.not_renewed", held=len(leases), error=str(error))
                continue
            for lease, answer in zip(leases, answers, strict=True):
                # One that was given up meanwhile was refused rightly, and is no loss.
                if self._held.get(lease.task_id) is lease:
                    lease.heard(answer)
                    if answer == "lost":
                        log.warning("lease.lost", task_id=lease.task_id)
