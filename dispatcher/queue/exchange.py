"""What goes into the scripts and comes out of them."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dispatcher.model import Outcome
from dispatcher.task import Task

#: One lease to renew: task id, owner, seconds, and what to record with it.
Renewal = tuple[str, str, float, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Submission:
    """A task on its way in, with the id it will have unless its key is known."""

    task: Task
    task_id: str
    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def of(cls, task: Task, *, traceparent: str = "", tracestate: str = "") -> Submission:
        """Give ``task`` an id, if it has none."""
        return cls(task, task.id or new_task_id(), traceparent, tracestate)


@dataclass(frozen=True, slots=True)
class Limits:
    """The operator's settings that scripts obey; every tick tells them to Redis, so that
    producers need not know them. Seconds, entries, tasks (0: no limit), bytes."""

    retention: float = 86_400.0
    results_length: int = 100_000
    max_length: int = 0
    max_bytes: int = 65_536
    max_deliveries: int = 5
    infra_max_attempts: int = 10
    lost_after: float = 300.0

    def document(self) -> str:
        """As the script ``tick`` reads them: JSON, times in milliseconds."""
        return json.dumps(
            {
                "retention": round(self.retention * 1000),
                "results_length": self.results_length,
                "max_length": self.max_length,
                "max_bytes": self.max_bytes,
                "max_deliveries": self.max_deliveries,
                "infra_max_attempts": self.infra_max_attempts,
                "lost_after": round(self.lost_after * 1000),
            }
        )


@dataclass(frozen=True, slots=True)
class Tick:
    """What a tick told, and what it did, in numbers of tasks."""

    #: ``rival``: another living instance has the same name. ``source``: the queues are of the
    #: other kind (QUEUE_SOURCE). In both cases nothing was done.
    verdict: Literal["ok", "rival", "source"]
    namespace: str
    #: Redis' clock, milliseconds.
    now_ms: int
    promoted: int
    taken_over: int
    #: Ended because their ``expires_at`` had passed before anybody could start them.
    expired: int
    #: Attempts given up because their daemon has been without an instance for too long.
    lost: int
    #: Ended because they had brought too many dispatchers down.
    poisoned: int
    #: When the next scheduled task may start; None if there is none.
    next_due_ms: int | None
    #: Queues whose keys another program has made something else.
    unusable: tuple[str, ...]

    @property
    def rival(self) -> bool:
        """Whether another living instance has the same name."""
        return self.verdict == "rival"


@dataclass(frozen=True, slots=True)
class Audited:
    """What a part of an audit found."""

    #: Whether the round over all open tasks is at its end.
    done: bool
    #: Tasks that were nowhere and are back in their queue.
    put_back: int
    #: Tasks whose record was gone: lost, by whoever deleted it.
    vanished: tuple[str, ...]


#: Where tasks come from: QUEUE_SOURCE.
SourceKind = Literal["redis-stream", "redis-list"]
#: How a part of an audit is asked for.
AuditPace = Literal["begin", "go on", "pace"]
Action = Literal["final", "retry", "release", "detach"]
Budget = Literal["app", "infra", "none"]
Held = Literal["ok", "cancel", "lost"]
Standing = Literal["current", "stale", "unknown"]
Placed = Literal["held", "moved", "known", "conflict", "unknown_queue", "lost"]


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a delivery is given up; see ``lua/finish.lua``."""

    task_id: str
    owner: str
    action: Action
    outcome: Outcome
    delay: float = 0.0
    budget: Budget = "none"
    #: With ``release``: the daemon that others leave it to for a moment; '' for none.
    prefer: str = ""


def new_task_id() -> str:
    """An id nobody else has: 128 random bits."""
    return secrets.token_hex(16)


def ms(seconds: float | None) -> str:
    """Seconds as Redis' milliseconds; '' for None."""
    return "" if seconds is None else str(round(seconds * 1000))


def hashed_key(key: str | None) -> str:
    """An idempotency key as part of a Redis key: bounded and without odd characters."""
    return hashlib.sha256(key.encode()).hexdigest() if key else ""
