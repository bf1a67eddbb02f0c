"""Faults that hit one dispatcher: killed, stopped, terminated, blocked; at any moment or at a point."""

from __future__ import annotations

import contextlib
import signal
import time
from abc import abstractmethod

from dispatcher.client import State, TaskStatus
from dispatcher.errors import TaskNotFound
from tests.chaos.ground import DockerGround
from tests.chaos.member import END_TIMEOUT, Member
from tests.chaos.scene import BEYOND, Fault, NotInflicted, Scene
from tests.chaos.world import AWAY, LEASE
from tests.cli.program import until

#: Seconds in which an instance must have come by its failpoint, or the fault did not happen.
REACH_TIMEOUT = 20.0
#: Seconds without a heartbeat (an instance ticks about once a second) that tell a blocked loop.
SILENT = 1.2


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
                until(lambda: self._gone_on(scene.hit), END_TIMEOUT)
            except TimeoutError:
                scene.world.book.lies.append(f"{scene.victim} does not end after SIGTERM")
        super().clear(scene)

    @staticmethod
    def _gone_on(member: Member) -> bool:
        """Let it go on, also if it comes to its point only now; whether it has ended."""
        member.resume()
        return not member.alive


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
