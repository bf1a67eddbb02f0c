"""For each window of a task's journey a task, and a dispatcher that fails there; and one that survives.

Each of the failing ones serves a queue of its own, in which lies its task, and comes by its
failpoint with that task only. So all windows are tried at once, in one world, and each task has
one victim. The survivor adopts whatever has a container, as they share a daemon; what has none
yet it may take as soon as ``release`` is called, for until then its one consumer is busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dispatcher.client import State, TaskStatus
from tests.chaos.member import Member
from tests.chaos.world import LEASE, LOOK, World
from tests.cli.program import until

#: Seconds for a task to be cared for again after its dispatcher failed.
RECOVERY = LEASE + 5.0
#: Seconds for all of it: starting a dispatcher takes long on a busy machine.
TIMEOUT = 60.0
#: Seconds without a heartbeat that tell a blocked loop (an instance ticks twice in that time).
SILENT = 1.2


@dataclass
class Window:
    """One place where to fail, and the task that comes by there."""

    name: str
    point: str
    script: str
    fields: dict[str, Any]
    ending: str
    #: Its end is asked for as soon as it runs.
    cancelled: bool = False
    task_id: str = ""
    member: Member | None = None
    #: Seconds of the longest time that nobody who can took care of the task, after it was held.
    longest: float = 0.0
    bare_since: float | None = None
    before: TaskStatus | None = None

    @property
    def victim(self) -> Member:
        """The dispatcher that fails."""
        assert self.member is not None
        return self.member


def window(point: str, script: str = "exit 3", ending: str = "failed:exit:3", **fields: Any) -> Window:
    """The window of one failpoint."""
    return Window(point.replace("_", "-"), point, script, fields, ending)


def windows(points: Iterable[str]) -> list[Window]:
    """One for each failpoint; a stop is come by for two reasons."""
    found = []
    for point in points:
        if point == "before_stop":
            late = window(point, "sleep 600", "failed:timeout", timeout=0.5, grace_period=0.5)
            unwanted = window(point, "sleep 600", "cancelled", grace_period=0.5)
            late.name, unwanted.name, unwanted.cancelled = "timeout", "cancel", True
            found += [late, unwanted]
        elif point == "running":
            found.append(window(point, "sleep 1; exit 3"))
        else:
            found.append(window(point))
    return found


class Trial:
    """All windows at once."""

    def __init__(self, world: World, windows: list[Window], action: str) -> None:
        self.world = world
        self.windows = windows
        self._action = action
        queues = ",".join(["default", *(window.name for window in windows)])
        self.survivor = world.member("survivor", QUEUES=queues, NUM_CONSUMERS="1")
        self._gate = world.submit("sleep 600", grace_period=0.1)
        until(lambda: self._status(self._gate).state is State.RUNNING, TIMEOUT)

    def _status(self, task_id: str) -> TaskStatus:
        return self.world.client.status(task_id)

    def begin(self) -> None:
        """Start the victims, and then hand the tasks in."""
        for window in self.windows:
            if window.point == "before_take":  # or it would fail with nothing to take
                self._hand_in(window)
            window.task_id = f"{window.name}.0"
            at = "" if window.point == "before_take" else f"@{window.task_id}"
            window.member = self.world.member(
                window.name, failpoint=f"{window.point}:{self._action}{at}", wait=False, QUEUES=window.name
            )
        for window in self.windows:
            window.victim.wait_started()
        for window in self.windows:
            if window.point != "before_take":
                self._hand_in(window)

    def _hand_in(self, window: Window) -> None:
        window.task_id = self.world.submit(
            window.script, endings={window.ending}, queue=window.name, id=f"{window.name}.0", **window.fields
        )

    def release(self) -> None:
        """Let the survivor take new tasks."""
        self.world.cancel(self._gate)

    # --- what is seen -------------------------------------------------------------------

    def watch(self, failed: Callable[[Member], bool]) -> None:
        """Look at the tasks until all have ended; ``failed`` tells whether a victim has failed.

        The survivor is released when the last has.
        """
        released = False
        deadline = time.monotonic() + TIMEOUT
        while True:
            for window in self.windows:
                window.victim.away = window.victim.away or failed(window.victim)
            seen = {window.name: self._status(window.task_id) for window in self.windows}
            for window in self.windows:
                self._look(window, seen[window.name], released=released)
            if not released and all(window.victim.away for window in self.windows):
                self.release()
                released = True
            if released and all(status.state.terminal for status in seen.values()):
                break
            assert time.monotonic() < deadline, (seen, [window.victim.away for window in self.windows])
            time.sleep(LOOK / 2)
        for window in self.windows:
            window.before = seen[window.name]

    def _look(self, window: Window, status: TaskStatus, *, released: bool) -> None:
        if window.cancelled and status.state is State.RUNNING and window.task_id not in self._cancelled:
            self.world.cancel(window.task_id)
        now = time.monotonic()
        waits = status.state is State.QUEUED and not released
        if waits or status.state.terminal or not window.victim.away or status.instance in self.world.owners():
            window.bare_since = None
            return
        window.bare_since = window.bare_since or now
        window.longest = max(window.longest, now - window.bare_since)

    @property
    def _cancelled(self) -> set[str]:
        return self.world.book.cancelled

    # --- what must hold -----------------------------------------------------------------

    def in_time(self) -> None:
        """No task was without care for long."""
        slow = {window.name: window.longest for window in self.windows if window.longest > RECOVERY}
        assert not slow, f"recovered too late: {slow}"

    def first_attempts(self) -> None:
        """Each has ended in its first attempt: what had begun was not begun again.

        But where the adopter was a victim as well: if it dies between the removal of a container
        that was not started and the record of its own, nobody knows that nothing has run, and the
        task's next attempt begins.
        """
        ends = {window.name: self._status(window.task_id) for window in self.windows}
        again = {name: end for name, end in ends.items() if end.attempt != 1 and end.takeovers < 2}
        assert not again
        started_later = {task_id for task_id, attempt in self.world.truth().starts if attempt != 1}
        assert started_later <= {end.id for end in ends.values() if end.takeovers > 1}

    def zombies_know(self) -> None:
        """Each victim that has gone on has noticed that its task is another's, and changed nothing."""
        for window in self.windows:
            assert window.before is not None
            assert window.before.instance == self.survivor.instance, f"{window.name}: nobody took it over"
            until(
                lambda: any(word in window.victim.stderr for word in ("lease.lost", "task.lost_to_another")),  # noqa: B023 - ends first
                TIMEOUT,
                what=f"{window.name} does not notice: {window.victim.stderr[-2000:]}",
            )
            assert self._status(window.task_id) == window.before
