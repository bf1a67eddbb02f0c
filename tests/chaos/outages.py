"""Faults that hit Redis, the queue in it, or many tasks at once."""

from __future__ import annotations

import contextlib

from dispatcher.client import DispatcherError, State, TaskStatus
from dispatcher.errors import TaskNotFound
from tests.chaos.scene import Fault, NotInflicted, Scene
from tests.chaos.truth import GROUP, QUEUES, stream_of
from tests.chaos.world import AWAY, LEASE


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
