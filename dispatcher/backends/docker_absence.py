"""Which ends of containers are explained by an absence of their engine. No I/O.

An engine that is shut down stops its containers, and one that was killed stops them when it
comes back, unless it runs with ``live-restore``. They look like programs that failed: exit
code 137 or 143, or whatever a program answers SIGTERM with. The engine keeps no note of it.
So what is known is put together, of an engine that was away and has come back:

- That it is another process now: it remembers its last 256 events, and none of them is older
  than its last answer before. One that hung, or only could not be reached, remembers some.
- When the container ended: after the engine last took a new connection, and before it did so
  again. One that is shutting down takes none any more, and goes on answering on those it has.
- How: by a signal, as its exit code tells (128 and the signal's number; 255 if nobody was there
  to read it); or with any other failure, after the engine was heard sending it a signal.

Times are Unix seconds of the engine's clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dispatcher.model import Exit

#: Exit codes above are deaths by a signal.
_BY_SIGNAL = 128
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Absence:
    """A time in which one process of the engine ended and another began."""

    #: When it last took a new connection before.
    since: float
    #: When it did so again.
    until: float
    #: Containers that the engine sent a signal to in between.
    signalled: frozenset[str] = field(default_factory=frozenset)

    def explains(self, container_id: str, ended: Exit) -> bool:
        """Whether the container ended because its engine did."""
        if not self.since <= ended.finished_at <= self.until:
            return False
        return ended_by_signal(ended) or (ended.exit_code != 0 and container_id in self.signalled)


def ended_by_signal(ended: Exit) -> bool:
    """Whether a signal ended the program, for another reason than want of memory."""
    return ended.exit_code > _BY_SIGNAL and not ended.oom


def absence_of(
    remembered: Iterable[Mapping[str, Any]],
    *,
    since: float,
    answered: float,
    until: float,
    heard: Iterable[tuple[str, float]],
) -> Absence | None:
    """What to make of an engine that was away; None if it is the same process as before.

    ``remembered``: all its events, as the Engine API tells them; ``answered``: when the last
    request was sent that it answered before; ``heard``: containers that it was heard sending a
    signal to, and when; ``since`` and ``until`` as in ``Absence``.
    """
    signalled = {container_id for container_id, when in heard if when >= since}
    for event in remembered:
        if event.get("timeNano", 0) / _NANO <= answered:
            return None
        if event["Type"] == "container" and event["Action"] == "kill":
            signalled.add(event.get("Actor", {}).get("ID", ""))
    return Absence(since, until, frozenset(signalled))
