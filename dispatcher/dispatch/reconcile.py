"""Containers that nobody cares for any more: found, stopped, removed; or reported.

The rule is that whoever records an attempt's end removes its container. What that leaves
behind (a removal that failed, an engine that was away, an instance that died between the two)
is cleared up here, by every instance for the daemon it uses. All of it may be done twice: what
another has removed is gone, and that is what was wanted.

Nothing is done to a container of the attempt its task is at, of a task held here that Redis
knows nothing of, or of another namespace; nothing before it has been seen to be left over for
the whole grace; nothing while the daemon or Redis does not answer. What runs and has no task
is not ours to judge: its record may have been deleted by mistake, and its work is not. It is
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import uniform

import anyio
import structlog

from dispatcher.backends.base import Backend
from dispatcher.errors import BackendError, BackendUnreachable, QueueError
from dispatcher.model import Handle, Phase
from dispatcher.queue.exchange import Standing
from dispatcher.queue.store import Store
from dispatcher.retry import RetryPause

log = structlog.get_logger(__name__)

#: Seconds between looks: a look lists the daemon's containers and asks Redis once.
RECONCILE_SECONDS = 30.0
#: Seconds before the first look is repeated that failed.
FIRST_PAUSE = 1.0
#: Containers being stopped or removed at the same time: launches need the daemon as well.
ACTIONS = 4
#: Seconds a container that nobody waits for has between SIGTERM and SIGKILL: a task's default.
STOP_GRACE = 10.0
#: Seconds for a stop and a removal together; what takes longer is tried again at a later look.
ACTION_TIMEOUT = 60.0


class Reconciler:
    """Brings what is on the daemon into line with what Redis knows, again and again."""

    def __init__(
        self,
        backend: Backend,
        store: Store,
        *,
        namespace: str,
        grace: float,
        held: Callable[[], Collection[str]],
        interval: float = RECONCILE_SECONDS,
    ) -> None:
        """``grace``: seconds a container must have been left over; ``held`` tells the ids of the
        tasks in this instance's hands; ``interval``: seconds between looks."""
        self._backend = backend
        self._store = store
        self._namespace = namespace
        self._grace = grace
        self._held = held
        self._interval = interval
        self._woken = anyio.Event()
        self._actions = anyio.Semaphore(ACTIONS)
        #: Since when, on the loop's clock, each container has been seen to be left over.
        self._left_since: dict[str, float] = {}
        #: Containers that run and have no task.
        self._unknown: set[str] = set()

    @property
    def leaked(self) -> int:
        """Running containers of this namespace that no task is known for, at the last look."""
        return len(self._unknown)

    def wake(self) -> None:
        """Look now: the daemon was away and is back."""
        self._woken.set()

    async def run(self) -> None:
        """Reconcile until cancelled, whatever Redis and the daemon do meanwhile."""
        retry = RetryPause(min(FIRST_PAUSE, self._interval), self._interval)
        while True:
            try:
                pause = await self.look()
            except (BackendError, QueueError) as error:
                log.info("reconcile.put_off", error=str(error))
            except Exception:
                log.exception("reconcile.failed")
            else:
                retry.reset()
                await self._sleep(pause)
                continue
            # What happened meanwhile nobody saw: each grace begins anew.
            self._left_since.clear()
            await retry.wait()

    async def look(self) -> float:
        """Act on what has been left over for the grace; returns the seconds until the next look.

        Raises BackendError, QueueError: then nothing was done.
        """
        health = await self._backend.probe()
        if not health.ok:
            raise BackendUnreachable(health.detail)
        handles = await self._backend.find(self._namespace)
        standings = await self._store.standing([(handle.task_id, handle.attempt) for handle in handles])
        # Only now: what was taken while we asked is held by the time the answers are here.
        held = set(self._held())
        seen = [
            (handle, standing)
            for handle, standing in zip(handles, standings, strict=True)
            if handle.namespace == self._namespace and (standing == "stale" or handle.task_id not in held)
        ]
        self._report([handle for handle, standing in seen if _is_unknown(handle, standing)])
        left = [handle for handle, standing in seen if _is_left_over(handle, standing)]
        now = anyio.current_time()
        self._left_since = {h.container_id: self._left_since.get(h.container_id, now) for h in left}
        ripe = [h for h in left if now - self._left_since[h.container_id] >= self._grace]
        async with anyio.create_task_group() as actions:
            for handle in ripe:
                actions.start_soon(self._clear_up, handle, name=f"clear up {handle.name}")
        waits = [self._grace - (now - since) for since in self._left_since.values()]
        # What is ripe already has had its turn, and gets another at the usual time.
        return min([self._interval, *(wait for wait in waits if wait > 0)])

    async def _sleep(self, seconds: float) -> None:
        # Of instances that begin together each looks at a moment of its own. Never early: a
        # grace would not be over.
        with anyio.move_on_after(uniform(seconds, 1.25 * seconds)):  # noqa: S311 - jitter, not a secret
            await self._woken.wait()
        self._woken = anyio.Event()

    def _report(self, unknown: list[Handle]) -> None:
        for handle in unknown:
            if handle.container_id not in self._unknown:
                log.warning("container.unknown", **_fields(handle))
        self._unknown = {handle.container_id for handle in unknown}

    async def _clear_up(self, handle: Handle) -> None:
        """Stop and remove one; whatever keeps it from that is tried again at a later look."""
        try:
            async with self._actions:
                with anyio.fail_after(ACTION_TIMEOUT):
                    if not await self._is_left_over(handle):
                        return
                    log.info("container.clearing_up", phase=handle.phase, **_fields(handle))
                    if handle.phase is Phase.RUNNING:
                        await self._backend.stop(handle, STOP_GRACE)
                        if not await self._is_left_over(handle):
                            return
                    # Without force: one that was created is refused once its creator has started it.
                    await self._backend.remove(handle)
        except (BackendError, QueueError, TimeoutError) as error:
            log.warning("container.not_cleared_up", error=str(error), **_fields(handle))
        except Exception:
            log.exception("container.not_cleared_up", **_fields(handle))

    async def _is_left_over(self, handle: Handle) -> bool:
        """Ask again, right before an act: the look may be a minute old by then."""
        [standing] = await self._store.standing([(handle.task_id, handle.attempt)])
        return standing == "stale" or (_is_left_over(handle, standing) and handle.task_id not in self._held())


def _is_left_over(handle: Handle, standing: Standing) -> bool:
    """Whether nobody will ever ask for this container again."""
    return standing == "stale" or (standing == "unknown" and handle.phase is not Phase.RUNNING)


def _is_unknown(handle: Handle, standing: Standing) -> bool:
    return standing == "unknown" and handle.phase is Phase.RUNNING


def _fields(handle: Handle) -> dict[str, object]:
    return {
        "container_id": handle.container_id,
        "container": handle.name,
        "task_id": handle.task_id,
        "attempt": handle.attempt,
    }
