"""Every error this package raises on purpose, under one root.

What to do about an error is told by its type, so the middle of the program asks
``error.recoverable`` or catches a class, and never compares status codes. The docstring
of a class is its default message.
"""

from __future__ import annotations

from dispatcher.model import Reason


class DispatcherError(Exception):
    """Something went wrong in the dispatcher."""

    #: Whether the same call may succeed later without anybody changing anything.
    recoverable: bool = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


# --- what users and operators hand in -------------------------------------------------


class ConfigurationError(DispatcherError):
    """The settings are not usable."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class TaskRefused(DispatcherError):
    """The task can never run as it was written."""

    reason: Reason = Reason.INVALID

    def __init__(self, message: str, *, field: str | None = None) -> None:
        self.field = field
        super().__init__(f"{field}: {message}" if field else message)


class InvalidTask(TaskRefused):
    """The task's document is malformed."""


class RejectedTask(TaskRefused):
    """The operator's policy does not allow this task."""

    reason = Reason.REJECTED


class ExpiredTask(TaskRefused):
    """The task's expires_at had passed before it could be started."""

    reason = Reason.EXPIRED


class TaskConflict(DispatcherError):
    """The id or idempotency key is taken by a task with other content."""


class TaskNotFound(DispatcherError):
    """No task is known by this id."""


class UnknownQueue(DispatcherError):
    """No instance has registered this queue."""


class QueueFull(DispatcherError):
    """The queue holds QUEUE_MAX_LENGTH tasks; nothing was accepted."""

    recoverable = True


class WaitTimeout(DispatcherError):
    """The task had not ended when the time given for waiting was over."""

    recoverable = True


# --- the queue ------------------------------------------------------------------------


class QueueError(DispatcherError):
    """The queue did not do what was asked."""


class QueueUnavailable(QueueError):
    """Redis can't be reached or can't serve us now."""

    recoverable = True


class OutputUnavailable(QueueUnavailable):
    """The Redis that keeps tasks' output can't be reached; the tasks themselves go on."""


class QueueRefused(QueueError):
    """Redis refuses a command of ours: a key holds something else, or a right is missing."""


class Evicted(DispatcherError):
    """This instance must not go on: what it holds is another's."""


class LeaseLost(DispatcherError):
    """Another instance owns this task now; nothing more may be written or started for it."""


# --- backends -------------------------------------------------------------------------


class BackendError(DispatcherError):
    """The backend could not do what was asked; an infrastructure failure."""

    recoverable = True
    #: What a task's attempt is recorded with when this error ends it.
    reason: Reason = Reason.BACKEND_ERROR


class BackendUnreachable(BackendError):
    """The engine or cluster does not answer."""


class NoCapacity(BackendError):
    """The backend has no room now: backpressure, not a failure."""


class ContainerGone(BackendError):
    """The container vanished before its exit could be read."""

    reason = Reason.LOST


class ForeignContainer(BackendError):
    """A container of another namespace has this name."""


class StartFailed(BackendError):
    """The container was created but its program can't be started."""

    recoverable = False
    reason = Reason.START_FAILED


class LaunchRejected(BackendError):
    """The backend refuses this container's configuration."""

    recoverable = False
    reason = Reason.REJECTED


class ImagePullFailed(BackendError):
    """The image could not be pulled now."""

    reason = Reason.IMAGE_PULL_FAILED


class ImageInvalid(BackendError):
    """The registry's image can't be used."""

    recoverable = False
    reason = Reason.IMAGE_PULL_FAILED


class RegistryThrottled(ImagePullFailed):
    """The registry asks us to come back later (429) or is unwell (5xx)."""

    def __init__(self, message: str | None = None, *, retry_after: float | None = None) -> None:
        #: Seconds the registry asked for, where it said so.
        self.retry_after = retry_after
        super().__init__(message)


class ImageNotFound(BackendError):
    """No such image."""

    recoverable = False
    reason = Reason.IMAGE_NOT_FOUND


class ImageUnauthorized(BackendError):
    """The registry does not give this image to us."""

    recoverable = False
    reason = Reason.IMAGE_UNAUTHORIZED
