"""Composition root: builds the parts of one dispatcher instance, runs them, drains them."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from enum import StrEnum

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from dispatcher import __version__, failpoints
from dispatcher.backends.base import Backend
from dispatcher.dispatch.admission import Admission
from dispatcher.dispatch.images import ImageGovernor
from dispatcher.dispatch.logs import Logs
from dispatcher.dispatch.pipeline import Pipeline
from dispatcher.dispatch.slots import Slots
from dispatcher.errors import BackendUnreachable, Evicted, QueueError
from dispatcher.model import Delivery, Health, State
from dispatcher.policy import Policy
from dispatcher.queue.exchange import Limits
from dispatcher.queue.leases import LeaseKeeper, Wish
from dispatcher.queue.recovery import Recovery
from dispatcher.queue.store import Store
from dispatcher.queue.stream import StreamSource
from dispatcher.queue.tails import Tails
from dispatcher.queue.views import QueueInfo, Views
from dispatcher.settings import Settings
from dispatcher.telemetry import Reading, Telemetry

log = structlog.get_logger(__name__)

#: Seconds between looks at the backend's health and the queues' depth.
WATCH_SECONDS = 5.0
#: Seconds that deliveries have to let go once they were told to.
DETACH_TIMEOUT = 15.0
#: Seconds before Redis is asked again for tasks after it could not be reached.
TAKE_PAUSE = 1.0


class Lifecycle(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    STOPPED = "stopped"


class Dispatcher:
    """One instance. ``run`` is its life; ``drain`` asks for its end."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend
        self._incarnation = secrets.token_hex(4)
        self.lifecycle = Lifecycle.STARTING
        self.telemetry = Telemetry()
        self.store = Store(
            settings.queue_redis,
            settings.queue_stream_name,
            group=settings.queue_consumer_group,
        )
        self.tails = Tails(
            settings.state_redis,
            settings.queue_stream_name,
            retention=settings.task_retention,
            total_limit=settings.log_tail_total_bytes,
        )
        self.views = Views(self.store)
        self.slots = Slots(settings.num_consumers)
        self.keeper = LeaseKeeper(self.store, settings.lease_seconds)
        self.images = ImageGovernor(
            backend,
            max_concurrent=settings.max_concurrent_pulls,
            stall_timeout=settings.pull_stall_timeout,
            on_pulled=lambda seconds, outcome: self.telemetry.image_pull.record(
                seconds, {"outcome": outcome}
            ),
        )
        self.logs = Logs(backend, self.tails, tail_bytes=settings.log_tail_bytes)
        self.recovery = Recovery(
            self.store,
            instance=settings.instance_id,
            incarnation=self._incarnation,
            lease_seconds=settings.lease_seconds,
            limits=Limits(
                retention=settings.task_retention,
                results_length=settings.results_max_length,
                max_length=settings.queue_max_length,
                max_bytes=settings.task_max_bytes,
            ),
            queues=settings.queues,
            info=self._info,
            on_promoted=self._look_now,
            on_evicted=self._evict,
        )
        self.health = Health(ok=False)
        self._born = time.time()
        self._started = False
        self._healthy = anyio.Event()
        self._draining = anyio.Event()
        self._forced = anyio.Event()
        self._evicted: Evicted | None = None
        self._depths: list[QueueInfo] = []
        self._gauges()

    # --- life ---------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Join, take and run tasks until drained.

        ``task_status`` is started when the first task can be taken. Raises QueueUnavailable
        or BackendUnreachable if Redis or the backend is not there at first, ConfigurationError
        if another instance has this one's name, and Evicted when it has drained because it must
        not go on.
        """
        try:
            await self.store.ping()
            async with anyio.create_task_group() as parts:
                await parts.start(self.backend.run, name="backend")
                await self._look()
                if not self.health.ok:
                    raise BackendUnreachable(self.health.detail)
                namespace = (await self.recovery.join()).namespace
                self._build(namespace)
                await parts.start(self.images.run, name="images")
                await parts.start(self.logs.run, name="logs")
                parts.start_soon(self.keeper.run, name="leases")
                parts.start_soon(self.recovery.run, name="recovery")
                parts.start_soon(self.source.listen, name="doorbell")
                parts.start_soon(self._watch, name="watch")
                self._started = True
                self.lifecycle = Lifecycle.RUNNING
                task_status.started()
                log.info("instance.started", instance=self.settings.instance_id, namespace=namespace,
                         backend=self.backend.name, daemon=self.health.daemon)  # fmt: skip
                await self._consume()
                parts.cancel_scope.cancel()
            if self._evicted is not None:
                raise self._evicted
        finally:
            self.lifecycle = Lifecycle.STOPPED
            with anyio.CancelScope(shield=True), anyio.move_on_after(DETACH_TIMEOUT):
                await self._close()

    def _look_now(self) -> None:
        self.source.ring()

    def _evict(self, why: Evicted) -> None:
        if self._evicted is None:
            log.error("instance.evicted", instance=self.settings.instance_id, why=str(why))
            self._evicted = why
            self.drain()

    def drain(self) -> None:
        """Take nothing new; let running tasks end, within DRAIN_TIMEOUT. A second call forces."""
        if self._draining.is_set():
            self._forced.set()
        self.lifecycle = Lifecycle.DRAINING
        self._draining.set()

    @property
    def ready(self) -> dict[str, str]:
        """What keeps this instance from taking work, by part; empty if nothing does."""
        problems = {}
        if self.lifecycle is not Lifecycle.RUNNING:
            problems["instance"] = str(self.lifecycle)
        if not self.recovery.healthy:
            problems["redis"] = "does not answer"
        if not self.health.ok:
            problems["backend"] = self.health.detail or "does not answer"
        return problems

    def _build(self, namespace: str) -> None:
        settings = self.settings
        policy = Policy.of(settings)
        self.source = StreamSource(
            self.store,
            settings.queue_redis,
            instance=settings.instance_id,
            incarnation=self._incarnation,
            lease_seconds=settings.lease_seconds,
            queues=settings.queues,
            daemon=self.health.daemon,
            on_control=self._control,
        )
        self._pipeline = Pipeline(
            backend=self.backend,
            daemon=self.health.daemon,
            namespace=namespace,
            instance=settings.instance_id,
            keeper=self.keeper,
            slots=self.slots,
            admission=Admission(self.store, self.keeper, policy, max_bytes=settings.task_max_bytes),
            images=self.images,
            logs=self.logs,
            policy=policy,
            telemetry=self.telemetry,
            max_waiting_pulls=settings.max_waiting_pulls,
            infra_max_attempts=settings.infra_max_attempts,
            answers=self._backend_answers,
        )

    async def _close(self) -> None:
        if self._started:
            try:
                await self.recovery.leave()
            except QueueError as error:
                log.warning("instance.left_without_word", error=str(error))
        await self.store.aclose()
        await self.tails.aclose()
        self.telemetry.shutdown()
        if self._started:
            log.info("instance.stopped", instance=self.settings.instance_id)

    # --- work ---------------------------------------------------------------------------

    async def _consume(self) -> None:
        """Take tasks whenever consumers are free, until draining; then see the rest to their end."""
        async with anyio.create_task_group() as deliveries:
            reader = anyio.CancelScope()
            deliveries.start_soon(self._end_reader, reader, name="drain")
            with reader:
                await self._read(deliveries)
            await self._see_off(deliveries)

    async def _end_reader(self, reader: anyio.CancelScope) -> None:
        await self._draining.wait()
        reader.cancel()

    async def _read(self, deliveries: TaskGroup) -> None:
        while True:
            # What can't be run here is left to others.
            await self._healthy.wait()
            reserved = await self.slots.reserve()
            taken: list[Delivery] = []
            pause = 0.0
            try:
                # Between the taking and the running of a task nothing may come.
                with anyio.CancelScope(shield=True):
                    failpoints.reach("before_take")
                    taken = await self.source.take(reserved)
                    for delivery in taken:
                        failpoints.reach("after_take", delivery.task_id)
                        # Held from here on: a drain that begins now must see it.
                        lease = self.keeper.hold(delivery)
                        name = f"task {delivery.task_id}"
                        deliveries.start_soon(self._pipeline.run, delivery, lease, name=name)
            except QueueError as error:
                log.debug("tasks.not_taken", error=str(error))
                pause = TAKE_PAUSE
            finally:
                self.slots.settle(len(taken))
            if pause:
                await anyio.sleep(pause)
            if not taken:
                await self.source.wait()

    async def _see_off(self, deliveries: TaskGroup) -> None:
        """Give back what has not begun, wait for what runs, leave what does not end."""
        held = self.keeper.held
        log.info("instance.draining", held=len(held), timeout=self.settings.drain_timeout)
        for lease in list(held.values()):
            if lease.state in {State.QUEUED, State.PULLING}:
                lease.request(Wish.DETACH)
        with anyio.move_on_after(self.settings.drain_timeout):
            await self._until_forced_or(self.keeper.until_empty)
        for lease in list(held.values()):
            lease.request(Wish.DETACH)
        with anyio.move_on_after(DETACH_TIMEOUT) as patience:
            await self.keeper.until_empty()
        # Otherwise what is left to do, such as removing a container that has ended, is done.
        if patience.cancelled_caught:
            deliveries.cancel_scope.cancel()

    async def _until_forced_or(self, done: Callable[[], Awaitable[None]]) -> None:
        async def force() -> None:
            await self._forced.wait()
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(force, name="force")
            await done()
            group.cancel_scope.cancel()

    def _control(self, operation: str, task_id: str, asked: str) -> None:
        """What another program asks of this instance."""
        if operation == "follow":
            self.logs.follow(task_id)
        elif operation == "tail":
            self.logs.tail(task_id, asked)
        elif operation == "cancel":
            lease = self.keeper.held.get(task_id)
            # The message may be older than this holding of the task, or than the task itself.
            if lease is not None and lease.owner == asked:
                lease.request(Wish.CANCEL)

    # --- looks --------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            await anyio.sleep(WATCH_SECONDS)
            await self._look()

    async def _backend_answers(self) -> bool:
        health = await self.backend.probe()
        if self._started and health.ok != self.health.ok:
            log.warning("backend.health_changed", ok=health.ok, detail=health.detail)
        if health.ok:
            self._healthy.set()
        elif self._healthy.is_set():
            self._healthy = anyio.Event()
        # Which daemon it was is known also while it is away.
        self.health = health if health.ok else replace(health, daemon=self.health.daemon)
        return health.ok

    async def _look(self) -> None:
        """Ask the backend for its health and Redis for the queues' depth."""
        await self._backend_answers()
        try:
            self._depths = await self.views.queues()
        except QueueError as error:
            log.warning("queues.not_read", error=str(error))

    def _info(self) -> str:
        pulls = [
            {
                "image": pull.image,
                "active": pull.active,
                "waiters": pull.waiters,
                "bytes_done": pull.progress.bytes_done,
                "bytes_total": pull.progress.bytes_total,
            }
            for pull in self.images.pulls
        ]
        return json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "version": __version__,
                "backend": self.backend.name,
                "daemon": self.health.daemon,
                "state": self.lifecycle,
                "consumers": self.slots.capacity,
                "busy": self.slots.used,
                "held": len(self.keeper.held),
                "waiting_for_images": self.images.waiting,
                "pulls": pulls,
                "queues": self.settings.queues,
                "started_at": self._born,
            }
        )

    def _gauges(self) -> None:
        gauge = self.telemetry.gauge

        def in_flight() -> Iterable[Reading]:
            states = [str(lease.state) for lease in self.keeper.held.values()]
            return [({"state": s}, states.count(s)) for s in ("queued", "pulling", "starting", "running")]

        gauge("dispatcher_tasks_in_flight", "Tasks in this instance's hands, by state.", in_flight)
        gauge("dispatcher_consumers", "Consumers of this instance.", lambda: [({}, self.slots.capacity)])
        gauge("dispatcher_consumers_busy", "Consumers that hold a task.", lambda: [({}, self.slots.used)])
        gauge(
            "dispatcher_queue_depth",
            "Tasks that wait, as this instance saw it last.",
            lambda: [({"queue": q.name}, q.depth) for q in self._depths],
        )
        gauge(
            "dispatcher_queue_oldest_seconds",
            "Age of the task that waits longest.",
            lambda: [({"queue": q.name}, q.oldest_seconds or 0.0) for q in self._depths],
        )
        gauge(
            "dispatcher_image_pulls_in_flight",
            "Image pulls under way.",
            lambda: [({}, sum(pull.active for pull in self.images.pulls))],
        )
        gauge(
            "dispatcher_image_pull_waiters",
            "Tasks that wait for an image.",
            lambda: [({}, self.images.waiting)],
        )
