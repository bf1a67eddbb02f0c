"""One dispatcher instance in this process: from the first word with Redis to the drain."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial

import anyio
import structlog

from dispatcher.backends.base import Backend
from dispatcher.cli.exits import DONE, leaves
from dispatcher.errors import BackendUnreachable, QueueUnavailable
from dispatcher.retry import RetryPause
from dispatcher.service import Dispatcher
from dispatcher.settings import Settings

log = structlog.get_logger(__name__)

#: Seconds before Redis and the backend are asked again; jittered, doubling up to the last.
FIRST_PAUSE = 0.5
LAST_PAUSE = 10.0


class Instance:
    """Starts a dispatcher as soon as what it needs is there, and ends it when told to."""

    def __init__(self, settings: Settings, new_backend: Callable[[], Backend]) -> None:
        """``new_backend`` is asked for one at each try."""
        self._settings = settings
        self._new_backend = new_backend
        self._dispatcher = Dispatcher(settings, new_backend())
        self._waits_for = "starting"
        self._started = False
        self._stopping = anyio.Event()
        self._scope = anyio.CancelScope()
        self._signals: list[int] = []

    def ready(self) -> Mapping[str, str]:
        """See ``Dispatcher.ready``."""
        return self._dispatcher.ready if self._started else {"instance": self._waits_for}

    def metrics(self) -> bytes:
        """Prometheus' text."""
        return self._dispatcher.telemetry.exposition()

    def stop(self, signum: int) -> None:
        """Drain; at a second signal leave behind what still runs; at a third end at once."""
        self._signals.append(signum)
        self._stopping.set()
        if self._started:
            self._dispatcher.drain()
        if len(self._signals) > 2 or not self._started:
            self._scope.cancel()

    @property
    def exit_code(self) -> int:
        """0 after a drain, as an orchestrator expects of what it told to end; else the signal's."""
        return DONE if len(self._signals) < 2 else 128 + self._signals[-1]

    async def run(self, on_started: Callable[[], None]) -> None:
        """Until drained; ``on_started`` is called when the first task can be taken.

        Waits for Redis and the backend, however long; each cause is told once.
        """
        pause, told = RetryPause(FIRST_PAUSE, LAST_PAUSE), ""
        with self._scope:
            while not self._stopping.is_set():
                try:
                    await self._life(on_started)
                    return
                except (ExceptionGroup, QueueUnavailable, BackendUnreachable) as error:
                    cause = next(leaves(error))
                    if self._started or not isinstance(cause, QueueUnavailable | BackendUnreachable):
                        raise
                    self._waits_for = str(cause)
                    if self._waits_for != told:
                        told = self._waits_for
                        pause.reset()
                        log.warning("instance.waits", cause=told)
                await pause.wait()
                self._dispatcher = Dispatcher(self._settings, self._new_backend())

    async def _life(self, on_started: Callable[[], None]) -> None:
        async with anyio.create_task_group() as group:
            await group.start(self._dispatcher.run, name="dispatcher")
            self._started = True
            on_started()


async def attend(
    instance: Instance,
    *,
    health: tuple[str, int] | None = None,
    on_started: Callable[[], None] = lambda: None,
    on_signal: Callable[[int], None] = lambda _: None,
) -> int:
    """Run ``instance`` until signals have ended it; what to exit with.

    ``health``: host and port of its health endpoints. ``on_signal`` is told which one it is,
    from 1. Raises ConfigurationError if that port can't be had.
    """
    count = 0

    async def heed_signals() -> None:
        nonlocal count
        async for signum in signals:
            count += 1
            log.info("instance.signalled", signal=signal.Signals(signum).name)
            on_signal(count)
            instance.stop(signum)

    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as parts:
            parts.start_soon(heed_signals, name="signals")
            if health is not None:
                from dispatcher.api.health import health_app, serve

                app = health_app(instance.ready, instance.metrics)
                await parts.start(partial(serve, app, host=health[0], port=health[1]), name="health")
            await instance.run(on_started)
            parts.cancel_scope.cancel()
    return instance.exit_code
