"""Image pulls: one an image however many wait, and no more at once than are allowed.

Whether the image is there is asked first, for that costs a millisecond and no registry. The
places for pulls are taken by those who pull, never by those who wait (see ``pull_line``). There
is no limit on a pull that makes progress; one that makes none for ``stall_timeout`` seconds is
given up.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from dispatcher.backends.base import Backend, PullProgress
from dispatcher.dispatch.pull_line import Pull, PullLine, PullOutcome
from dispatcher.errors import BackendError, ImageNotFound, ImagePullFailed, RegistryThrottled
from dispatcher.reference import ImageReference
from dispatcher.retry import RetryPause
from dispatcher.task import Task

log = structlog.get_logger(__name__)

#: Times that a pull is tried before those who wait for it are told that it failed; each of their
#: attempts pays for it then, and waits for a pause of its own before the next.
PULL_TRIES = 3
#: Seconds between two tries: at first, and at the longest.
FIRST_PAUSE = 1.0
MAX_PAUSE = 30.0
#: Seconds for which an image that was there is taken to be there still. A launch that finds it
#: gone says so, and it is pulled then; so this saves a question and can break nothing.
PRESENT_SECONDS = 10.0
#: Images remembered to be there.
MAX_PRESENT = 1_000
#: Seconds between two reports of one pull.
REPORT_SECONDS = 1.0

#: Told what happens to images: the kind of event and its fields.
OnEvent = Callable[[str, Mapping[str, str | int | float]], None]
#: Told an image's reference, and the ids it had on the daemon before its pull ('' if it was not
#: there) and after.
OnPulled = Callable[[str, str, str], None]


class _Stalled(ImagePullFailed):
    """The pull made no progress: to try again at once has cost enough time already."""


class ImageGovernor:
    """Makes images present on the backend's daemon."""

    def __init__(
        self,
        backend: Backend,
        *,
        max_concurrent: int,
        max_per_registry: int,
        max_waiting: int,
        stall_timeout: float,
        on_pulled: OnPulled,
        on_used: Callable[[str], None],
        on_event: OnEvent,
        on_ended: Callable[[float, PullOutcome], None],
        on_bytes: Callable[[int], None],
    ) -> None:
        """``max_waiting``: tasks that may wait for images; ``stall_timeout`` in seconds.

        ``on_used`` is told each image that a task is about to be launched from, ``on_ended`` each
        pull's seconds and outcome, ``on_bytes`` what was downloaded.
        """
        self._backend = backend
        self._line = PullLine(at_once=max_concurrent, per_registry=max_per_registry)
        self._max_waiting = max_waiting
        self._stall_timeout = stall_timeout
        self._on_pulled = on_pulled
        self._on_used = on_used
        self._on_event = on_event
        self._on_ended = on_ended
        self._on_bytes = on_bytes
        self._places_taken = 0
        self._pulls: dict[str, Pull] = {}
        #: When each image was last seen to be there, on the loop's clock.
        self._present: dict[str, float] = {}
        self._group: TaskGroup | None = None

    # --- what is seen -------------------------------------------------------------------

    @property
    def pulls(self) -> list[Pull]:
        """Pulls under way, then pulls that wait for their turn, the next first."""
        order = self._line.order
        # Those between two tries are in no line for a moment, and begin again soon.
        between = [pull for pull in self._pulls.values() if pull not in order]
        return sorted([*between, *order], key=lambda pull: not pull.active)

    @property
    def waiting(self) -> int:
        """Tasks that wait for an image."""
        return self._places_taken

    @property
    def crowded(self) -> bool:
        """Whether as many tasks wait for images as may."""
        return self._places_taken >= self._max_waiting

    @property
    def cooling(self) -> dict[str, float]:
        """Registries that are left alone for now, and the seconds until they are asked again."""
        return self._line.cooling

    @property
    def busy(self) -> bool:
        """Whether every place for a pull is taken."""
        return self._line.full

    # --- what is wanted -----------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Give the pulls a home that outlives each single waiter; until cancelled."""
        try:
            async with anyio.create_task_group() as group:
                self._group = group
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._group = None

    async def needs_pull(self, task: Task) -> bool:
        """Whether ``task`` must wait for a pull.

        Raises ImageNotFound if it must not pull what is not there; BackendUnreachable.
        """
        if not self._backend.capabilities.pulls:
            return False
        image = str(task.reference)
        if task.pull_policy == "always":
            return True
        if not await self._is_present(image):
            if task.pull_policy == "never":
                raise ImageNotFound(f"image {task.image} is not on this host and pull_policy is never")
            return True
        self._on_used(image)
        return False

    @contextmanager
    def place(self) -> Iterator[None]:
        """A task that waits for an image, and has seen that there is no crowd, is counted inside."""
        self._places_taken += 1
        try:
            yield
        finally:
            self._places_taken -= 1

    async def pull(self, task: Task, task_id: str) -> None:
        """Wait until the image has been pulled, by a pull of our own or one under way.

        Raises what the backend's ``prepare`` raises, ImagePullFailed if the pull stalled.
        When the last waiter is cancelled, so is the pull.
        """
        image = str(task.reference)
        while True:
            pull = self._pulls.get(image) or self._begin(task.reference)
            await self._wait_for(pull, task_id)
            if pull.outcome == "pulled":
                self._on_used(image)
                return
            if pull.error is not None:
                raise copy.copy(pull.error)
            # It was on its way out when we came: ours comes after it.

    async def ahead(self, reference: ImageReference) -> Pull | None:
        """Begin to pull what nobody waits for yet, if it is not there and there is room for it now;
        the pull, where one was begun. Raises BackendUnreachable."""
        image = str(reference)
        if not self._line.has_room(reference.registry) or await self._is_present(image):
            return None
        if image in self._pulls or not self._line.has_room(reference.registry):
            return None
        return self._begin(reference, ahead=True)

    def forget(self, image: str) -> None:
        """``image``, a normalised reference, is not there any more."""
        self._present.pop(image, None)

    async def _is_present(self, image: str) -> bool:
        seen = self._present.get(image)
        if seen is not None and anyio.current_time() - seen < PRESENT_SECONDS:
            return True
        if not await self._backend.image_id(image):
            self.forget(image)
            return False
        self._note_present(image)
        return True

    def _note_present(self, image: str) -> None:
        self._present.pop(image, None)
        if len(self._present) >= MAX_PRESENT:
            del self._present[next(iter(self._present))]
        self._present[image] = anyio.current_time()

    async def _wait_for(self, pull: Pull, task_id: str) -> None:
        pull.waiting_tasks.append(task_id)
        if pull.ahead:
            self._line.wanted(pull)
        try:
            await pull.done.wait()
        finally:
            pull.waiting_tasks.remove(task_id)
            if not pull.waiters and not pull.done.is_set():
                pull.scope.cancel()

    # --- the pulls ----------------------------------------------------------------------

    def _begin(self, reference: ImageReference, *, ahead: bool = False) -> Pull:
        if self._group is None:
            raise RuntimeError("the governor is not running")
        image = str(reference)
        pull = self._pulls[image] = Pull(image, reference.registry, PullProgress(image), ahead=ahead)
        self._group.start_soon(self._pull, pull, name=f"pull {image}")
        return pull

    async def _pull(self, pull: Pull) -> None:
        try:
            with pull.scope:
                await self._tried(pull)
                pull.outcome = "pulled"
        except BackendError as error:
            pull.outcome, pull.error = "failed", error
        except Exception as error:
            log.exception("image.pull_failed", image=pull.image)
            pull.outcome = "failed"
            pull.error = ImagePullFailed(f"the dispatcher failed: {type(error).__name__}")
        finally:
            del self._pulls[pull.image]
            pull.done.set()

    async def _tried(self, pull: Pull) -> None:
        """Pull; what may be otherwise in a moment is tried again, PULL_TRIES times in all, if
        somebody waits for it."""
        pause = RetryPause(FIRST_PAUSE, MAX_PAUSE)
        while True:
            async with self._line.turn(pull):
                pull.tries += 1
                try:
                    await self._measured(pull)
                except RegistryThrottled as error:
                    self._leave_alone(pull.registry, error)
                    if pull.ahead or pull.tries >= PULL_TRIES:
                        raise
                    continue  # its turn comes when the registry is asked again
                except _Stalled:
                    raise
                except ImagePullFailed:
                    if pull.ahead or pull.tries >= PULL_TRIES:
                        raise
                except BackendError as error:
                    if not error.recoverable:
                        self._line.answered(pull.registry)
                    raise
                else:
                    self._line.answered(pull.registry)
                    self._note_present(pull.image)
                    return
            await pause.wait()

    def _leave_alone(self, registry: str, error: RegistryThrottled) -> None:
        seconds = round(self._line.refused(registry, error.retry_after), 3)
        log.warning("registry.cooling", registry=registry, seconds=seconds, error=str(error))
        self._on_event("registry.cooling", {"registry": registry, "seconds": seconds, "error": str(error)})

    async def _measured(self, pull: Pull) -> None:
        """One try, and what others are told of it."""
        began = time.monotonic()
        outcome: PullOutcome = "cancelled"
        error = ""
        log.info("image.pull_started", image=pull.image, attempt=pull.tries, ahead=pull.ahead)
        self._tell("image.pull_started", pull)
        try:
            before = await self._backend.image_id(pull.image)
            await self._watched(pull)
            self._on_pulled(pull.image, before, await self._backend.image_id(pull.image))
            outcome = "pulled"
        except BackendError as failure:
            outcome, error = "failed", str(failure)
            raise
        finally:
            seconds = round(time.monotonic() - began, 3)
            self._on_ended(seconds, outcome)
            log.info("image.pull_ended", image=pull.image, outcome=outcome, seconds=seconds, error=error)
            self._tell("image.pull_ended", pull, outcome=outcome, seconds=seconds, error=error)

    def _tell(self, kind: str, pull: Pull, **fields: str | float) -> None:
        progress = pull.progress
        self._on_event(
            kind,
            {
                "image": pull.image,
                "registry": pull.registry,
                "tries": pull.tries,
                "waiters": pull.waiters,
                "bytes_done": progress.bytes_done,
                "bytes_total": progress.bytes_total,
                "layers_done": progress.layers_done,
                "layers_total": progress.layers_total,
                **fields,
            },
        )

    async def _watched(self, pull: Pull) -> None:
        """Pull; raise ImagePullFailed when nothing moves for the stall timeout."""
        stalled = False
        failure: BackendError | None = None
        reported = anyio.current_time()
        pull.progress = PullProgress(pull.image)

        def on_progress(progress: PullProgress) -> None:
            """The backend tells how far it is; equal numbers mean a step they don't show."""
            nonlocal reported
            self._on_bytes(max(0, progress.bytes_done - pull.progress.bytes_done))
            pull.progress = progress
            pull.moved.set()
            if anyio.current_time() - reported >= REPORT_SECONDS:
                reported = anyio.current_time()
                self._tell("image.pull_progress", pull)

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
                await self._backend.prepare(pull.image, on_progress)
            except BackendError as error:
                failure = error
            group.cancel_scope.cancel()
        if stalled:
            raise _Stalled(f"pull of {pull.image} made no progress for {self._stall_timeout:g} s")
        if failure is not None:
            raise failure
