"""Composition root: builds the parts of one dispatcher instance, runs them, drains them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

import anyio
import structlog
from anyio.abc import TaskStatus

from dispatcher.backends.base import Backend
from dispatcher.dispatch.admission import Admission
from dispatcher.dispatch.image_disk import ImageDisk
from dispatcher.dispatch.images import ImageGovernor
from dispatcher.dispatch.intake import Intake
from dispatcher.dispatch.logs import Logs
from dispatcher.dispatch.look_ahead import LookAhead
from dispatcher.dispatch.pipeline import Pipeline
from dispatcher.dispatch.reconcile import RECONCILE_SECONDS, Reconciler
from dispatcher.dispatch.slots import Slots
from dispatcher.errors import BackendUnreachable, Evicted, QueueError
from dispatcher.model import Health
from dispatcher.policy import Policy
from dispatcher.presence import Presence
from dispatcher.queue.events import Events
from dispatcher.queue.exchange import Limits
from dispatcher.queue.images import ImageLedger
from dispatcher.queue.leases import LeaseKeeper, Wish
from dispatcher.queue.list import ListSource
from dispatcher.queue.recovery import Recovery
from dispatcher.queue.safety import warn_of_unsafe_settings
from dispatcher.queue.source import Source
from dispatcher.queue.store import Store
from dispatcher.queue.stream import StreamSource
from dispatcher.queue.tails import Tails
from dispatcher.queue.views import Views
from dispatcher.settings import Settings
from dispatcher.telemetry import Telemetry

log = structlog.get_logger(__name__)

#: Seconds between looks at the backend's health and the queues' depth.
WATCH_SECONDS = 5.0
#: Seconds for the last words with Redis.
CLOSE_TIMEOUT = 15.0
SOURCES: dict[str, type[Source]] = {"redis-stream": StreamSource, "redis-list": ListSource}


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
        self.events = Events(settings.state_redis, settings.queue_stream_name, instance=settings.instance_id)
        self.views = Views(self.store)
        self.slots = Slots(settings.num_consumers, settings.queues)
        self.keeper = LeaseKeeper(self.store, settings.lease_seconds)
        self.ledger = ImageLedger(self.store)
        self.image_disk = ImageDisk(
            backend,
            self.ledger,
            daemon=lambda: self.health.daemon,
            high=settings.image_disk_high,
            low=settings.image_disk_goal,
            in_use=lambda: [pull.image for pull in self.images.pulls],
            on_removed=self._image_removed,
            on_event=self.events.publish,
        )
        self.images = ImageGovernor(
            backend,
            max_concurrent=settings.max_concurrent_pulls,
            max_per_registry=settings.max_concurrent_pulls_per_registry or settings.max_concurrent_pulls,
            max_waiting=settings.max_waiting_pulls,
            stall_timeout=settings.pull_stall_timeout,
            on_pulled=self.image_disk.pulled,
            on_used=self.image_disk.used,
            on_event=self._image_event,
            on_ended=lambda seconds, outcome: self.telemetry.image_pull.record(seconds, {"outcome": outcome}),
            on_bytes=self.telemetry.image_bytes.add,
        )
        self.logs = Logs(backend, self.tails, tail_bytes=settings.log_tail_bytes)
        self.presence = Presence(
            settings,
            backend.name,
            slots=self.slots,
            keeper=self.keeper,
            images=self.images,
            telemetry=self.telemetry,
        )
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
                max_deliveries=settings.max_deliveries,
                infra_max_attempts=settings.infra_max_attempts,
                lost_after=settings.lost_after,
            ),
            source=settings.queue_source,
            queues=settings.queues,
            # One that does not answer is as good as one without an instance.
            daemon=lambda: self.health.daemon if self.health.ok else "",
            info=self.presence.document,
            on_promoted=self._look_now,
            on_evicted=self._evict,
        )
        self.health = Health(ok=False)
        self._started = False
        self._healthy = anyio.Event()
        #: Since when, on the loop's clock, the backend has not answered.
        self._away_since: float | None = None
        self._draining = False
        self._evicted: Evicted | None = None

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
                await warn_of_unsafe_settings(self.store.redis)
                self._build(namespace)
                parts.start_soon(self.events.run, name="events")
                await parts.start(self.images.run, name="images")
                await parts.start(self.logs.run, name="logs")
                parts.start_soon(self.keeper.run, name="leases")
                parts.start_soon(self.recovery.run, name="recovery")
                parts.start_soon(self.source.listen, name="doorbell")
                parts.start_soon(self._watch, name="watch")
                if self.settings.look_ahead and self.backend.capabilities.pulls:
                    parts.start_soon(self.look_ahead.run, name="look ahead")
                if self.backend.capabilities.pulls:
                    parts.start_soon(self.image_disk.run, name="image disk")
                parts.start_soon(self.reconciler.run, name="reconcile")
                self._started = True
                self._move_on(Lifecycle.RUNNING)
                task_status.started()
                log.info("instance.started", instance=self.settings.instance_id, namespace=namespace,
                         backend=self.backend.name, daemon=self.health.daemon)  # fmt: skip
                if self._draining:
                    self.intake.drain()
                await self.intake.run()
                parts.cancel_scope.cancel()
            if self._evicted is not None:
                raise self._evicted
        finally:
            self._move_on(Lifecycle.STOPPED)
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_TIMEOUT):
                await self._close()

    def _image_removed(self, image: str) -> None:
        self.telemetry.images_removed.add(1)
        self.images.forget(image)

    def _look_now(self) -> None:
        self.source.ring()

    def _evict(self, why: Evicted) -> None:
        if self._evicted is None:
            log.error("instance.evicted", instance=self.settings.instance_id, why=str(why))
            self._evicted = why
            self.drain()

    def _move_on(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle
        self.presence.lifecycle = str(lifecycle)

    def drain(self) -> None:
        """Take nothing new; let running tasks end, within DRAIN_TIMEOUT. A second call forces."""
        self._move_on(Lifecycle.DRAINING)
        if self._started:
            self.intake.drain()
        self._draining = True

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
        self.source = SOURCES[settings.queue_source](
            self.store,
            settings.queue_redis,
            instance=settings.instance_id,
            incarnation=self._incarnation,
            lease_seconds=settings.lease_seconds,
            queues=settings.queues,
            daemon=self.health.daemon,
            on_control=self._control,
        )
        pipeline = Pipeline(
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
            infra_max_attempts=settings.infra_max_attempts,
            answers=self._backend_answers,
        )
        self.presence.start_limit = lambda: pipeline.start_limit
        self.intake = Intake(
            self.source,
            self.slots,
            self.keeper,
            run=pipeline.run,
            may_take=self._until_healthy,
            can_take=self._is_healthy,
            drain_mode=settings.drain_mode,
            drain_timeout=settings.drain_timeout,
        )
        self.look_ahead = LookAhead(
            self.images,
            self.ledger,
            policy,
            queues=settings.queues,
            limit=settings.look_ahead,
            is_wanted=lambda: self.lifecycle is Lifecycle.RUNNING and self.slots.free <= 0,
        )
        self.reconciler = Reconciler(
            self.backend,
            self.store,
            namespace=namespace,
            grace=settings.reconcile_grace,
            held=lambda: self.keeper.held,
            interval=min(RECONCILE_SECONDS, settings.reconcile_grace / 2),
        )

    async def _close(self) -> None:
        if self._started:
            try:
                await self.recovery.leave()
            except QueueError as error:
                log.warning("instance.left_without_word", error=str(error))
        await self.store.aclose()
        await self.tails.aclose()
        await self.events.aclose()
        self.telemetry.shutdown()
        if self._started:
            log.info("instance.stopped", instance=self.settings.instance_id)

    def _image_event(self, kind: str, fields: Mapping[str, str | int | float]) -> None:
        """What the governor tells of its pulls."""
        self.events.publish(kind, fields)
        if kind == "image.pull_started" and int(fields["tries"]) > 1:
            self.telemetry.image_retries.add(1)
        elif kind == "images.no_room":
            self.image_disk.wake()

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
            self.presence.leaked = self.reconciler.leaked
            if self._away_since is not None:
                self._let_go_after(anyio.current_time() - self._away_since)

    def _let_go_after(self, away: float) -> None:
        """Give back what a backend holds that has not answered for ``away`` seconds, when that is as
        long as the operator waits for a daemon: nobody sees these containers."""
        if away >= self.settings.lost_after and self.keeper.held:
            log.error("backend.given_up", held=len(self.keeper.held), seconds=round(away))
            for lease in list(self.keeper.held.values()):
                lease.request(Wish.DETACH)

    def _is_healthy(self) -> bool:
        return self._healthy.is_set()

    async def _until_healthy(self) -> None:
        await self._healthy.wait()

    async def _backend_answers(self) -> bool:
        health = await self.backend.probe()
        if self._started and health.ok != self.health.ok:
            log.warning("backend.health_changed", ok=health.ok, detail=health.detail)
        if health.ok:
            self._healthy.set()
            if self._started and self._away_since is not None:
                self.reconciler.wake()
            self._away_since = None
        elif self._healthy.is_set():
            self._healthy = anyio.Event()
            self._away_since = anyio.current_time()
        # Which daemon it was is known also while it is away.
        self.health = health if health.ok else replace(health, daemon=self.health.daemon)
        self.presence.health = self.health
        return health.ok

    async def _look(self) -> None:
        """Ask the backend for its health and Redis for the queues' depth."""
        await self._backend_answers()
        try:
            self.presence.queues = await self.views.queues()
        except QueueError as error:
            log.warning("queues.not_read", error=str(error))
