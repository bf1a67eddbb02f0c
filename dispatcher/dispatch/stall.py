"""One pull by the backend, given up when nothing moves any more."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from dispatcher.backends.base import Backend, OnProgress, PullProgress
from dispatcher.dispatch.pull_line import Pull
from dispatcher.errors import BackendError, ImagePullFailed

#: How many times the stall timeout a pull may stand still that may be waiting for others.
QUEUED_TIMES = 10
#: Looks in one stall timeout at such a pull.
LOOKS = 4


class Stalled(ImagePullFailed):
    """The pull made no progress: to try again at once has cost enough time already."""


async def pulled_unless_stalled(
    backend: Backend,
    pull: Pull,
    on_progress: OnProgress,
    *,
    stall_timeout: float,
    others: Callable[[], list[Pull]],
) -> bool:
    """Pull; give up when nothing has moved for ``stall_timeout`` seconds.

    An engine downloads few layers at a time, whatever pulls they are of. So a pull that stands still
    between two layers may be waiting for those of ``others``, the pulls under way: as long as one of
    them moves it is not given up, for up to QUEUED_TIMES the timeout.

    Returns what ``prepare`` does. Raises Stalled, and what the backend's ``prepare`` raises.
    """
    stalled = False
    failure: BackendError | None = None
    new = False
    pull.progress, pull.moved_at = PullProgress(pull.image), anyio.current_time()

    def moved(progress: PullProgress) -> None:
        """The backend tells how far it is; equal numbers mean a step they don't show."""
        pull.moved_at = anyio.current_time()
        on_progress(progress)
        pull.progress = progress

    def is_queued(still: float) -> bool:
        between = pull.progress.bytes_done >= pull.progress.bytes_total
        since = anyio.current_time() - stall_timeout
        moving = any(other is not pull and other.moved_at > since for other in others())
        return between and moving and still < QUEUED_TIMES * stall_timeout

    async def watch() -> None:
        nonlocal stalled
        while not stalled:
            still = anyio.current_time() - pull.moved_at
            if still < stall_timeout:
                await anyio.sleep(stall_timeout - still)
            elif is_queued(still):
                await anyio.sleep(stall_timeout / LOOKS)
            else:
                stalled = True
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, name=f"watch pull {pull.image}")
        try:
            new = await backend.prepare(pull.image, moved)
        except BackendError as error:
            failure = error
        group.cancel_scope.cancel()
    if stalled:
        raise Stalled(f"pull of {pull.image} made no progress for {stall_timeout:g} s")
    if failure is not None:
        raise failure
    return new
