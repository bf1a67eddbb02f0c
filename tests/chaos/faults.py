"""The catalogue: what is done to the world, how it is mended, and when it counts as recovered.

The time to recover runs from the fault to the moment when nothing of what it hit is without
care any more, seen from outside:

- A fault that hits one dispatcher: every task that instance held (by the public client, right
  before the fault; right after, where it came by itself at a failpoint) has ended, or waits
  for its time, or is held by an instance that lives and is neither stopped nor blocked.
- A fault that hits Redis or the queue: a task handed in after the fault has ended.
- Cancellations: every task they named has ended.

A task counts as adopted if it ran when the fault came, and was later held or ended by another
instance in the same attempt.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from dispatcher.client import DispatcherError, State, TaskStatus
from dispatcher.errors import TaskNotFound
from tests.chaos.ground import DockerGround
from tests.chaos.member import Member
from tests.chaos.producer import Mix
from tests.chaos.truth import GROUP, QUEUES, stream_of
from tests.chaos.world import AWAY, LEASE, World
from tests.cli.program import until

#: Seconds in which an instance must have come by its failpoint, or the fault did not happen.
REACH_TIMEOUT = 20.0
#: A stop that outlasts a lease, in leases: at least and at most.
BEYOND = (1.3, 2.0)
#: Seconds without a heartbeat (an instance ticks about once a second) that tell a blocked loop.
SILENT = 1.2


class NotInflicted(Exception):
    """The fault did not come about, and does not count."""


@dataclass
class Scene:
    """What one fault has to do with: the world, its own dice, and what it has hit so far."""

    world: World
    rng: random.Random
    mix: Mix
    #: The dispatcher it may hit, where it hits one.
    member: Member | None = None
    moment: float = 0.0
    mend_at: float = 0.0
    victim: str = ""
    #: What has not recovered yet, as it was when the fault came.
    held: dict[str, TaskStatus] = field(default_factory=dict)
    #: Every task that it hit.
    touched: set[str] = field(default_factory=set)
    adopted: int = 0
    probe: str = ""
    mended: threading.Event = field(default_factory=threading.Event)

    @property
    def hit(self) -> Member:
        """The dispatcher it hits."""
        assert self.member is not None
        return self.member

    def strikes(self, *, mend_after: float = 0.0, held: dict[str, TaskStatus] | None = None) -> None:
        """Now it happens."""
        self.moment = time.monotonic()
        self.mend_at = self.moment + mend_after
        self.held = held or {}
        self.touched |= set(self.held) or set(self.world.book.open())

    def beyond_the_lease(self) -> float:
        """Seconds longer than a lease."""
        return LEASE * self.rng.uniform(*BEYOND)


class Fault(ABC):
    """One kind of fault. ``inflict`` calls ``scene.strikes`` in the moment it happens."""

    #: What it needs for itself: ``member`` (one of the dispatchers), ``extra`` (a further one
    #: that is made to fail), ``redis`` or ``tasks``.
    needs: str
    name: str

    @abstractmethod
    def inflict(self, scene: Scene) -> None:
        """Do it. Raises NotInflicted."""

    def may_mend(self, scene: Scene) -> bool:
        """Whether it has lasted long enough."""
        return time.monotonic() >= scene.mend_at

    def mend(self, scene: Scene) -> None:  # noqa: B027 - some mend themselves
        """Take it back, as far as somebody would: restart, continue."""

    @abstractmethod
    def recovered(self, scene: Scene) -> bool:
        """Whether nothing of what it hit is without care. Raises what ``AWAY`` names."""

    def clear(self, scene: Scene) -> None:  # noqa: B027 - most need nothing
        """After the recovery: what the fault alone had needed."""


# --- one dispatcher ---------------------------------------------------------------------


class _OnHeld(Fault):
    def recovered(self, scene: Scene) -> bool:
        """Every task the victim held has a living owner, its end, or a later time."""
        owners = scene.world.owners()
        for task_id, before in list(scene.held.items()):
            try:
                now = scene.world.client.status(task_id)
            except TaskNotFound:  # a plain entry that has the id it asked for by now
                del scene.held[task_id]
                continue
            # Who is back from a stop owns again what nobody took over.
            if now.state.terminal or now.state is State.SCHEDULED or now.instance in owners:
                ran_on = before.state is State.RUNNING and now.attempt == before.attempt
                scene.adopted += ran_on and now.instance != scene.victim
                del scene.held[task_id]
        return not scene.held


class _OnMember(_OnHeld):
    needs = "member"

    def _held(self, scene: Scene) -> dict[str, TaskStatus]:
        scene.victim = scene.hit.instance
        return scene.world.held(scene.victim)

    def mend(self, scene: Scene) -> None:
        """A new life."""
        scene.hit.start(wait=False)


class Kill(_OnMember):
    """SIGKILL at any moment."""

    name = "SIGKILL of a dispatcher"

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        held = self._held(scene)
        scene.strikes(mend_after=scene.rng.uniform(0.1, 1.5 * LEASE), held=held)
        scene.hit.kill()


class Stop(_OnMember):
    """SIGSTOP beyond the lease, then SIGCONT: a zombie that does not know it is one."""

    name = "SIGSTOP of a dispatcher beyond its lease, SIGCONT"

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        held = self._held(scene)
        scene.strikes(mend_after=scene.beyond_the_lease(), held=held)
        scene.hit.stop()

    def mend(self, scene: Scene) -> None:
        """Let it go on."""
        scene.hit.resume()


class Terminate(_OnMember):
    """SIGTERM, and a new life after the drain: one step of a rolling restart. ``times``: twice
    leaves running tasks behind at once."""

    def __init__(self, times: int) -> None:
        self._times = times
        self.name = "SIGTERM of a dispatcher, restart" if times == 1 else "SIGTERM twice, restart"

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        held = self._held(scene)
        scene.strikes(held=held)
        scene.hit.terminate()
        if self._times > 1:
            scene.hit.says("instance.signalled")
            scene.hit.terminate()

    def may_mend(self, scene: Scene) -> bool:
        """It has drained."""
        return not scene.hit.alive


class _AtPoint(_OnHeld):
    """A further dispatcher joins, comes by a point of a task's journey and fails there."""

    needs = "extra"
    action: str

    def __init__(self, point: str) -> None:
        self.point = point

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        absent = self._absent_images(scene)
        name = scene.mix.name("extra")
        scene.member = scene.world.member(name, failpoint=f"{self.point}:{self.action}", wait=False)
        scene.victim = scene.hit.instance
        try:
            until(lambda: self.struck(scene), REACH_TIMEOUT)
        except TimeoutError:
            scene.hit.kill()  # it may come by at any moment
            raise NotInflicted("not reached") from None
        finally:
            for reference in absent:
                scene.world.ground.provide(reference)  # type: ignore[attr-defined]
        now = time.monotonic()
        held = self._held_by_now(scene)
        scene.strikes(mend_after=scene.beyond_the_lease(), held=held)
        scene.moment = now

    def _held_by_now(self, scene: Scene) -> dict[str, TaskStatus]:
        with contextlib.suppress(*AWAY):
            return scene.world.held(scene.victim)
        raise NotInflicted("Redis was away, what was held is not known")

    def _absent_images(self, scene: Scene) -> list[str]:
        ground = scene.world.ground
        if self.point != "during_pull" or not isinstance(ground, DockerGround):
            return []
        absent = [ground.absent_image() for _ in range(6)]
        for reference in absent:
            with contextlib.suppress(*AWAY):
                scene.world.submit("exit 0", image=reference, id=scene.mix.name("pull"))
        return absent

    @abstractmethod
    def struck(self, scene: Scene) -> bool:
        """Whether it has happened."""

    def clear(self, scene: Scene) -> None:
        """The further dispatcher goes."""
        scene.world.dismiss(scene.hit)


class KillAt(_AtPoint):
    """SIGKILL in one window of a task's journey."""

    action = "kill"

    @property
    def name(self) -> str:  # type: ignore[override]
        """See ``Fault``."""
        return f"SIGKILL at `{self.point}`"

    def struck(self, scene: Scene) -> bool:
        """It is dead, and of that."""
        if scene.hit.alive:
            return False
        code = scene.hit.ended()
        assert code == -signal.SIGKILL, f"{scene.victim} exited with {code}: {scene.hit.stderr[-1000:]}"
        return True


class StopAt(_AtPoint):
    """SIGSTOP in one window, beyond the lease, then SIGCONT."""

    action = "stop"

    @property
    def name(self) -> str:  # type: ignore[override]
        """See ``Fault``."""
        return f"SIGSTOP at `{self.point}` beyond the lease, SIGCONT"

    def struck(self, scene: Scene) -> bool:
        """The kernel has stopped it."""
        scene.hit.away = scene.hit.stopped
        return scene.hit.away

    def mend(self, scene: Scene) -> None:
        """Let it go on."""
        scene.hit.resume()

    def clear(self, scene: Scene) -> None:
        """It has gone on as a zombie for a while, and drains."""
        if scene.hit.alive:
            scene.hit.terminate()
            try:
                scene.hit.ended()
            except subprocess.TimeoutExpired:
                scene.world.book.lies.append(f"{scene.victim} does not end after SIGTERM")
        super().clear(scene)


class BlockAt(StopAt):
    """The event loop does nothing for longer than the lease."""

    def __init__(self, point: str) -> None:
        super().__init__(point)
        self.action = f"block={BEYOND[1] * LEASE + SILENT:g}"

    @property
    def name(self) -> str:  # type: ignore[override]
        """See ``Fault``."""
        return "event loop blocked beyond the lease"

    def struck(self, scene: Scene) -> bool:
        """Its heart has stopped beating."""
        with contextlib.suppress(*AWAY):
            seen = {i.id: i.seen_seconds for i in scene.world.client.instances()}
            scene.hit.away = seen.get(scene.victim, 0.0) > SILENT
        return scene.hit.away

    def may_mend(self, scene: Scene) -> bool:
        """It is heard of again."""
        with contextlib.suppress(*AWAY):
            return any(i.id == scene.victim and i.seen_seconds < 1 for i in scene.world.client.instances())
        return False

    def mend(self, scene: Scene) -> None:
        """It goes on by itself."""
        scene.hit.away = False


# --- Redis and the queue ----------------------------------------------------------------


class _OnQueue(Fault):
    needs = "redis"

    def recovered(self, scene: Scene) -> bool:
        """A task that was handed in after the fault has ended."""
        if not scene.mended.is_set():
            return False
        if not scene.probe:
            scene.probe = scene.world.submit("exit 0", id=scene.mix.name("probe"), queue="high")
        return scene.world.client.status(scene.probe).state.terminal


class RedisKill(_OnQueue):
    """SIGKILL of Redis, and a restart on its append-only file."""

    name = "SIGKILL of Redis, restart with AOF"

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        scene.strikes(mend_after=scene.rng.uniform(0.1, LEASE))
        scene.world.server.kill()

    def mend(self, scene: Scene) -> None:
        """Start it."""
        scene.world.server.start()


class RedisStop(_OnQueue):
    """SIGSTOP of Redis beyond the lease."""

    name = "SIGSTOP of Redis beyond the lease, SIGCONT"

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        scene.strikes(mend_after=scene.beyond_the_lease())
        scene.world.server.stop()

    def mend(self, scene: Scene) -> None:
        """Let it go on."""
        scene.world.server.resume()


class Command(_OnQueue):
    """An operator's slip at redis-cli."""

    def __init__(self, name: str) -> None:
        self.name = name

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        command = scene.world.server.command
        scene.strikes()
        try:
            match self.name:
                case "SCRIPT FLUSH":
                    command("SCRIPT", "FLUSH")
                case "CLIENT KILL of every connection":
                    command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                case "XGROUP DESTROY of every queue":
                    for queue in QUEUES:
                        command("XGROUP", "DESTROY", stream_of(queue), GROUP)
                case _:
                    for queue in QUEUES:
                        for member in scene.world.owners():
                            command("XGROUP", "DELCONSUMER", stream_of(queue), GROUP, member)
        except AWAY as error:
            raise NotInflicted(str(error)) from None


class Cancellations(Fault):
    """A storm of cancellations of tasks in whatever phase they are."""

    name = "cancellation of some 12 tasks in any phase"
    needs = "tasks"

    def inflict(self, scene: Scene) -> None:
        """See ``Fault``."""
        world = scene.world
        known = world.book.open()
        scene.touched = set(scene.rng.sample(known, min(len(known), 12)))
        # Some that have just come, and race with the launch.
        with contextlib.suppress(*AWAY):
            scene.touched |= {world.submit("sleep 3", id=scene.mix.name("fresh")) for _ in range(4)}
        if not scene.touched:
            raise NotInflicted("nothing is open")
        scene.strikes(held={task_id: TaskStatus(task_id, State.QUEUED, "") for task_id in scene.touched})
        for task_id in sorted(scene.touched):
            try:
                world.cancel(task_id)
            except TaskNotFound:  # an entry with an id that nobody has read yet
                del scene.held[task_id]
            except DispatcherError:  # Redis is away: it may have been cancelled or not
                del scene.held[task_id]

    def recovered(self, scene: Scene) -> bool:
        """All of them have ended."""
        for task_id in list(scene.held):
            if scene.world.client.status(task_id).state.terminal:
                del scene.held[task_id]
        return not scene.held


_STOPS = ("before_create", "after_create", "before_start", "after_start")


def catalogue(points: tuple[str, ...]) -> list[Fault]:
    """One deck of faults, to be dealt to its end before it is shuffled anew.

    ``points``: the failpoints that tasks come by. What hits a whole system at any moment is in it
    more than once, for a moment is drawn anew each time.
    """
    return [
        *(Kill() for _ in range(4)),
        *(Stop() for _ in range(3)),
        Terminate(1),
        Terminate(1),
        Terminate(2),
        *(KillAt(point) for point in points),
        *(StopAt(point) for point in _STOPS),
        BlockAt("before_start"),
        BlockAt("running"),
        RedisKill(),
        RedisKill(),
        RedisStop(),
        *(
            Command(name)
            for name in (
                "SCRIPT FLUSH",
                "CLIENT KILL of every connection",
                "XGROUP DESTROY of every queue",
                "XGROUP DELCONSUMER of every instance",
            )
        ),
        Cancellations(),
        Cancellations(),
    ]
