"""Settings of a Redis server under which a queue in it loses tasks.

Read from INFO: CONFIG is refused by most who rent Redis out.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from dispatcher.errors import QueueError
from dispatcher.queue.connection import command

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UnsafeSetting:
    """A setting of the server, by its name in redis.conf."""

    setting: str
    value: str
    #: What is lost, and when.
    loses: str
    #: What to set instead.
    mend: str

    def __str__(self) -> str:
        return f"Redis has {self.setting} {self.value}: {self.loses}; set {self.setting} {self.mend}"


async def unsafe_settings(redis: Redis) -> list[UnsafeSetting]:
    """What the server's settings may cost; empty if nothing. Raises QueueError."""
    found = []
    policy = (await command(redis, "INFO", "memory")).get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(
            UnsafeSetting(
                "maxmemory-policy",
                policy,
                "when memory runs out it throws keys away, and with them tasks, results, ids and leases",
                "noeviction",
            )
        )
    if not (await command(redis, "INFO", "persistence")).get("aof_enabled", 1):
        found.append(
            UnsafeSetting(
                "appendonly",
                "no",
                "a restart loses the tasks and results since its last snapshot, or all if it takes none",
                "yes",
            )
        )
    return found


async def warn_of_unsafe_settings(redis: Redis) -> None:
    """Log what ``unsafe_settings`` finds. Raises nothing: it is no reason not to start."""
    try:
        found = await unsafe_settings(redis)
    except QueueError as error:  # also an ACL without +info
        log.warning("redis.settings_not_read", error=str(error))
        return
    for unsafe in found:
        log.warning(
            "redis.unsafe_setting",
            setting=unsafe.setting,
            value=unsafe.value,
            loses=unsafe.loses,
            mend=unsafe.mend,
        )
