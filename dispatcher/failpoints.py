"""Places where a test makes this process fail: killed, stopped, blocked or with an exception.

Nothing is armed unless the command line says so, and then ``reach`` costs one look at an empty
dict. A specification is ``point:action``, or several with commas between; ``@ID`` at the end
of one lets it wait for that task. Actions: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``block=S``
(the whole process, event loop included, does nothing for S seconds), ``raise``. Each fires once.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass

from dispatcher.errors import ConfigurationError

#: In the order of a task's journey.
POINTS = (
    "before_take",
    "after_take",
    "during_pull",
    "before_create",
    "after_create",
    "before_start",
    "after_start",
    "running",
    "before_stop",
    "after_exit",
    "before_finish",
    "after_finish",
)
_SPECIFICATION = re.compile(
    rf"(?P<point>{'|'.join(POINTS)}):(?P<action>kill|stop|raise|block=(?P<seconds>\d+(\.\d+)?))"
    r"(@(?P<task_id>[A-Za-z0-9._-]+))?"
)


class FailpointReached(Exception):
    """A failpoint was told to raise."""


@dataclass(frozen=True, slots=True)
class _Failpoint:
    action: str
    seconds: float
    task_id: str | None


_armed: dict[str, _Failpoint] = {}


def arm(specification: str) -> None:
    """Let this process fail as ``specification`` says. Raises ConfigurationError."""
    for part in specification.split(","):
        match = _SPECIFICATION.fullmatch(part.strip())
        if match is None:
            form = (
                f"POINT:ACTION[@TASK]; points: {', '.join(POINTS)}; actions: kill, stop, raise, block=SECONDS"
            )
            raise ConfigurationError(
                [f"DISPATCHER_FAILPOINT: {part.strip()!r} is not allowed: must read {form}"]
            )
        seconds = float(match["seconds"] or 0)
        _armed[match["point"]] = _Failpoint(match["action"].split("=")[0], seconds, match["task_id"])


def reach(point: str, task_id: str = "") -> None:
    """Fail here, if that was asked for. Raises FailpointReached."""
    armed = _armed.get(point)
    if armed is None or armed.task_id not in {None, task_id}:
        return
    del _armed[point]
    if armed.action == "block":
        time.sleep(armed.seconds)
    elif armed.action == "raise":
        raise FailpointReached(f"{point} {task_id}".strip())
    else:
        os.kill(os.getpid(), signal.SIGKILL if armed.action == "kill" else signal.SIGSTOP)
