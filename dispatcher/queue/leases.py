"""The leases this instance holds: renewed together, told when they are lost or unwanted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from random import uniform
from typing import Literal

import anyio
import structlog

from dispatcher.errors import LeaseLost, QueueError, QueueUnavailable
from dispatcher.model import Delivery, Outcome, State
from dispatcher.queue.exchange import Action, Budget, Settlement
from dispatcher.queue.store import Store
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)

#: Renewals a lease; one that fails is repeated after RETRY_PAUSE seconds.
RENEWALS_PER_LEASE = 4
RETRY_PAUSE = 1.0
#: Seconds between tries to record a result while Redis is away: at first, and at the longest.
FIRST_PAUSE = 0.2
MAX_PAUSE = 5.0


class Wish(StrEnum):
    """What is wanted of whoever runs a task, beside running it."""

    #: End it: its owner or an operator does not want it any more.
    CANCEL = "cancel"
    #: Stop it, to begin anew elsewhere: this instance is leaving, and is not to leave it running.
    STOP = "stop"
    #: Let go of it: this instance is leaving.
    DETACH = "detach"


class Lease:
    """This instance's hold on one task.

    ``scope`` covers all that is done for the task and is cancelled when the lease is lost.
    Waiting that a wish may cut short stands under ``interruptible()``.
    """

    def __init__(self, keeper: LeaseKeeper, delivery: Delivery) -> None:
        self.task_id = delivery.task_id
        self.owner = delivery.owner
        self.state = State.QUEUED
        self.scope = anyio.CancelScope()
        self.lost = False
        self._wishes = {Wish.CANCEL} if delivery.cancelled else set()
        self._interruptible: tuple[anyio.CancelScope, tuple[Wish, ...]] | None = None
        self._settling = False
        self._keeper = keeper

    @property
    def wish(self) -> Wish | None:
        """What is wanted most: an end is not taken back by a later wish to let go."""
        return next((wish for wish in Wish if wish in self._wishes), None)

    @contextmanager
    def interruptible(self, *by: Wish) -> Iterator[None]:
        """Cut what is inside short as soon as there is one of these wishes, or any if none is
        named; the caller looks at ``wish``."""
        with anyio.CancelScope() as scope:
            self._interruptible = (scope, by or tuple(Wish))
            if self._wishes.intersection(by or Wish):
                scope.cancel()
            try:
                yield
            finally:
                self._interruptible = None

    def request(self, wish: Wish) -> None:
        """Express a wish."""
        self._wishes.add(wish)
        if self._interruptible and wish in self._interruptible[1]:
            self._interruptible[0].cancel()

    @contextmanager
    def settling(self) -> Iterator[None]:
        """While a write of ours is under way that ends or renames the lease. A renewal that is
        refused meanwhile may have come after it, so only the write's own answer counts."""
        self._settling = True
        try:
            yield
        finally:
            self._settling = False

    async def mark(self, state: State, fields: Mapping[str, str] | None = None) -> None:
        """Renew, and record that the task is in ``state`` now.

        Raises LeaseLost, QueueUnavailable.
        """
        keeper = self._keeper
        answer = await keeper.store.renew(
            self.task_id, self.owner, keeper.lease_seconds, {"state": state, **(fields or {})}
        )
        self.state = state
        self.heard(answer)
        if self.lost:
            raise LeaseLost

    async def give_up(
        self,
        action: Action,
        outcome: Outcome,
        *,
        delay: float = 0.0,
        budget: Budget = "none",
        prefer: str = "",
    ) -> None:
        """Record how this delivery ended and let go of it. ``delay`` in seconds; ``prefer`` is the
        daemon that a release is left to for a moment.

        Tries for as long as it takes Redis to come back: a result is never dropped for want of
        patience. Raises LeaseLost if the task is another's by then.
        """
        settlement = Settlement(self.task_id, self.owner, action, outcome, delay, budget, prefer)
        with self.settling():
            answer = await self._settle(settlement)
        self._keeper.forget(self)
        if answer == "lost":
            self.lost = True
            raise LeaseLost

    async def _settle(self, settlement: Settlement) -> Literal["ok", "lost"]:
        pause = RetryPause(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                return await self._keeper.store.finish(settlement)
            except QueueUnavailable as error:
                log.warning("task.finish_delayed", task_id=self.task_id, error=str(error))
            await pause.wait()

    def heard(self, answer: str) -> None:
        """Take in what a renewal was told."""
        if answer == "lost" and not self._settling:
            log.warning("lease.lost", task_id=self.task_id)
            self.lost = True
            self._keeper.forget(self)
            self.scope.cancel()
        elif answer == "cancel":
            self.request(Wish.CANCEL)


class LeaseKeeper:
    """Renews every lease of this instance by a quarter of its length."""

    def __init__(self, store: Store, lease_seconds: float) -> None:
        self.store = store
        self.lease_seconds = lease_seconds
        self._held: dict[str, Lease] = {}
        self._emptied = anyio.Event()

    @property
    def held(self) -> Mapping[str, Lease]:
        """The leases by task id."""
        return self._held

    def hold(self, delivery: Delivery) -> Lease:
        """Begin to renew the lease that ``take`` gave."""
        lease = Lease(self, delivery)
        # It may have lapsed and come back to us: what we still do under the old lease is over.
        if former := self._held.get(lease.task_id):
            former.heard("lost")
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
        if not self._held:
            self._emptied.set()

    async def until_empty(self) -> None:
        """Return as soon as no lease is held."""
        while self._held:
            self._emptied = anyio.Event()
            await self._emptied.wait()

    async def run(self) -> None:
        """Renew until cancelled."""
        interval = self.lease_seconds / RENEWALS_PER_LEASE
        due = time.monotonic() + interval
        while True:
            # What a renewal took is part of the interval, or a slow Redis would cost the lease.
            await anyio.sleep(max(0.0, due - time.monotonic()))
            due = time.monotonic() + interval
            try:
                await self._renew(dict(self._held))
            except QueueError as error:
                log.warning("leases.not_renewed", held=len(self._held), error=str(error))
                due = time.monotonic() + uniform(0.5, 1.0) * min(RETRY_PAUSE, interval)  # noqa: S311 - jitter

    async def _renew(self, leases: Mapping[str, Lease]) -> None:
        answers = await self.store.renew_all(
            [(task_id, lease.owner) for task_id, lease in leases.items()], self.lease_seconds
        )
        for (task_id, lease), answer in zip(leases.items(), answers, strict=True):
            # One that was given up or renamed meanwhile was refused rightly, and is no loss.
            if self._held.get(task_id) is lease:
                lease.heard(answer)
