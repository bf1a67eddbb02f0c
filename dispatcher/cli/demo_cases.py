"""The tasks of ``demo``, each with the end it should have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dispatcher.client import Backoff, Reason, State, Task, TaskStatus

#: Tasks that share one cold image, where there is one to share.
SHARING = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One task and what should become of it."""

    name: str
    #: A task for the client, or bytes for a plain XADD.
    task: Task | bytes
    state: State = State.SUCCEEDED
    reason: Reason | None = None
    exit_code: int | None = None
    attempts: int = 1
    #: What is done to it once it runs.
    then: Literal["cancel"] | None = None

    @property
    def expected(self) -> str:
        """In words."""
        return in_words(self.state, self.reason, self.exit_code)

    def met_by(self, status: TaskStatus) -> bool:
        """Whether the task ended as it should."""
        code_fits = self.exit_code is None or status.exit_code == self.exit_code
        ends_alike = (status.state, status.reason) == (self.state, self.reason)
        # A registry that asks for patience costs an attempt, and is no fault of what is shown.
        return ends_alike and code_fits and status.attempt >= self.attempts


def in_words(state: State, reason: Reason | None, exit_code: int | None) -> str:
    """An end as the table has it."""
    if reason is Reason.EXIT:
        return f"{state}: exit {exit_code}"
    return f"{state}: {reason}" if reason else str(state)


def cases(image: str, *, cold: bool) -> list[Case]:
    """All of them; several besides for one pull to serve, if the image is ``cold``."""

    def shell(script: str, **fields: object) -> Task:
        return Task.model_validate({"image": image, "command": ["sh", "-c", script], **fields})

    document = Task(image=image, command=["echo", "hello from a plain XADD"]).document()
    shared = [
        Case(f"shares a pull {n}", Task(image=image, command=["echo", f"number {n} of {SHARING}"]))
        for n in range(1, SHARING + 1)
    ]
    return [
        *(shared if cold else []),
        Case("succeeds", Task(image=image, command=["echo", "hello"]), exit_code=0),
        Case("fails", shell("echo 'no luck'; exit 3"), State.FAILED, Reason.EXIT, 3),
        Case(
            "fails, then succeeds",
            shell(
                'echo "attempt $DISPATCHER_ATTEMPT"; test "$DISPATCHER_ATTEMPT" -ge 2',
                max_attempts=3,
                backoff=Backoff(initial=0.2, jitter=False),
            ),
            exit_code=0,
            attempts=2,
        ),
        Case(
            "takes too long",
            shell("echo 'this takes a minute'; sleep 60", timeout=1.0, grace_period=1.0),
            State.FAILED,
            Reason.TIMEOUT,
        ),
        Case(
            "is cancelled",
            shell("echo 'until somebody stops me'; sleep 60", grace_period=1.0),
            State.CANCELLED,
            then="cancel",
        ),
        Case(
            "has no such program",
            Task(image=image, command=["/no/such/program"]),
            State.FAILED,
            Reason.START_FAILED,
        ),
        Case("comes by plain XADD", document, exit_code=0),
        Case("is no JSON", b'{"image": "busybox", "command": [', State.FAILED, Reason.INVALID),
    ]
