"""Waiting for conditions, so that no test sleeps for a time somebody guessed."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

import anyio

T = TypeVar("T")

#: Seconds between two looks: short beside what is waited for, long beside one look.
INTERVAL = 0.01


@overload
async def wait_until(
    predicate: Callable[[], Awaitable[T]], timeout: float = ..., *, what: str = ...
) -> T: ...


@overload
async def wait_until(predicate: Callable[[], T], timeout: float = ..., *, what: str = ...) -> T: ...


async def wait_until(predicate: Callable[[], Any], timeout: float = 10.0, *, what: str = "") -> Any:
    """Look until ``predicate`` answers something true, and return that.

    Raises TimeoutError after ``timeout`` seconds, saying ``what`` did not come about.
    """
    with anyio.move_on_after(timeout):
        while True:
            answer = predicate()
            value = await answer if inspect.isawaitable(answer) else answer
            if value:
                return value
            await anyio.sleep(INTERVAL)
    raise TimeoutError(what or f"not within {timeout} s: {inspect.getsource(predicate).strip()}")
