"""What can be seen of the queue from outside. Nothing here writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from dispatcher.errors import QueueRefused, TaskNotFound
from dispatcher.model import Reason, State
from dispatcher.queue.connection import command, sorted_errors
from dispatcher.queue.pulls import PullStatus, pulls_of
from dispatcher.queue.store import Store
from dispatcher.task import DEFAULT_QUEUE, RESERVED_QUEUES

#: Records read in one round trip.
PAGE = 200
#: Records looked at for one listing, so that a filter that fits nothing has an end.
MAX_LOOKED_AT = 20_000
#: A plain entry's task: its queue and its entry, whose numbers have 64 bits.
_ENTRY_ID = re.compile(r"([a-z0-9-]{1,24})\.([0-9]{1,19}-[0-9]{1,19})")
#: An element of a list that refers to a task with a record, as in ``lua/common.lua``.
_REFERENCE = re.compile(rb"\x01([0-9]{1,19})-[0-9]{1,19} ")
#: The last second a datetime can tell. Entry ids and `not_before` may lie beyond it.
_LAST_SECOND = 253_402_300_799
#: Redis' answer where another program has made a queue's key something else.
_OTHER_TYPE = "WRONGTYPE"
_FIELDS = (
    "state", "queue", "attempt", "reason", "message", "exit_code", "accepted", "started", "finished",
    "due", "instance", "container", "daemon", "traceparent", "cancel", "alias", "takeovers",
    "retry_of", "image",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """What is known of one task. Times are aware datetimes."""

    id: str
    state: State
    queue: str
    attempt: int = 1
    reason: Reason | None = None
    message: str = ""
    exit_code: int | None = None
    accepted_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    not_before: datetime | None = None
    #: The instance that holds it, or held it last; '' if none ever did.
    instance: str = ""
    container_id: str = ""
    daemon: str = ""
    traceparent: str = ""
    cancel_requested: bool = False
    takeovers: int = 0
    #: The task whose dead letter was retried as this one; '' for all others.
    retry_of: str = ""
    #: The image it waits or waited for, normalised; '' if it had to wait for none.
    image: str = ""
    #: Where the pull is that it waits for, in state pulling; None where that is not known (yet).
    pull: PullStatus | None = None


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """One queue. ``depth`` is what waits: in the stream or list, and what came back; ``in_flight``
    is what instances hold, and containers that wait to be adopted."""

    name: str
    depth: int
    in_flight: int
    #: Seconds the task that waits longest has waited, as far as is known: of what others LPUSHed
    #: it is not. None if none waits.
    oldest_seconds: float | None
    finished_last_minute: int
    paused: bool


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """One instance, as it told last."""

    id: str
    #: Seconds since its last sign of life.
    seen_seconds: float
    info: dict[str, Any] = field(default_factory=dict)


class Views:
    """Reads tasks, queues and instances. Every call may raise QueueUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._redis = store.redis
        self._keys = store.keys

    async def task(self, task_id: str) -> TaskStatus:
        """Raises TaskNotFound."""
        found = (await self.by_ids([task_id]))[0]
        if found is None:
            found = await self._waiting_entry(task_id)
        if found is None:  # it may have been taken between the two looks
            found = (await self.by_ids([task_id]))[0]
        if found is None:
            raise TaskNotFound(f"no task {task_id!r}")
        return (await self._with_pulls([found]))[0]

    async def by_ids(self, task_ids: Sequence[str]) -> list[TaskStatus | None]:
        """Many at once, in order, without ``pull``; None for those without a record."""
        found: list[TaskStatus | None] = []
        for start in range(0, len(task_ids), PAGE):
            part = task_ids[start : start + PAGE]
            with sorted_errors():
                async with self._redis.pipeline(transaction=False) as pipe:
                    for task_id in part:
                        pipe.hmget(self._keys.record(task_id), _FIELDS)
                    rows = await pipe.execute()
            for task_id, row in zip(part, rows, strict=True):
                r = {
                    name: (value or b"").decode("utf-8", "replace")
                    for name, value in zip(_FIELDS, row, strict=True)
                }
                if r["alias"]:
                    found += await self.by_ids([r["alias"]])
                else:
                    found.append(_status(task_id, r) if r["state"] else None)
        return found

    async def tasks(
        self, *, state: State | None = None, queue: str | None = None, limit: int = 100
    ) -> list[TaskStatus]:
        """Up to ``limit`` tasks, the newest first: by their end, or by their acceptance without one."""
        found: list[TaskStatus] = []
        if state is None or state is State.QUEUED:
            found += await self._waiting_entries(queue, limit)
        for index in await self._indexes(state, queue):
            found += await self._newest(index, state, queue, limit)
        found.sort(key=_moment, reverse=True)
        return await self._with_pulls(found[:limit])

    async def _with_pulls(self, found: Sequence[TaskStatus]) -> list[TaskStatus]:
        """The same with ``pull``, from what their instances told: one look for all of them."""
        names = sorted({s.instance for s in found if s.state is State.PULLING})
        if not names:
            return list(found)
        told = await command(self._redis, "HMGET", self._keys.of("meta:instances"), *names)
        pulls = {
            name: pulls_of(json.loads(info))
            for name, info in zip(names, told, strict=True)
            if info is not None
        }
        return [
            replace(s, pull=pulls.get(s.instance, {}).get(s.image)) if s.state is State.PULLING else s
            for s in found
        ]

    async def _newest(
        self, index: str, state: State | None, queue: str | None, limit: int
    ) -> list[TaskStatus]:
        """The newest of one index that fit."""
        found: list[TaskStatus] = []
        for start in range(0, MAX_LOOKED_AT, PAGE):
            ids = await command(self._redis, "ZREVRANGE", index, start, start + PAGE - 1)
            statuses = await self.by_ids([task_id.decode() for task_id in ids])
            found += [s for s in statuses if s and state in {None, s.state} and queue in {None, s.queue}]
            if len(ids) < PAGE or len(found) >= limit:
                break
        return found[:limit]

    async def queues(self) -> list[QueueInfo]:
        """Every registered queue."""
        names = sorted({DEFAULT_QUEUE, *await self._store.queues()})
        now = await self._now_ms()
        paused = await command(self._redis, "SMEMBERS", self._keys.of("meta:paused"))
        lists = await self._store.are_lists()
        with sorted_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for name in names:
                    key = self._keys.queue(name)
                    if lists:
                        pipe.llen(key)
                        pipe.lrange(key, -1, -1)
                    else:
                        pipe.xlen(key)
                        pipe.xrange(key, count=1)
                    pipe.zcard(self._keys.of(f"ready:{name}"))
                    pipe.zrange(self._keys.of(f"ready:{name}"), 0, 0, withscores=True)
                    pipe.zcount(self._keys.of(f"index:finished:{name}"), now - 60_000, "+inf")
                rows = await pipe.execute(raise_on_error=False)
            for i, row in enumerate(rows):  # a queue's key may be something else: see Tick.unusable
                if isinstance(row, Exception):
                    if i % 5 > 1 or _OTHER_TYPE not in str(row):
                        raise row
                    rows[i] = [] if i % 5 else 0
        held = await self._members("index:leases")
        # Containers that run on without an instance, until one on their daemon adopts them.
        for daemon in await command(self._redis, "ZRANGE", self._keys.of("meta:daemons"), 0, -1):
            held += await self._members(f"inbox:{daemon.decode()}")
        in_flight = [status.queue for status in await self.by_ids(held) if status]
        found = []
        for i, name in enumerate(names):
            length, first, ready, head, finished = rows[i * 5 : i * 5 + 5]
            since = _told_by(first) if lists else [int(entry.split(b"-")[0]) for entry, _ in first]
            since += [int(score) for _, score in head]
            found.append(
                QueueInfo(
                    name=name,
                    depth=length + ready,
                    in_flight=in_flight.count(name),
                    oldest_seconds=max(0.0, (now - min(since)) / 1000) if since else None,
                    finished_last_minute=finished,
                    paused=name.encode() in paused,
                )
            )
        return found

    async def instances(self) -> list[InstanceInfo]:
        """Every instance that has shown a sign of life lately."""
        now = await self._now_ms()
        infos = await command(self._redis, "HGETALL", self._keys.of("meta:instances"))
        flat = await command(self._redis, "ZRANGE", self._keys.of("meta:seen"), 0, -1, "WITHSCORES")
        seen = {name: float(score) for name, score in zip(flat[::2], flat[1::2], strict=True)}
        return sorted(
            (
                InstanceInfo(name.decode(), max(0.0, (now - seen.get(name, 0.0)) / 1000), json.loads(info))
                for name, info in infos.items()
            ),
            key=lambda instance: instance.id,
        )

    async def _members(self, index: str) -> list[str]:
        return [i.decode() for i in await command(self._redis, "ZRANGE", self._keys.of(index), 0, -1)]

    async def _now_ms(self) -> int:
        seconds, micros = await command(self._redis, "TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    # --- entries nobody has taken -------------------------------------------------------

    async def _waiting_entry(self, task_id: str) -> TaskStatus | None:
        match = _ENTRY_ID.fullmatch(task_id)
        if not match or match[1] in RESERVED_QUEUES or await self._store.are_lists():
            return None
        found = await self._entries("XRANGE", match[1], match[2], match[2])
        if not found or b"ref" in found[0][1]:  # it carries a task that has an id of its own
            return None
        return _waiting(match[1], match[2])

    async def _waiting_entries(self, queue: str | None, limit: int) -> list[TaskStatus]:
        """Plain entries: those a client submitted have a record and come with the others. What
        others LPUSHed has no id before it is taken."""
        if await self._store.are_lists():
            return []
        names = [queue] if queue else sorted({DEFAULT_QUEUE, *await self._store.queues()})
        found: list[TaskStatus] = []
        for name in names:
            entries = await self._entries("XREVRANGE", name, "+", "-", "COUNT", limit)
            found += [_waiting(name, entry.decode()) for entry, fields in entries if b"ref" not in fields]
        return found

    async def _entries(self, range_of: str, queue: str, *bounds: str | int) -> list[Any]:
        """Of a queue's stream; none if its key is something else."""
        try:
            return list(await command(self._redis, range_of, self._keys.queue(queue), *bounds))
        except QueueRefused as error:
            if _OTHER_TYPE in str(error):
                return []
            raise

    async def _indexes(self, state: State | None, queue: str | None) -> Sequence[str]:
        names = [queue] if queue else sorted({DEFAULT_QUEUE, *await self._store.queues()})
        ended = [self._keys.of(f"index:finished:{name}") for name in names]
        if state is None:
            return [self._keys.of("index:open"), *ended]
        return ended if state.terminal else [self._keys.of("index:open")]


def _told_by(elements: Sequence[bytes]) -> list[int]:
    """Since when they wait, in milliseconds; what others LPUSHed does not tell it."""
    return [int(match[1]) for element in elements if (match := _REFERENCE.match(element))]


def _moment(status: TaskStatus) -> datetime:
    return status.finished_at or status.accepted_at or datetime.min.replace(tzinfo=UTC)


def _time(ms: str) -> datetime | None:
    return datetime.fromtimestamp(min(int(ms) / 1000, _LAST_SECOND), UTC) if ms else None


def _status(task_id: str, r: dict[str, str]) -> TaskStatus:
    state = State(r["state"])
    return TaskStatus(
        id=task_id,
        state=state,
        queue=r["queue"],
        attempt=int(r["attempt"] or 1),
        reason=Reason(r["reason"]) if r["reason"] else None,
        message=r["message"],
        exit_code=int(r["exit_code"]) if r["exit_code"] else None,
        accepted_at=_time(r["accepted"]),
        started_at=_time(r["started"]),
        finished_at=_time(r["finished"]) if state.terminal else None,
        not_before=_time(r["due"]) if state is State.SCHEDULED else None,
        instance=r["instance"],
        container_id=r["container"],
        daemon=r["daemon"],
        traceparent=r["traceparent"],
        cancel_requested=bool(r["cancel"]),
        takeovers=int(r["takeovers"] or 0),
        retry_of=r["retry_of"],
        image=r["image"],
    )


def _waiting(queue: str, entry: str) -> TaskStatus:
    return TaskStatus(
        f"{queue}.{entry}", State.QUEUED, queue, accepted_at=_time(entry.split("-", maxsplit=1)[0])
    )
