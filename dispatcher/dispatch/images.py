"""Image pulls: one an image however many wait, and no more at once than are allowed.

Whether the image is there is asked first, for that costs a millisecond and no registry. The
semaphore is taken by the one who pulls, never by those who wait. There is no limit on a pull
that makes progress; one that makes none for ``stall_timeout`` seconds is given up.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from dispatcher.backends.base import Backend, PullProgress
from dispatcher.errors import BackendError, ImageNotFound, ImagePullFailed
from dispatcher.task import Task

log = structlog.get_logger(__name__)

Outcome = Literal["pulled", "failed", "cancelled"]


@dataclass(eq=False)
class Pull:
    """One pull under way, shared by all who wait for its image."""

    image: str
    progress: PullProgress
    waiters: int = 0
    #: Whether it holds one of the MAX_CONCURRENT_PULLS.
    active: bool = False
    error: BackendError | None = None
    done: anyio.Event = field(default_factory=anyio.Event)
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    moved: anyio.Event = field(default_factory=anyio.Event)

    def on_progress(self, progress: PullProgress) -> None:
        """The backend tells how far it is; equal numbers mean a step they don't show."""
        self.progress = progress
        self.moved.set()


class ImageGovernor:
    """Makes images present on the backend's daemon."""

    def __init__(
        self,
        backend: Backend,
        *,
        max_concurrent: int,
        stall_timeout: float,
        on_pulled: Callable[[float, Outcome], None],
    ) -> None:
        """``stall_timeout`` in seconds; ``on_pulled`` gets each pull's seconds and outcome."""
        self._backend = backend
        self._limiter = anyio.Semaphore(max_concurrent)
        self._stall_timeout = stall_timeout
        self._on_pulled = on_pulled
        self._pulls: dict[str, Pull] = {}
        self._group: TaskGroup | None = None

    @property
    def pulls(self) -> list[Pull]:
        """Pulls under way and pulls that wait for their turn."""
        return list(self._pulls.values())

    @property
    def waiting(self) -> int:
        """Tasks that wait for an image."""
        return sum(pull.waiters for pull in self._pulls.values())

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Give the pulls a home that outlives each single waiter; until cancelled."""
        async with anyio.create_task_group() as group:
            self._group = group
            task_status.started()
            await anyio.sleep_forever()

    async def needs_pull(self, task: Task) -> bool:
        """Whether ``task`` must wait for a pull.

        Raises ImageNotFound if it must not pull what is not there; BackendUnreachable.
        """
        if not self._backend.capabilities.pulls:
            return False
        if task.pull_policy == "always":
            return True
        if await self._backend.image_present(str(task.reference)):
            return False
        if task.pull_policy == "never":
            raise ImageNotFound(f"image {task.image} is not on this host and pull_policy is never")
        return True

    async def pull(self, task: Task) -> None:
        """Wait until the image has been pulled, by a pull of our own or one under way.

        Raises what the backend's ``prepare`` raises, ImagePullFailed if the pull stalled.
        When the last waiter is cancelled, so is the pull.
        """
        if self._group is None:
            raise RuntimeError("the governor is not running")
        image = str(task.reference)
        pull = self._pulls.get(image)
        if pull is None:
            pull = self._pulls[image] = Pull(image, PullProgress(image))
            self._group.start_soon(self._pull, pull, name=f"pull {image}")
        pull.waiters += 1
        try:
            await pull.done.wait()
        finally:
            pull.waiters -= 1
            if not pull.waiters and not pull.done.is_set():
                self._pulls.pop(image, None)
                pull.scope.cancel()
        if pull.error is not None:
            raise copy.copy(pull.error)

    async def _pull(self, pull: Pull) -> None:
        began = time.monotonic()
        outcome: Outcome = "cancelled"
        try:
            with pull.scope:
                async with self._limiter:
                    pull.active = True
                    began = time.monotonic()
                    log.info("image.pull_started", image=pull.image)
                    await self._watched(pull)
                    outcome = "pulled"
        except BackendError as error:
            outcome, pull.error = "failed", error
        except Exception as error:
            log.exception("image.pull_failed", image=pull.image)
            outcome, pull.error = "failed", ImagePullFailed(f"the dispatcher failed: {type(error).__name__}")
        finally:
            if self._pulls.get(pull.image) is pull:
                del self._pulls[pull.image]
            pull.done.set()
            if pull.active:
                seconds = time.monotonic() - began
                self._on_pulled(seconds, outcome)
                log.info("image.pull_ended", image=pull.image, outcome=outcome, seconds=round(seconds, 3))

    async def _watched(self, pull: Pull) -> None:
        """Pull; raise ImagePullFailed when nothing moves for the stall timeout."""
        stalled = False
        failure: BackendError | None = None

        async def watch() -> None:
            nonlocal stalled
            while True:
                pull.moved = anyio.Event()
                with anyio.move_on_after(self._stall_timeout) as timer:
                    await pull.moved.wait()
                if timer.cancelled_caught:
                    stalled = True
                    group.cancel_scope.cancel()
                    return

        async with anyio.create_task_group() as group:
            group.start_soon(watch, name=f"watch pull {pull.image}")
            try:
                await self._backend.prepare(pull.image, pull.on_progress)
            except BackendError as error:
                failure = error
            group.cancel_scope.cancel()
        if stalled:
            raise ImagePullFailed(f"pull of {pull.image} made no progress for {self._stall_timeout:g} s")
        if failure is not None:
            raise failure
