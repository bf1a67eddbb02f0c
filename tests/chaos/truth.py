"""What really happened, told by nobody of ours.

Starts: a ledger to which each task's own command appends a line as it begins, or the engine's
``start`` events as they come. Results: the results stream, read by a plain Redis client.
What waits: the documented keys of the queue, counted by that client. No counter, log line or
view of a dispatcher is asked anywhere in this module: a dispatcher that is wrong about itself
must not be able to say that all is well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

STREAM = "dispatcher:tasks"
BASE = f"{{{STREAM}}}:"
GROUP = "dispatchers"
#: The queues that instances serve unless they are told otherwise.
QUEUES = ("default", "high", "low")
#: Records of the results stream read at once.
PAGE = 1_000
#: Seconds for a reply; longer than Redis is ever stopped for.
SOCKET_TIMEOUT = 10.0

#: A (task id, attempt).
Launch = tuple[str, int]


def stream_of(queue: str) -> str:
    """Where entries of ``queue`` lie, as docs/queue.md tells every producer."""
    return STREAM if queue == "default" else f"{BASE}{queue}"


def plain_client(url: str) -> redis.Redis:
    """A client that knows nothing of us and sends every command once.

    redis-py would repeat a command whose reply was lost, and a repeated XADD is another task.
    """
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=SOCKET_TIMEOUT)


# --- starts -----------------------------------------------------------------------------


class Ledger:
    """A file to which tasks write when they begin and when they end.

    A line is ``<task id> <attempt> start|end <pid>``, appended by the shell in one write to a
    descriptor opened with O_APPEND, so that lines of many tasks never mix.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def script(self, work: str) -> str:
        """``work``, a shell script, with its lines for this ledger. A killed one writes no end."""
        told = '"$DISPATCHER_TASK_ID $DISPATCHER_ATTEMPT'
        return f"L={self.path}; echo {told} start $$\" >>$L; trap 'echo {told} end $$\" >>$L' EXIT; {work}"

    def lines(self, word: str) -> Counter[Launch]:
        """How often each attempt wrote ``word``: start or end."""
        found: Counter[Launch] = Counter()
        for line in self.path.read_text().splitlines():
            task_id, attempt, said, _ = line.split()
            if said == word:
                found[task_id, int(attempt)] += 1
        return found

    def starts(self) -> Counter[Launch]:
        """How often each attempt began."""
        return self.lines("start")

    def plant(self, launch: Launch) -> None:
        """Write a start that never was: for the tests of the checker."""
        with self.path.open("a") as file:
            file.write(f"{launch[0]} {launch[1]} start 0\n")


def launches_of(containers: Mapping[str, int], namespace: str) -> Counter[Launch]:
    """The engine's count of starts by container name, as starts of (task, attempt).

    A name is ``dispatcher-<first 8 of namespace>-<task id>-<attempt>``.
    """
    prefix = f"dispatcher-{namespace[:8]}-"
    found: Counter[Launch] = Counter()
    for name, times in list(containers.items()):
        if name.startswith(prefix):
            task_id, _, attempt = name.removeprefix(prefix).rpartition("-")
            found[task_id, int(attempt)] += times
    return found


# --- results ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """One entry of the results stream."""

    task_id: str
    state: str
    reason: str
    exit_code: str
    attempt: int

    @property
    def ending(self) -> str:
        """How the task ended, in one word: ``succeeded``, ``failed:exit:3``, ``failed:timeout``."""
        if self.state != "failed":
            return self.state
        return f"failed:{self.reason}:{self.exit_code}" if self.reason == "exit" else f"failed:{self.reason}"


class ResultStream:
    """The results stream, from its beginning."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._after = "-"

    def news(self) -> list[Result]:
        """What has come since the last call. Raises redis.RedisError."""
        found: list[Result] = []
        while page := self._page():
            found += [_result(fields) for _, fields in page]
            self._after = f"({page[-1][0].decode()}"
        return found

    def _page(self) -> Any:
        return self._client.xrange(f"{BASE}results", self._after, "+", count=PAGE)


def _result(fields: Mapping[bytes, bytes]) -> Result:
    text = {name.decode(): value.decode() for name, value in fields.items()}
    return Result(text["id"], text["state"], text["reason"], text["exit_code"], int(text["attempt"] or 1))


# --- what is left -----------------------------------------------------------------------


def namespace_of(client: redis.Redis) -> str:
    """The system's namespace, which is in the name of each of its containers; '' if there is none."""
    found: Any = client.hget(f"{BASE}meta:counters", "namespace")
    return found.decode() if found else ""


def waiting(client: redis.Redis) -> dict[str, int]:
    """What is waiting, pending, leased or open, by key; only what is not empty."""
    found: dict[str, int] = {}
    for queue in QUEUES:
        key = stream_of(queue)
        found[key] = _number(client.xlen(key))
        if client.exists(key):
            groups: Any = client.xinfo_groups(key)
            found[f"{key} pending"] = sum(group["pending"] for group in groups)
    for pattern in ("ready:*", "inbox:*", "index:due:*", "index:open", "index:leases"):
        # The braces of the slot are plain characters to a pattern.
        for key in client.scan_iter(f"{BASE}{pattern}", count=PAGE):
            found[key.decode()] = _number(client.zcard(key))
    return {key: count for key, count in found.items() if count}


def open_ids(client: redis.Redis) -> set[str]:
    """The tasks without an end, by the queue's own index."""
    found: Any = client.zrange(f"{BASE}index:open", 0, -1)
    return {task_id.decode() for task_id in found}


def _number(reply: Any) -> int:
    return int(reply)
