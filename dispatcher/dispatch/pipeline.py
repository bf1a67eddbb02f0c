"""One delivery from top to bottom. Only this file knows the order.

    admission → images → backend.launch → backend.wait → outcome → lease.give_up

A delivery begins with a consumer's slot. While its image is pulled it holds none. Whatever
happens it ends by giving its lease up with a verdict, or by having lost it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio
import structlog

from dispatcher import failpoints
from dispatcher.backends.base import Backend
from dispatcher.dispatch.admission import Admission, Admitted, check_expiry
from dispatcher.dispatch.images import ImageGovernor
from dispatcher.dispatch.logs import Logs
from dispatcher.dispatch.outcome import (
    CANCEL,
    DRAIN,
    TIMEOUT,
    Verdict,
    judge,
    judge_error,
    judge_mistake,
    moved_on,
    of_exit,
)
from dispatcher.dispatch.slots import Slot, Slots
from dispatcher.dispatch.start_gate import StartGate
from dispatcher.errors import (
    BackendError,
    BackendUnreachable,
    ContainerGone,
    ExpiredTask,
    ImageNotFound,
    LeaseLost,
    QueueError,
    TaskRefused,
)
from dispatcher.model import Attempt, Delivery, Exit, Handle, Outcome, State
from dispatcher.policy import Policy
from dispatcher.queue.leases import Lease, LeaseKeeper, Wish
from dispatcher.telemetry import Telemetry, valid_traceparent

log = structlog.get_logger(__name__)

#: Seconds in which a task whose image has come must find a consumer, or it goes to others.
CONSUMER_WAIT = 1.0
#: Seconds a removal of an ended container may take before it is left to a later clean-up.
REMOVE_TIMEOUT = 30.0

_NOTHING = Outcome(State.QUEUED)
_CAUSES = {Wish.CANCEL: CANCEL, Wish.STOP: DRAIN}
_CANCELLED = Verdict("final", Outcome(State.CANCELLED, message="cancelled before it started"))


class GaveUp(Exception):
    """Inside the pipeline: the delivery ends here with this verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(verdict.action)


class NotStarted(QueueError):
    """Inside the pipeline: Redis did not answer, and the container created was not started."""


def _refused(refusal: TaskRefused) -> Verdict:
    return Verdict("final", Outcome(State.FAILED, refusal.reason, str(refusal)))


class Pipeline:
    """Runs deliveries."""

    def __init__(
        self,
        *,
        backend: Backend,
        daemon: str,
        namespace: str,
        instance: str,
        keeper: LeaseKeeper,
        slots: Slots,
        admission: Admission,
        images: ImageGovernor,
        logs: Logs,
        policy: Policy,
        telemetry: Telemetry,
        infra_max_attempts: int,
        answers: Callable[[], Awaitable[bool]],
    ) -> None:
        self._backend = backend
        self._daemon = daemon
        self._namespace = namespace
        self._instance = instance
        self._keeper = keeper
        self._slots = slots
        self._admission = admission
        self._images = images
        self._logs = logs
        self._policy = policy
        self._telemetry = telemetry
        self._infra_max_attempts = infra_max_attempts
        self._answers = answers
        self._gate = StartGate()

    @property
    def start_limit(self) -> int:
        """How many containers are started at the same time at most, as of now."""
        return self._gate.limit

    async def run(self, delivery: Delivery, lease: Lease) -> None:
        """Bring one delivery to its end. The caller has reserved a slot for it and holds its lease.

        Raises nothing but cancellation: what goes wrong becomes the task's verdict.
        """
        slot = Slot(self._slots, delivery.queue)
        if delivery.attempt == 1:
            waited = max(0.0, time.time() - delivery.accepted_ms / 1000)
            self._telemetry.queue_wait.record(waited, {"queue": delivery.queue})
        try:
            with lease.scope:
                verdict = await self._guarded(delivery, lease, slot)
                if verdict is not None:
                    await self._give_up(delivery, lease, verdict)
        except LeaseLost:
            log.warning("task.lost_to_another", task_id=lease.task_id, attempt=delivery.attempt)
        except Exception:
            # It could not even be given up: the lease lapses, and whoever takes it over goes on.
            log.exception("task.left_to_its_lease", task_id=lease.task_id, attempt=delivery.attempt)
        finally:
            self._keeper.forget(lease)
            if lease.task_id not in self._keeper.held:  # else it has come back to us meanwhile
                self._logs.ended(lease.task_id)
            slot.release()

    async def _guarded(self, delivery: Delivery, lease: Lease, slot: Slot) -> Verdict | None:
        """The journey; what becomes of the delivery if Redis or we ourselves break it off."""
        try:
            await self._journey(delivery, lease, slot)
            return None
        except LeaseLost:
            raise
        except QueueError as error:
            # Nothing is started without Redis' word. What was created is found by its name.
            log.warning("task.redis_away", task_id=lease.task_id, error=str(error))
            started = self._may_have_container(delivery, lease) and not isinstance(error, NotStarted)
            return Verdict("detach" if started else "release", _NOTHING)
        except Exception as error:
            log.exception("task.pipeline_failed", task_id=lease.task_id, attempt=delivery.attempt)
            return judge_mistake(error, delivery, infra_max_attempts=self._infra_max_attempts)

    @staticmethod
    def _may_have_container(delivery: Delivery, lease: Lease) -> bool:
        return bool(delivery.daemon) or lease.state in {State.STARTING, State.RUNNING}

    async def _journey(self, delivery: Delivery, lease: Lease, slot: Slot) -> None:
        handle: Handle | None = None
        try:
            admitted = await self._admission.admit(delivery, lease)
            if admitted is None:
                return
        except TaskRefused as refusal:
            await self._give_up(delivery, lease, _refused(refusal))
            return
        try:
            handle = await self._launched(delivery, lease, admitted, slot)
            outcome = await self._ended(delivery, lease, admitted, handle)
            failpoints.reach("after_exit", lease.task_id)
            await self._logs.collect(handle)
            verdict = judge(outcome, admitted.task, delivery, infra_max_attempts=self._infra_max_attempts)
        except GaveUp as gave_up:
            verdict = gave_up.verdict
        except TaskRefused as refusal:
            verdict = _refused(refusal)
        except BackendError as error:
            log.warning(
                "task.backend_error", task_id=lease.task_id, kind=type(error).__name__, error=str(error)
            )
            if isinstance(error, BackendUnreachable) and await self._answers():
                # It answers others: what it did not answer to is this task.
                error = BackendError(str(error))
            verdict = judge_error(
                error,
                admitted.task,
                delivery,
                infra_max_attempts=self._infra_max_attempts,
                container=self._may_have_container(delivery, lease),
            )
        await self._give_up(delivery, lease, verdict)
        if handle is not None and verdict.action in {"final", "retry"}:
            await self._remove(handle)

    # --- to a running container ---------------------------------------------------------

    async def _launched(self, delivery: Delivery, lease: Lease, admitted: Admitted, slot: Slot) -> Handle:
        """The attempt's container, running or ended; pulls its image if need be."""
        self._heed(lease, delivery)
        # A container that is there already needs no image, nor what a registry would say now.
        if not delivery.daemon:
            await self._image(lease, delivery, admitted, slot)
        try:
            return await self._launch(delivery, lease, admitted)
        except ImageNotFound:
            # It was there a moment ago, or for an earlier owner: somebody removed it.
            self._images.forget(str(admitted.task.reference))
            if not self._backend.capabilities.pulls or admitted.task.pull_policy == "never":
                raise
            delivery = replace(delivery, daemon="")  # so there is no container either
            self._heed(lease, delivery)
            await self._image(lease, delivery, admitted, slot)
            return await self._launch(delivery, lease, admitted)

    async def _image(self, lease: Lease, delivery: Delivery, admitted: Admitted, slot: Slot) -> None:
        task, attempt = admitted.task, f"{lease.task_id}.{delivery.attempt}"
        if not await self._images.needs_pull(task, attempt):
            return
        with self._images.place(task.reference.registry) as delay:
            if delay:
                raise GaveUp(Verdict("release", _NOTHING, delay))
            slot.release()
            await lease.mark(State.PULLING, {"image": str(task.reference)})
            failpoints.reach("during_pull", lease.task_id)
            patience = (
                None if task.expires_at is None else max(0.0, task.expires_at.timestamp() - time.time())
            )
            with lease.interruptible(), anyio.move_on_after(patience) as timer:
                await self._images.pull(task, lease.task_id, attempt)
        if timer.cancelled_caught:
            raise ExpiredTask("expires_at passed while its image was being pulled")
        check_expiry(task)
        self._heed(lease, delivery)
        if not await slot.regain(CONSUMER_WAIT):
            raise GaveUp(Verdict("release", _NOTHING, prefer=lease.wish is None))

    async def _launch(self, delivery: Delivery, lease: Lease, admitted: Admitted) -> Handle:
        attempt = self._attempt(delivery, lease, admitted)

        async def confirm(handle: Handle) -> None:
            failpoints.reach("after_create", lease.task_id)
            if delivery.container not in {"", handle.container_id, *handle.replaces}:
                # It may have run, and this attempt is started once.
                raise ContainerGone(f"container {delivery.container[:12]} was removed by somebody else")
            try:
                await lease.mark(State.STARTING, {"container": handle.container_id})
            except QueueError as error:
                raise error if handle.adopted else NotStarted(str(error)) from error
            if lease.wish is Wish.CANCEL and not handle.adopted:
                raise GaveUp(_CANCELLED)
            failpoints.reach("before_start", lease.task_id)

        async with self._gate.launching() as launch:
            self._heed(lease, delivery)
            await lease.mark(State.STARTING, {"daemon": self._daemon})
            began = time.monotonic()
            failpoints.reach("before_create", lease.task_id)
            handle = await self._backend.launch(attempt, confirm)
            if not handle.adopted:
                launch.started()
            failpoints.reach("after_start", lease.task_id)
        self._telemetry.launch.record(time.monotonic() - began, {"queue": delivery.queue})
        if handle.adopted:
            self._telemetry.adoptions.add(1)
            log.info("task.adopted", task_id=lease.task_id, attempt=delivery.attempt, phase=handle.phase)
        return handle

    def _heed(self, lease: Lease, delivery: Delivery) -> None:
        """End here if that is wished, as long as there is no container to care for."""
        if lease.wish is Wish.CANCEL and not delivery.daemon:
            raise GaveUp(_CANCELLED)
        if lease.wish in {Wish.STOP, Wish.DETACH} and not delivery.daemon:
            raise GaveUp(Verdict("release", _NOTHING))
        if lease.wish is Wish.DETACH:
            raise GaveUp(Verdict("detach", _NOTHING))

    def _attempt(self, delivery: Delivery, lease: Lease, admitted: Admitted) -> Attempt:
        task, grant = admitted.task, admitted.grant
        env = {
            **task.env,
            "DISPATCHER_TASK_ID": lease.task_id,
            "DISPATCHER_ATTEMPT": str(delivery.attempt),
            "DISPATCHER_FENCE": str(delivery.fence),
        }
        if traceparent := valid_traceparent(delivery.traceparent):
            env["TRACEPARENT"] = traceparent
        return Attempt(
            namespace=self._namespace,
            task_id=lease.task_id,
            number=delivery.attempt,
            fence=delivery.fence,
            instance=self._instance,
            image=task.image,
            entrypoint=None if task.entrypoint is None else tuple(task.entrypoint),
            command=None if task.command is None else tuple(task.command),
            env=env,
            workdir=task.workdir,
            user=task.user,
            cpus=grant.cpus,
            memory=grant.memory,
            pids=grant.pids,
            network=grant.network,
            labels=dict(task.labels),
            security_profile=self._policy.security_profile,
        )

    # --- from there to its end ----------------------------------------------------------

    async def _ended(self, delivery: Delivery, lease: Lease, admitted: Admitted, handle: Handle) -> Outcome:
        """Wait for the container's end, or bring it about when time or patience is over."""
        self._logs.running(handle)
        started = time.time() if handle.started_at is None else handle.started_at
        # One that was just started has run for no time by our own clock, whatever the engine's says.
        ran = max(0.0, time.time() - started) if handle.adopted else 0.0
        if delivery.ran is not None:
            # One of the clocks may have been set since then: nothing is ended by one alone.
            ran = min(ran, delivery.ran)
        deadline = anyio.current_time() + admitted.grant.timeout - ran
        await self._note(lease, {"started": str(round(started * 1000))})
        failpoints.reach("running", lease.task_id)
        cause, ended = delivery.cause, None
        if not cause:
            with lease.interruptible(), anyio.move_on_after(deadline - anyio.current_time()):
                ended = await self._backend.wait(handle)
        if ended is None:
            if not cause and lease.wish is Wish.DETACH:
                raise GaveUp(Verdict("detach", _NOTHING))
            cause = cause or (_CAUSES[lease.wish] if lease.wish else TIMEOUT)
            ended = await self._stopped(lease, handle, cause, admitted.task.grace_period)
        self._telemetry.run.record(max(0.0, ended.finished_at - ended.started_at), {"queue": delivery.queue})
        if cause == DRAIN and ended.exit_code != 0:
            raise GaveUp(moved_on(ended))
        return of_exit(ended, cause, admitted.grant.timeout)

    async def _stopped(self, lease: Lease, handle: Handle, cause: str, grace: float) -> Exit:
        """Bring the container's end about. Whoever adopts it in the middle of that goes on with it."""
        # The cause is recorded before the signal: whoever collects the exit must know it.
        await self._note(lease, {"cause": cause})
        log.info("task.stopping", task_id=lease.task_id, cause=cause)
        failpoints.reach("before_stop", lease.task_id)
        with lease.interruptible(Wish.DETACH):
            await self._backend.stop(handle, grace)
            return await self._backend.wait(handle)
        raise GaveUp(Verdict("detach", _NOTHING))

    @staticmethod
    async def _note(lease: Lease, fields: dict[str, str]) -> None:
        """Record something of a container that runs; Redis' absence is no reason to leave it."""
        try:
            await lease.mark(State.RUNNING, fields)
        except QueueError as error:
            log.warning(
                "task.note_not_recorded", task_id=lease.task_id, fields=sorted(fields), error=str(error)
            )

    async def _give_up(self, delivery: Delivery, lease: Lease, verdict: Verdict) -> None:
        failpoints.reach("before_finish", lease.task_id)
        prefer = self._daemon if verdict.prefer else ""
        await lease.give_up(
            verdict.action, verdict.outcome, delay=verdict.delay, budget=verdict.budget, prefer=prefer
        )
        failpoints.reach("after_finish", lease.task_id)
        outcome = verdict.outcome
        fields = {"task_id": lease.task_id, "attempt": delivery.attempt, "queue": delivery.queue}
        if verdict.action == "final":
            labels = {
                "queue": delivery.queue,
                "state": str(outcome.state),
                "reason": str(outcome.reason or ""),
            }
            self._telemetry.finished.add(1, labels)
            log.info(
                "task.finished",
                state=outcome.state,
                reason=outcome.reason,
                exit_code=outcome.exit_code,
                **fields,
            )
        elif verdict.action == "retry":
            log.info("task.retry_scheduled", reason=outcome.reason, delay=round(verdict.delay, 3), **fields)
        else:
            log.info("task.given_back", action=verdict.action, delay=round(verdict.delay, 3), **fields)

    async def _remove(self, handle: Handle) -> None:
        try:
            with anyio.fail_after(REMOVE_TIMEOUT):
                await self._backend.remove(handle)
        except (BackendError, TimeoutError) as error:
            log.warning("container.not_removed", container_id=handle.container_id, error=str(error))
