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

from tests.chaos.crashes import BlockAt, Kill, KillAt, Stop, StopAt, Terminate
from tests.chaos.outages import Cancellations, Command, RedisKill, RedisStop
from tests.chaos.scene import Fault

#: Where a stopped creator's late start must find nothing.
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
