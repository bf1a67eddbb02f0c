"""The contract of a backend, verb by verb.

A backend runs attempts as containers on one daemon (an engine, a cluster, a host). It
knows neither Redis nor the other backends. ``tests/backends/conformance.py`` holds every
backend to what is written here.

Identity. A launch is named by namespace, task id and attempt (``Attempt.name``) and there
is never more than one container of a name. Only the caller that created a container starts
it, by the engine's id, once, without a retry. So whoever finds the name taken adopts what
is there: a running one is waited for; an exited one is collected and never started again;
one that was created and not started is removed without force (a refusal means that it runs
by now: look again) and made anew. A creator that was paused meanwhile then starts an id
that is gone, and fails. A container that bears the name but another namespace's label is
never touched: ``ForeignContainer``.

Errors leave a backend sorted into the classes of ``dispatcher.errors``; no exception of a
client library gets out. Every call is bounded in time; ``wait`` alone lasts as long as its
container. Cancelling any of them leaves nothing half done that ``find`` would not show.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from anyio.abc import TaskStatus

from dispatcher.model import Attempt, Exit, Handle, Health

#: Called between create and start with the created container; raises LeaseLost if the task
#: is no longer ours, and then the container must not be started.
Confirm = Callable[[Handle], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class PullProgress:
    """Where a pull is; any part may be unknown (0)."""

    image: str
    bytes_done: int = 0
    bytes_total: int = 0
    layers_done: int = 0
    layers_total: int = 0


#: Called from the event loop whenever the pull has moved on.
OnProgress = Callable[[PullProgress], None]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can and can't do, so that nobody is promised what is not kept."""

    #: Whether images are pulled by us (the verbs about images mean something).
    pulls: bool
    #: Whether a task is kept from the host and from other tasks.
    isolated: bool
    #: Fields of a task that this backend accepts without applying them.
    not_applied: frozenset[str] = frozenset()


class Backend(Protocol):
    """Runs attempts as containers on one daemon."""

    name: str
    capabilities: Capabilities

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Do the backend's background work (its watcher) until cancelled.

        Calls ``task_status.started()`` once the daemon has answered; the other verbs need a
        running backend. Loses and regains its daemon without ending.

        Raises BackendUnreachable if the daemon does not answer at first.
        """
        ...

    async def probe(self) -> Health:
        """Ask the daemon whether it is there. Never raises a BackendError; takes at most 5 s."""
        ...

    async def image_id(self, image: str) -> str:
        """The daemon's own id of what ``image`` names there now; '' if there is nothing of that
        name, or only for another platform than is wanted. Never contacts a registry.

        Raises BackendUnreachable, BackendError.
        """
        ...

    async def image_obtainable(self, image: str) -> bool:
        """Whether the registry would give ``image`` now. Pulls nothing; takes at most 15 s."""
        ...

    async def prepare(self, image: str, on_progress: OnProgress) -> bool:
        """Pull ``image``, also if it is present. Unbounded in time: the caller cancels.

        Returns whether what was pulled is new on the daemon: it was not there before by any name.

        Raises ImageNotFound, ImageUnauthorized, ImageInvalid, RegistryThrottled (with
        ``retry_after`` where the registry told), ImagePullFailed, NoCapacity,
        BackendUnreachable.
        """
        ...

    async def images_size(self) -> int:
        """Bytes that all images together take on the daemon. May take a minute.

        Raises BackendUnreachable, BackendError.
        """
        ...

    async def remove_image(self, image: str, image_id: str) -> bool:
        """Take the name ``image`` from the daemon, and with its last name the image, if it still
        names ``image_id`` and no container, running or ended, was made of that. Without force.

        Returns whether the name is gone; False if it stays, or names another image by now.
        Raises BackendUnreachable, BackendError.
        """
        ...

    async def launch(self, attempt: Attempt, confirm: Confirm) -> Handle:
        """Create, confirm, start; or adopt what bears the name (``Handle.adopted``).

        ``confirm`` is awaited with the created container before the start, and with the
        adopted one before it is returned. What it raises is passed on. ``Handle.replaces`` tells
        it which containers of the name this launch has found unstarted and removed.

        Returns a handle that is RUNNING or EXITED, with ``started_at``.
        Raises StartFailed (the container is gone again), LaunchRejected, ImageNotFound,
        NoCapacity, ForeignContainer, BackendUnreachable, BackendError.
        """
        ...

    async def wait(self, handle: Handle) -> Exit:
        """Wait until the container has ended, however long; survives the daemon's absence.

        Raises ContainerGone if it vanished, or if its end was its daemon's and not its program's.
        """
        ...

    def logs(self, handle: Handle, *, follow: bool) -> AsyncIterator[bytes]:
        """Its output from the beginning of what is kept, both streams in order, in pieces.

        With ``follow`` it ends when the container has; without, at what is there now.
        Raises ContainerGone, BackendUnreachable.
        """
        ...

    async def stop(self, handle: Handle, grace: float) -> None:
        """SIGTERM, ``grace`` seconds, SIGKILL. Returns when it has ended; fine if it had."""
        ...

    async def remove(self, handle: Handle) -> None:
        """Remove an ended container; fine if it is gone. Kills nothing that runs."""
        ...

    async def find(self, namespace: str) -> list[Handle]:
        """Every container that bears this namespace's label, in any phase."""
        ...
