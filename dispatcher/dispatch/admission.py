"""From a delivery to a task that may run: validated, placed where it belongs, allowed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dispatcher.errors import ExpiredTask, InvalidTask, LeaseLost
from dispatcher.model import Delivery
from dispatcher.policy import Grant, Policy
from dispatcher.queue.leases import Lease, LeaseKeeper
from dispatcher.queue.store import Store
from dispatcher.queue.wire import parse_delivery
from dispatcher.task import Task


@dataclass(frozen=True, slots=True)
class Admitted:
    """A task that may run now, and with what."""

    task: Task
    grant: Grant


def check_expiry(task: Task) -> None:
    """Raises ExpiredTask if ``task`` must not be started any more."""
    if task.expires_at is not None and task.expires_at.timestamp() <= time.time():
        raise ExpiredTask(f"expires_at {task.expires_at.isoformat()} has passed")


class Admission:
    """Decides what may run now."""

    def __init__(self, store: Store, keeper: LeaseKeeper, policy: Policy, *, max_bytes: int) -> None:
        self._store = store
        self._keeper = keeper
        self._policy = policy
        self._max_bytes = max_bytes

    async def admit(self, delivery: Delivery, lease: Lease) -> Admitted | None:
        """The task, or None if it is not ours to run any more: it waits in its place, or is
        one that stands already.

        Raises InvalidTask, RejectedTask, ExpiredTask, LeaseLost, QueueUnavailable.
        """
        task = parse_delivery(delivery, max_bytes=self._max_bytes)
        # What runs already was allowed when it started.
        grant = self._policy.grant(task, checked=not delivery.daemon)
        if delivery.fields is not None and not await self._place(delivery, lease, task):
            return None
        # A container that may be there already is not kept from its end by the clock.
        if not delivery.daemon:
            check_expiry(task)
        return Admitted(task, grant)

    async def _place(self, delivery: Delivery, lease: Lease, task: Task) -> bool:
        """Give a plain entry's task the identity, queue and time it asks for; whether it stays here."""
        # The stream an entry lies in is its queue, unless it names another.
        if "queue" not in task.model_fields_set and task.queue != delivery.queue:
            task = task.model_copy(update={"queue": delivery.queue})
        asks = task.id or task.idempotency_key or task.delay or task.not_before or task.expires_at
        if not asks and task.queue == delivery.queue:
            return True
        with lease.settling():
            verdict, task_id = await self._store.place(delivery, task)
        match verdict:
            case "held":
                self._keeper.rename(lease, task_id)
                return True
            case "moved" | "known":
                self._keeper.forget(lease)
                return False
            case "conflict":
                raise InvalidTask(
                    f"task {task_id} stands with other content under this id or idempotency key"
                )
            case "unknown_queue":
                raise InvalidTask(f"no instance serves {task.queue!r}", field="queue")
            case "lost":
                self._keeper.forget(lease)
                raise LeaseLost
