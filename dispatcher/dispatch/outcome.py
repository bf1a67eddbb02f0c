"""What an attempt's end means: an answer, another attempt, or a dead letter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import uniform

from dispatcher.errors import BackendError, BackendUnreachable, NoCapacity
from dispatcher.model import Delivery, Exit, Outcome, Reason, State
from dispatcher.queue.exchange import Action, Budget
from dispatcher.task import Backoff, Task

#: Pauses between attempts that infrastructure failures cost, in seconds.
INFRA_BACKOFF = Backoff(initial=1.0, factor=2.0, max=60.0, jitter=True)
#: Seconds before a task is tried again that the backend has no room for, or does not answer to.
PRESSURE_DELAY = 2.0
#: Why a container is stopped, as it is recorded before the signal.
TIMEOUT = "timeout"
CANCEL = "cancel"
DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a delivery now. ``delay`` in seconds; ``prefer`` leaves a release to instances
    on our own daemon for a moment."""

    action: Action
    outcome: Outcome
    delay: float = 0.0
    budget: Budget = "none"
    prefer: bool = False


def of_exit(ended: Exit, cause: str, timeout: float) -> Outcome:
    """The outcome of a container that ended; ``cause`` is why it was stopped, or ''."""
    state, reason, message = State.SUCCEEDED, None, ""
    if cause == CANCEL:
        state, message = State.CANCELLED, "cancelled while it ran"
    elif cause == TIMEOUT and (ended.exit_code != 0 or ended.finished_at - ended.started_at >= timeout):
        # One that succeeded just before the signal has succeeded. Of others the times decide
        # nothing: they are the engine's clock, and the patience was ours.
        state, reason, message = State.FAILED, Reason.TIMEOUT, f"ran for more than {timeout:g} s"
    elif ended.exit_code != 0 and ended.oom:
        state, reason, message = State.FAILED, Reason.OOM, "killed: it used more memory than its limit"
    elif ended.exit_code != 0:
        state, reason, message = State.FAILED, Reason.EXIT, f"exit code {ended.exit_code}"
    return Outcome(state, reason, message, ended.exit_code, ended.started_at, ended.finished_at)


def moved_on(ended: Exit) -> Verdict:
    """What follows when a drain has stopped a container: another attempt, which costs nothing."""
    message = f"stopped with exit code {ended.exit_code} by a dispatcher that was leaving"
    outcome = Outcome(State.QUEUED, None, message, ended.exit_code, ended.started_at, ended.finished_at)
    return Verdict("retry", outcome)


def of_error(error: BackendError) -> Outcome:
    """The outcome of an attempt that the backend could not carry out."""
    return Outcome(State.FAILED, error.reason, str(error))


def judge(outcome: Outcome, task: Task, delivery: Delivery, *, infra_max_attempts: int) -> Verdict:
    """Whether an ended attempt is the task's end or is followed by another."""
    reason = outcome.reason
    if reason is None:
        return Verdict("final", outcome)
    if reason.infrastructure:
        spent = delivery.infra_failures + 1
        if spent < infra_max_attempts:
            return Verdict("retry", outcome, pause(INFRA_BACKOFF, spent), "infra")
    elif reason in task.retry_on:
        spent = delivery.app_failures + 1
        if spent < task.max_attempts:
            return Verdict("retry", outcome, pause(task.backoff, spent), "app")
    return Verdict("final", outcome)


def judge_error(
    error: BackendError, task: Task, delivery: Delivery, *, infra_max_attempts: int, container: bool
) -> Verdict:
    """What follows when the backend could not carry an attempt out.

    ``container`` tells whether there may be one. As long as there may, the attempt is not
    given another: the same one finds out, on the same daemon.
    """
    outcome = of_error(error)
    if isinstance(error, NoCapacity):
        return Verdict("release", outcome, uniform(PRESSURE_DELAY / 2, PRESSURE_DELAY))  # noqa: S311 - jitter
    if isinstance(error, BackendUnreachable):
        # That spends no budget: an engine's restart must not cost a task its life.
        return Verdict("detach", outcome, uniform(PRESSURE_DELAY / 2, PRESSURE_DELAY))  # noqa: S311 - jitter
    if not error.recoverable:
        # Whatever its reason: the same again would only fail again.
        return Verdict("final", outcome)
    verdict = judge(outcome, task, delivery, infra_max_attempts=infra_max_attempts)
    if container and verdict.action == "retry" and outcome.reason is Reason.BACKEND_ERROR:
        return replace(verdict, action="detach")
    return verdict


def judge_mistake(error: Exception, delivery: Delivery, *, infra_max_attempts: int) -> Verdict:
    """What follows when the dispatcher itself failed: the same attempt again, within the budget."""
    message = f"the dispatcher failed: {type(error).__name__}; its log has the details"
    outcome = Outcome(State.FAILED, Reason.BACKEND_ERROR, message)
    spent = delivery.infra_failures + 1
    if spent < infra_max_attempts:
        return Verdict("detach", outcome, pause(INFRA_BACKOFF, spent), "infra")
    return Verdict("final", outcome)


def pause(backoff: Backoff, failures: int) -> float:
    """Seconds before the next attempt after ``failures`` failures (from 1).

    Jitter is "equal": half of the pause is kept and half is drawn
    (M. Brooker, "Exponential Backoff And Jitter", 2015).
    """
    try:
        full = min(backoff.max, backoff.initial * backoff.factor ** (failures - 1))
    except OverflowError:
        full = backoff.max
    return uniform(full / 2, full) if backoff.jitter else full  # noqa: S311 - jitter
