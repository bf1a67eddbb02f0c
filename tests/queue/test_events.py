"""Events: told to whoever follows, and never in anybody's way."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import structlog

from dispatcher.queue import events as events_module
from dispatcher.queue.events import BUFFER_LENGTH, MAX_VALUE, Events
from tests.queue.conftest import STREAM
from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, start
from tests.support.waiting import wait_until

KEY = f"{{{STREAM}}}:events"


@asynccontextmanager
async def writing(url: str) -> AsyncIterator[Events]:
    """Events of instance ``a`` that are being written."""
    events = Events(url, STREAM, instance="a")
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(events.run)
            yield events
            group.cancel_scope.cancel()
    finally:
        await events.aclose()


def written(server: RedisUnderTest) -> list[dict[str, str]]:
    with server.client() as redis:
        entries = redis.xrange(KEY)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]


async def test_who_follows_reads_them_in_order(redis_server: RedisUnderTest) -> None:
    async with writing(redis_server.url) as events:
        events.publish("image.pull_started", {"image": "r/x:1", "tries": 1})
        events.publish("image.pull_ended", {"image": "r/x:1", "seconds": 1.5, "error": "no\nsuch  thing"})
        await wait_until(lambda: len(written(redis_server)) == 2)
    assert written(redis_server) == [
        {"kind": "image.pull_started", "instance": "a", "image": "r/x:1", "tries": "1"},
        {
            "kind": "image.pull_ended",
            "instance": "a",
            "image": "r/x:1",
            "seconds": "1.5",
            "error": "no such thing",
        },
    ]
    with redis_server.client() as redis:
        ((_, entries),) = redis.xread({KEY: "0-0"})
    assert len(entries) == 2


async def test_a_value_is_bounded(redis_server: RedisUnderTest) -> None:
    async with writing(redis_server.url) as events:
        events.publish("image.pull_ended", {"error": "x" * 100_000})
        await wait_until(lambda: written(redis_server))
    assert len(written(redis_server)[0]["error"]) == MAX_VALUE


async def test_the_stream_stays_about_its_length(
    redis_server: RedisUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "EVENTS_LENGTH", 10)
    async with writing(redis_server.url) as events:
        for number in range(500):
            events.publish("image.pull_progress", {"bytes_done": number})
        await wait_until(
            lambda: written(redis_server)[-1:] and written(redis_server)[-1]["bytes_done"] == "499"
        )
    assert len(written(redis_server)) <= 10 + 100, "trimmed by whole nodes of the stream"


async def test_the_newest_wait_while_nobody_writes(redis_server: RedisUnderTest) -> None:
    events = Events(redis_server.url, STREAM, instance="a")
    for number in range(BUFFER_LENGTH + 25):
        events.publish("image.pull_progress", {"bytes_done": number})
    assert events.dropped == 25
    async with anyio.create_task_group() as group:
        group.start_soon(events.run)
        await wait_until(lambda: len(written(redis_server)) == BUFFER_LENGTH)
        group.cancel_scope.cancel()
    await events.aclose()
    assert [int(event["bytes_done"]) for event in written(redis_server)] == list(
        range(25, BUFFER_LENGTH + 25)
    )
    assert events.dropped == 0


async def test_a_dead_redis_delays_nothing_is_told_once_and_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "MAX_PAUSE", 0.05)
    monkeypatch.setattr(events_module, "FIRST_PAUSE", 0.01)
    with structlog.testing.capture_logs() as logged:
        async with writing(f"unix://{tmp_path}/redis.sock") as events:
            began = time.monotonic()
            for number in range(3 * BUFFER_LENGTH):
                events.publish("image.pull_progress", {"bytes_done": number})
            assert time.monotonic() - began < 1.0
            await wait_until(lambda: events.dropped >= 3 * BUFFER_LENGTH)
            events.publish("lost", {})
            await wait_until(lambda: events.dropped > 3 * BUFFER_LENGTH)
            process, server = start(tmp_path)
            try:
                events.publish("found", {})
                await wait_until(lambda: written(server))
                await wait_until(lambda: events.dropped == 0)
            finally:
                process.kill()
                process.wait(END_TIMEOUT)
    assert [event["event"] for event in logged] == ["events.not_written", "events.written_again"]
    assert logged[1]["dropped"] == 3 * BUFFER_LENGTH + 1


async def test_a_key_that_is_something_else_ends_nothing(redis_server: RedisUnderTest) -> None:
    with redis_server.client() as redis:
        redis.set(KEY, "x")
    with structlog.testing.capture_logs() as logged:
        async with writing(redis_server.url) as events:
            events.publish("lost", {})
            await wait_until(lambda: events.dropped)
            with redis_server.client() as redis:
                redis.delete(KEY)
            events.publish("found", {})
            await wait_until(lambda: written(redis_server))
    assert "WRONGTYPE" in logged[0]["error"]
