"""The Lua scripts, and how one is called: repeated within a budget when Redis fails in passing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, cast

import anyio
from redis.asyncio import Redis

from dispatcher.errors import QueueUnavailable
from dispatcher.queue.connection import sorted_errors
from dispatcher.retry import RetryPause

#: Tries of one script call and seconds before the second; jittered, doubling. What must not
#: give up (a result) is repeated by its caller; a command that a person waits for is not.
TRIES = 3
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0


def _sources() -> dict[str, str]:
    files = {file.name: file.read_text("utf-8") for file in (resources.files(__package__) / "lua").iterdir()}
    common = files.pop("common.lua")
    return {name.removesuffix(".lua"): f"{common}\n{text}" for name, text in files.items()}


#: The Lua text of each script, what all share included. Read at import: never in an event loop.
SOURCES = _sources()


class Scripts:
    """Calls scripts on one client, for the queue whose stream of ``default`` is ``stream``."""

    def __init__(self, redis: Redis, stream: str) -> None:
        self._redis = redis
        self._stream = stream
        self._registered: dict[str, Callable[..., Awaitable[Any]]] = {}

    async def call(self, name: str, args: Sequence[str], *, tries: int = TRIES) -> list[Any]:
        """Run a script; a passing failure is tried again within the budget.

        Raises QueueUnavailable, QueueRefused.
        """
        pause = RetryPause(FIRST_PAUSE, LONGEST_PAUSE)
        for left in range(tries - 1, -1, -1):
            try:
                with sorted_errors():
                    # A call cancelled halfway would lose its reply, and with it what it took.
                    with anyio.CancelScope(shield=True):
                        return cast(list[Any], await self._script(name)(keys=[self._stream], args=args))
            except QueueUnavailable:
                if not left:
                    raise
            await pause.wait()
        raise AssertionError("unreachable")

    def _script(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name not in self._registered:
            self._registered[name] = cast(
                Callable[..., Awaitable[Any]], self._redis.register_script(SOURCES[name])
            )
        return self._registered[name]
