"""Image pulls: one an image however many wait, and no more at once than are allowed.

Whether the image is there is asked first, for that costs a millisecond and no registry. The
places for pulls are taken by those who pull, never by those who wait (see ``pull_line``). There
is no limit on a pull that makes progress; one that makes none for ``stall_timeout`` seconds is
given up.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import uniform

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from dispatcher.backends.base import Backend, PullProgress
from dispatcher.dispatch.pull_line import Pull, PullLine, PullOutcome
from dispatcher.dispatch.recent import Recent
from dispatcher.dispatch.stall import Stalled, pulled_unless_stalled
from dispatcher.errors import BackendError, ImageNotFound, ImagePullFailed, NoCapacity, RegistryThrottled
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
#: Attempts remembered whose images were pulled because their tasks say "always".
MAX_SERVED = 10_000
#: How many a second come back of those that found no place to wait: more than an engine starts.
RETURN_RATE = 25.0
#: Seconds until the first of them does, and the last at the latest.
FIRST_RETURN = 1.0
MAX_RETURN = 300.0
#: Seconds in which nothing is pulled after the daemon had no room for an image: at first, and at
#: the longest.
FIRST_FULL_PAUSE = 10.0
MAX_FULL_PAUSE = 300.0
#: Seconds between two reports of one pull.
REPORT_SECONDS = 1.0

#: Told what happens to images: the kind of event and its fields.
OnEvent = Callable[[str, Mapping[str, str | int | float]], None]
#: Told the reference of an image that was pulled, the ids that it had before ('' for none) and has
#: now, and whether this one is new on the daemon.
OnPulled = Callable[[str, str, str, bool], None]


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
        #: Tasks that wait for images, by registry.
        self._places: Counter[str] = Counter()
        #: Attempts of ``pull_policy: always`` whose images were pulled for them.
        self._served = Recent(MAX_SERVED)
        self._pulls: dict[str, Pull] = {}
        #: Images that were seen to be there.
        self._present = Recent(MAX_PRESENT)
        #: Until when nothing is pulled because the daemon has no room, and how long that was last.
        self._full_until = 0.0
        self._full_pause = 0.0
        #: When the last who found no place comes back, on the loop's clock.
        self._last_return = 0.0
        self._group: TaskGroup | None = None

    # --- what is seen -------------------------------------------------------------------

    @property
    def pulls(self) -> list[Pull]:
        """Pulls under way, then pulls that wait for their turn, the next first."""
        order = self._line.order
        # Those between two tries are in no line for a moment, and begin again soon.
        between = set(self._pulls.values()).difference(order)
        return sorted([*between, *order], key=lambda pull: not pull.active)

    @property
    def waiting(self) -> int:
        """Tasks that wait for an image."""
        return self._places.total()

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
                await self._line.run()
        finally:
            self._group = None

    async def needs_pull(self, task: Task, attempt: str) -> bool:
        """Whether ``task`` must wait for a pull; ``attempt`` names it with its attempt's number.

        Raises ImageNotFound if it must not pull what is not there; BackendUnreachable.
        """
        if not self._backend.capabilities.pulls:
            return False
        image = str(task.reference)
        # What was pulled for this very attempt has come, though there was no consumer then. Or it
        # would be pulled again and again, each time too late for the consumer it had to let go.
        if task.pull_policy == "always" and not self._served.has(attempt):
            return True
        if not await self._is_present(image):
            if task.pull_policy == "never":
                raise ImageNotFound(f"image {task.image} is not on this host and pull_policy is never")
            return True
        self._on_used(image)
        return False

    @contextmanager
    def place(self, registry: str) -> Iterator[float]:
        """A task that waits for an image from ``registry`` is counted inside.

        Gives the seconds that it must be sent away for instead, because as many wait as may or the
        daemon has no room for images; 0.0 if it may wait. Those whose registry is left alone have as
        many places of their own, or they would keep away all others.
        """
        cooling = self._line.is_cooling(registry)
        full = self._full_until - anyio.current_time()
        if full > 0:
            yield max(full, self._next_return())
            return
        waiting = sum(n for name, n in self._places.items() if self._line.is_cooling(name) == cooling)
        if waiting >= self._max_waiting:
            yield self._next_return()
            return
        self._places[registry] += 1
        try:
            yield 0.0
        finally:
            self._places[registry] -= 1
            if not self._places[registry]:
                del self._places[registry]

    def _next_return(self) -> float:
        """Seconds until the next who finds no place comes back: never many at once, for what comes
        back is taken before what has not been looked at yet."""
        now = anyio.current_time()
        self._last_return = min(
            max(self._last_return + 1 / RETURN_RATE, now + FIRST_RETURN), now + MAX_RETURN
        )
        return self._last_return - now

    async def pull(self, task: Task, task_id: str, attempt: str) -> None:
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
                if task.pull_policy == "always":
                    self._served.note(attempt)
                return
            if pull.error is not None:
                raise _of_image(pull.error, image)
            # It was on its way out when we came: ours comes after it.

    async def ahead(self, reference: ImageReference) -> Pull | None:
        """Begin to pull what nobody waits for yet, if it is not there and there is room for it now;
        the pull, where one was begun. Raises BackendUnreachable."""
        image = str(reference)
        full = self._full_until > anyio.current_time()
        if full or not self._line.has_room(reference.registry) or await self._is_present(image):
            return None
        if image in self._pulls or not self._line.has_room(reference.registry):
            return None
        return self._begin(reference, ahead=True)

    def forget(self, image: str) -> None:
        """``image``, a normalised reference, is not there any more."""
        self._present.forget(image)

    async def _is_present(self, image: str) -> bool:
        if self._present.has(image, PRESENT_SECONDS):
            return True
        if not await self._backend.image_id(image):
            self.forget(image)
            return False
        self._present.note(image)
        return True

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
                except Stalled:
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
                    self._present.note(pull.image)
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
            new = await self._watched(pull)
            self._on_pulled(pull.image, before, await self._backend.image_id(pull.image), new)
            outcome = "pulled"
            self._full_pause = 0.0
        except BackendError as failure:
            outcome, error = "failed", str(failure)
            if isinstance(failure, NoCapacity):
                self._leave_room(error)
            raise
        finally:
            seconds = round(time.monotonic() - began, 3)
            self._on_ended(seconds, outcome)
            log.info("image.pull_ended", image=pull.image, outcome=outcome, seconds=seconds, error=error)
            self._tell("image.pull_ended", pull, outcome=outcome, seconds=seconds, error=error)

    def _leave_room(self, error: str) -> None:
        """The daemon has no room: what is pulled again at once is only thrown away again."""
        self._full_pause = min(max(FIRST_FULL_PAUSE, 2 * self._full_pause), MAX_FULL_PAUSE)
        pause = uniform(self._full_pause / 2, self._full_pause)  # noqa: S311 - jitter, not a secret
        self._full_until = anyio.current_time() + pause
        log.error("images.no_room", error=error, seconds=round(pause, 3))
        self._on_event("images.no_room", {"seconds": round(pause, 3), "error": error})

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

    async def _watched(self, pull: Pull) -> bool:
        """Pull, and tell how it goes. Returns and raises as ``pulled_unless_stalled``."""
        reported = anyio.current_time()

        def on_progress(progress: PullProgress) -> None:
            nonlocal reported
            self._on_bytes(max(0, progress.bytes_done - pull.progress.bytes_done))
            if anyio.current_time() - reported >= REPORT_SECONDS:
                reported = anyio.current_time()
                self._tell("image.pull_progress", pull)

        return await pulled_unless_stalled(
            self._backend,
            pull,
            on_progress,
            stall_timeout=self._stall_timeout,
            others=lambda: self._line.under_way,
        )


def _of_image(error: BackendError, image: str) -> BackendError:
    """The error for one of those who wait, which says what it is about: registries often do not."""
    own = copy.copy(error)
    if image not in str(error):
        own.args = (f"{image}: {error}",)
    return own
