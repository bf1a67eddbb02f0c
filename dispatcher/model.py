"""The values a task's journey is told in. All are frozen; nothing here does I/O.

``Delivery`` is one task in an instance's hands; ``Attempt`` is one launch of it; ``Handle`` is
the container an attempt became; ``Exit`` is how that ended; ``Outcome`` is what is recorded.
Times are Unix seconds (float) unless a name ends in ``_ms`` (integer milliseconds of Redis'
clock). Sizes are bytes. The document a user writes is ``dispatcher.task.Task``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class State(StrEnum):
    """Where a task is; see the contract's journey."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    PULLING = "pulling"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether nothing will change any more."""
        return self in _TERMINAL


_TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class Reason(StrEnum):
    """Why a task or attempt failed."""

    EXIT = "exit"
    OOM = "oom"
    TIMEOUT = "timeout"
    EXPIRED = "expired"
    INVALID = "invalid"
    REJECTED = "rejected"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_UNAUTHORIZED = "image_unauthorized"
    IMAGE_PULL_FAILED = "image_pull_failed"
    START_FAILED = "start_failed"
    BACKEND_ERROR = "backend_error"
    LOST = "lost"
    POISON = "poison"

    @property
    def infrastructure(self) -> bool:
        """Whether the failure is ours: it spends the budget INFRA_MAX_ATTEMPTS, not the task's."""
        return self in _INFRASTRUCTURE

    @property
    def dead_letter(self) -> bool:
        """Whether a task that ends so also lies in the dead-letter stream."""
        return self not in _ANSWERS


_INFRASTRUCTURE = frozenset({Reason.BACKEND_ERROR, Reason.LOST, Reason.IMAGE_PULL_FAILED})
#: Ends that answer the question the task asked; every other one wants somebody's look.
_ANSWERS = frozenset({Reason.EXIT, Reason.OOM, Reason.TIMEOUT, Reason.EXPIRED})


# --- the journey ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delivery:
    """One task in this instance's hands, as ``take`` gave it."""

    task_id: str
    queue: str
    #: The whole token every write for this task must show: instance/incarnation/fence.
    owner: str
    fence: int
    #: Number of the attempt to make, from 1.
    attempt: int
    #: The task's JSON as it came in.
    document: bytes
    #: Entry id in the queue's stream, where it came from one.
    source_id: str = ""
    #: Names and values of an entry that somebody XADDed and nobody has validated; None for
    #: a task that was submitted or accepted before.
    fields: tuple[tuple[bytes, bytes], ...] | None = None
    #: Bytes of a document too large to be looked at; 0 if it was not.
    oversize: int = 0
    traceparent: str = ""
    tracestate: str = ""
    accepted_ms: int = 0
    #: Attempts ended by an application failure, and by an infrastructure failure.
    app_failures: int = 0
    infra_failures: int = 0
    cancelled: bool = False
    #: Why an earlier owner stopped this attempt's container: "timeout", "cancel", "drain"; or ''.
    cause: str = ""
    #: Where this attempt's container may be already; '' if nobody came to making one.
    daemon: str = ""
    #: Id of the container that was to be started for this attempt; it may have run.
    container: str = ""
    #: Seconds since that was recorded to run, by Redis' clock; None if it was not.
    ran: float | None = None


def container_name(namespace: str, task_id: str, attempt: int) -> str:
    """``dispatcher-<first 8 of namespace>-<id>-<attempt>``."""
    return f"dispatcher-{namespace[:8]}-{task_id}-{attempt}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """Everything a backend needs to launch one container. Its name is its identity."""

    namespace: str
    task_id: str
    number: int
    fence: int
    instance: str
    image: str
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    #: The container's whole environment, ours included.
    env: dict[str, str] = field(default_factory=dict)
    workdir: str | None = None
    user: str | None = None
    cpus: float | None = None
    memory: int | None = None
    pids: int | None = None
    network: str = "none"
    #: The user's labels; the backend adds ours (see ``own_labels``).
    labels: dict[str, str] = field(default_factory=dict)
    security_profile: Literal["baseline", "restricted"] = "baseline"

    @property
    def name(self) -> str:
        """See ``container_name``."""
        return container_name(self.namespace, self.task_id, self.number)

    @property
    def own_labels(self) -> dict[str, str]:
        """The labels a container is found again by."""
        return {
            "dispatcher.task-id": self.task_id,
            "dispatcher.attempt": str(self.number),
            "dispatcher.namespace": self.namespace,
            "dispatcher.instance": self.instance,
        }


class Phase(StrEnum):
    """Where a container is, as its engine tells."""

    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True, slots=True)
class Handle:
    """A container of ours on its engine."""

    #: The engine's own id: what is acted on, so that a name made anew is never mistaken.
    container_id: str
    name: str
    namespace: str
    task_id: str
    attempt: int
    #: Identity of the engine, cluster or host it runs on.
    daemon: str
    phase: Phase
    #: The engine's time of the start; None before it.
    started_at: float | None = None
    #: Whether this launch found it there instead of making it.
    adopted: bool = False
    #: Ids of earlier containers of this name that were never started, and were removed for it.
    replaces: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended, as its engine tells."""

    exit_code: int
    started_at: float
    finished_at: float
    #: Killed for want of memory by the engine's own word; 137 alone says nothing.
    oom: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is recorded of an attempt's end."""

    state: State
    reason: Reason | None = None
    message: str = ""
    exit_code: int | None = None
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """A backend's answer to ``probe``."""

    ok: bool
    #: Identity of the daemon, stable over restarts of it and of us; empty if not ok.
    daemon: str = ""
    version: str = ""
    #: One line for people: what is wrong, or what is there.
    detail: str = ""
