"""Keys and scripts: each script is called like a typed function.

The stream carries; the truth is one hash a task, a lease index and a fence counter, all of
one hash slot, changed only by the scripts in ``lua/``. Every write for a held task shows its
whole owner token, so an instance that was overtaken can write nothing. Every script that is
repeated after a lost reply recognises the repetition, ``take`` apart: what its lost reply
gave out comes back when the lease lapses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from dispatcher.errors import (
    DispatcherError,
    InvalidTask,
    QueueFull,
    QueueRefused,
    TaskConflict,
    TaskNotFound,
    UnknownQueue,
)
from dispatcher.model import Delivery
from dispatcher.queue.batch import Batch
from dispatcher.queue.connection import command, connect, sorted_errors
from dispatcher.queue.exchange import (
    Audited,
    AuditPace,
    Held,
    Limits,
    Placed,
    Renewal,
    Settlement,
    SourceKind,
    Standing,
    Submission,
    Tick,
    hashed_key,
    ms,
)
from dispatcher.queue.scripts import Scripts
from dispatcher.task import DEFAULT_QUEUE, Task

#: Tasks one script call carries: keeps a call near a millisecond of Redis' time.
BATCH_SIZE = 100
#: Tasks promoted or taken over by one tick.
TICK_LIMIT = 500
#: Open tasks that one call of the audit looks at: some milliseconds of Redis' time.
AUDIT_PAGE = 200
#: Messages an instance may lag behind, and milliseconds they stay (as in ``cancel.lua``).
CONTROL_LENGTH = 1_000
CONTROL_MS = 3_600_000
#: Leases after which an instance that shows no sign of life is forgotten.
FORGET_LEASES = 4


@dataclass(frozen=True, slots=True)
class Keys:
    """Names of the keys of one dispatcher system; all share the stream's hash slot."""

    stream: str

    def of(self, name: str) -> str:
        """A key of ours beside the stream."""
        return f"{{{self.stream}}}:{name}"

    def queue(self, queue: str) -> str:
        """The stream or list of a queue."""
        return self.stream if queue == DEFAULT_QUEUE else self.of(queue)

    def record(self, task_id: str) -> str:
        """The hash of a task."""
        return self.of(f"task:{task_id}")

    def control(self, instance: str) -> str:
        """The stream in which an instance is told things."""
        return self.of(f"control:{instance}")


class Store:
    """The queue's truth, through its scripts."""

    def __init__(
        self,
        url: str,
        stream: str,
        *,
        group: str = "dispatchers",
        max_connections: int = 16,
    ) -> None:
        """Sends nothing yet."""
        self.keys = Keys(stream)
        self.group = group
        self.redis = connect(url, max_connections=max_connections)
        # Renewals, those with a new state too, share no connection with others: whatever else is slow
        # or waits for one, a lease must not.
        self._renewing = connect(url, max_connections=2)
        self._scripts = Scripts(self.redis, stream)
        self._vital = Scripts(self._renewing, stream)
        self._enqueues = Batch(self._run_enqueue, BATCH_SIZE)
        self._renewals = Batch(self._run_renew, BATCH_SIZE)
        self._settlements = Batch(self._run_finish, BATCH_SIZE)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.redis.aclose()
        await self._renewing.aclose()

    async def ping(self) -> None:
        """Raises QueueUnavailable unless Redis answers."""
        await command(self.redis, "PING")

    # --- producers --------------------------------------------------------------------

    async def enqueue(self, submission: Submission) -> str:
        """Accept a task; returns the id of the task that stands for it.

        Raises TaskConflict, QueueFull, UnknownQueue, InvalidTask (too large), QueueRefused,
        QueueUnavailable.
        """
        verdict, task_id, limit = await self._enqueues.call(submission)
        match verdict:
            case "new" | "known":
                return task_id
            case "conflict":
                raise TaskConflict(
                    f"task {task_id} stands with other content under this id or idempotency key"
                )
            case _:
                raise await self.refusal(verdict, submission.task.queue, limit)

    async def refusal(self, verdict: str, queue: str, limit: int) -> DispatcherError:
        """What a script means that takes no task for ``queue``; see ``refusal_of`` in common.lua."""
        match verdict:
            case "full":
                return QueueFull(f"queue {queue!r} is full: {limit} tasks wait (QUEUE_MAX_LENGTH)")
            case "unusable_queue":
                return QueueRefused(f"the key of queue {queue!r} holds something else")
            case "too_large":
                return InvalidTask(f"the document is larger than {limit} bytes (TASK_MAX_BYTES)")
            case _:
                known = ", ".join(sorted({DEFAULT_QUEUE, *await self.queues()}))
                return UnknownQueue(f"queue: no instance serves {queue!r}; known queues: {known}")

    async def cancel(self, task_id: str) -> tuple[Literal["ended", "cancelled", "requested"], str]:
        """Cancel a task in whatever phase it is; returns what became of that, and its state.

        Raises TaskNotFound, QueueUnavailable.
        """
        reply = await self._scripts.call("cancel", [task_id])
        verdict, state = (part.decode() for part in reply)
        if verdict == "unknown":
            raise TaskNotFound(f"no task {task_id!r}")
        return cast(Literal["ended", "cancelled", "requested"], verdict), state

    async def tell(self, instance: str, operation: str, task_id: str, asked: str = "") -> None:
        """Ask something of one instance; it may not hear. Raises QueueUnavailable."""
        key = self.keys.control(instance)
        fields: dict[Any, Any] = {"op": operation, "id": task_id, "asked": asked}
        with sorted_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.xadd(key, fields, maxlen=CONTROL_LENGTH)
                pipe.pexpire(key, CONTROL_MS)
                await pipe.execute()

    async def queues(self) -> list[str]:
        """Names of the queues that instances have registered."""
        members = await command(self.redis, "SMEMBERS", self.keys.of("meta:queues"))
        return sorted(member.decode() for member in members)

    async def are_lists(self) -> bool:
        """Whether the queues are lists, as in ``lua/common.lua``."""
        told = await command(self.redis, "HGET", self.keys.of("meta:counters"), "source")
        if told is None:
            return bool(await command(self.redis, "TYPE", self.keys.stream) == b"list")
        return bool(told == b"redis-list")

    async def pause(self, queue: str, *, paused: bool) -> None:
        """Keep instances from taking new tasks of ``queue``, or let them again.

        Raises UnknownQueue, QueueUnavailable.
        """
        if queue not in {DEFAULT_QUEUE, *await self.queues()}:
            raise UnknownQueue(f"no instance serves queue {queue!r}")
        await command(self.redis, "SADD" if paused else "SREM", self.keys.of("meta:paused"), queue)

    # --- instances --------------------------------------------------------------------

    async def take(
        self,
        n: int,
        *,
        instance: str,
        incarnation: str,
        lease: float,
        queues: Mapping[str, int],
        daemon: str,
    ) -> list[Delivery]:
        """Take up to ``n`` tasks; ``lease`` in seconds, ``queues`` by weight.

        Not repeated: what a lost reply gave out comes back when its lease lapses.
        Raises QueueUnavailable.
        """
        weights = [part for name, weight in queues.items() for part in (name, str(weight))]
        args = [self.group, instance, incarnation, ms(lease), str(n), daemon, *weights]
        return [_delivery(raw) for raw in await self._scripts.call("take", args, tries=1)]

    async def place(self, delivery: Delivery, task: Task) -> tuple[Placed, str]:
        """Give a task that came in by plain XADD the identity, queue and time it asks for."""
        args = [
            delivery.task_id,
            delivery.owner,
            task.id or "",
            task.digest(),
            task.queue,
            ms(task.delay or 0),
            ms(task.not_before.timestamp() if task.not_before else 0),
            ms(task.expires_at.timestamp() if task.expires_at else None),
            hashed_key(task.idempotency_key),
        ]
        verdict, task_id = await self._scripts.call("place", args)
        return cast(Placed, verdict.decode()), task_id.decode()

    async def renew(
        self, task_id: str, owner: str, lease: float, fields: Mapping[str, str] | None = None
    ) -> Held:
        """Renew one lease for ``lease`` seconds and record ``fields``; see ``lua/renew.lua``."""
        return await self._renewals.call((task_id, owner, lease, fields or {}))

    async def renew_all(self, held: Sequence[tuple[str, str]], lease: float) -> list[Held]:
        """Renew many leases, given as (task id, owner); answers in their order. Not repeated."""
        answers: list[Held] = []
        for start in range(0, len(held), BATCH_SIZE):
            part = held[start : start + BATCH_SIZE]
            items: list[Renewal] = [(i, owner, lease, {}) for i, owner in part]
            answers += _held(await self._vital.call("renew", _renewal_arguments(items), tries=1))
        return answers

    async def standing(self, attempts: Sequence[tuple[str, int]]) -> list[Standing]:
        """How containers stand to their tasks, given as (task id, attempt); answers in their order.

        ``current``: the attempt the open task is at. ``stale``: the task has ended or is at a later
        attempt. ``unknown``: there is no record of it. Raises QueueUnavailable.
        """
        answers: list[Standing] = []
        for start in range(0, len(attempts), BATCH_SIZE):
            part = attempts[start : start + BATCH_SIZE]
            args = [word for task_id, number in part for word in (task_id, str(number))]
            answers += [answer.decode() for answer in await self._scripts.call("standing", args)]
        return answers

    async def finish(self, settlement: Settlement) -> Literal["ok", "lost"]:
        """Give a delivery up: its end, a new attempt, or the same one elsewhere."""
        return await self._settlements.call(settlement)

    async def tick(
        self,
        *,
        instance: str,
        incarnation: str,
        info: str,
        lease: float,
        namespace: str,
        source: SourceKind,
        daemon: str,
        limits: Limits,
        queues: Iterable[str],
    ) -> Tick:
        """Join (or with empty ``info`` leave), promote what is due, take over what lapsed, …

        ``lease`` in seconds; ``namespace`` is used if there is none; ``daemon`` is where this
        instance's containers run, '' while that does not answer.
        """
        args = [instance, incarnation, info, ms(lease), self.group, namespace, source, daemon]
        args += [str(TICK_LIMIT), ms(lease * FORGET_LEASES), limits.document(), *queues]
        reply = await self._scripts.call("tick", args)
        verdict, name, now, promoted, taken_over, expired, lost, poisoned, due, unusable = reply
        return Tick(
            verdict=verdict.decode(),
            namespace=name.decode(),
            now_ms=now,
            promoted=promoted,
            taken_over=taken_over,
            expired=expired,
            lost=lost,
            poisoned=poisoned,
            next_due_ms=int(due) if due else None,
            unusable=tuple(sorted(queue.decode() for queue in unusable)),
        )

    async def audit(self, lease: float, how: AuditPace = "go on") -> Audited:
        """Look whether some AUDIT_PAGE of the open tasks are where they should be, and put back
        what is nowhere. The next call goes on where this one ended, whichever instance makes it;
        ``begin`` starts at the beginning, unless somebody else did within ``lease`` seconds;
        ``pace`` does nothing if somebody audited within a second. Raises QueueUnavailable.
        """
        done, put_back, *vanished = await self._scripts.call("audit", [str(AUDIT_PAGE), ms(lease), how])
        return Audited(bool(done), put_back, tuple(task_id.decode() for task_id in vanished))

    # --- scripts ----------------------------------------------------------------------

    async def _run_enqueue(self, submissions: Sequence[Submission]) -> list[tuple[str, str, int]]:
        args: list[str] = []
        for s in submissions:
            args += [
                s.task_id,
                s.task.digest(),
                s.task.document().decode(),
                s.task.queue,
                ms(s.task.delay or 0),
                ms(s.task.not_before.timestamp() if s.task.not_before else 0),
                ms(s.task.expires_at.timestamp() if s.task.expires_at else None),
                hashed_key(s.task.idempotency_key),
                s.traceparent,
                s.tracestate,
            ]
        replies = await self._scripts.call("enqueue", args)
        return [(reply[0].decode(), reply[1].decode(), reply[2] if reply[2:] else 0) for reply in replies]

    async def _run_renew(self, items: Sequence[Renewal]) -> list[Held]:
        return _held(await self._vital.call("renew", _renewal_arguments(items)))

    async def _run_finish(self, settlements: Sequence[Settlement]) -> list[Literal["ok", "lost"]]:
        args: list[str] = []
        for s in settlements:
            o = s.outcome
            args += [
                s.task_id,
                s.owner,
                s.action,
                o.state,
                o.reason or "",
                o.message,
                "" if o.exit_code is None else str(o.exit_code),
                ms(o.started_at),
                ms(o.finished_at),
                "1" if o.reason is not None and o.reason.dead_letter else "0",
                ms(s.delay),
                s.budget,
                s.prefer,
            ]
        return [
            cast(Literal["ok", "lost"], answer.decode())
            for answer in await self._scripts.call("finish", args)
        ]


def _renewal_arguments(items: Sequence[Renewal]) -> list[str]:
    args = [ms(max(lease for _, _, lease, _ in items))]
    for task_id, owner, _, fields in items:
        flat = [part for pair in fields.items() for part in pair]
        args += [task_id, owner, str(len(flat)), *flat]
    return args


def _held(replies: Iterable[bytes]) -> list[Held]:
    return [cast(Held, reply.decode()) for reply in replies]


def _delivery(raw: list[Any]) -> Delivery:
    (task_id, queue, owner, fence, attempt, document, source_id, oversize, traceparent, tracestate) = raw[:10]
    (accepted, app, infra, cancel, cause, daemon, container, ran, fields) = raw[10:]
    pairs = None if fields == b"" else tuple(zip(fields[::2], fields[1::2], strict=True))
    return Delivery(
        task_id=task_id.decode(),
        queue=queue.decode(),
        owner=owner.decode(),
        fence=int(fence),
        attempt=int(attempt),
        document=document,
        source_id=source_id.decode(),
        fields=pairs,
        oversize=int(oversize),
        traceparent=traceparent.decode("ascii", "replace"),
        tracestate=tracestate.decode("ascii", "replace"),
        accepted_ms=int(accepted),
        app_failures=int(app or 0),
        infra_failures=int(infra or 0),
        cancelled=bool(cancel),
        cause=cause.decode(),
        daemon=daemon.decode(),
        container=container.decode(),
        ran=int(ran) / 1000 if ran else None,
    )
