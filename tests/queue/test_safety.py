"""Settings of a real server that lose tasks are found, and told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from redis import Redis

from dispatcher.queue.connection import connect
from dispatcher.queue.safety import unsafe_settings, warn_of_unsafe_settings
from tests.support.redis_server import END_TIMEOUT, RedisUnderTest, start


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisUnderTest]:
    process, server = start(tmp_path)
    yield server
    process.kill()
    process.wait(END_TIMEOUT)


async def told(url: str) -> list[dict[str, object]]:
    redis = connect(url, max_connections=1)
    try:
        with structlog.testing.capture_logs() as logged:
            await warn_of_unsafe_settings(redis)
    finally:
        await redis.aclose()
    return [dict(event) for event in logged]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("maxmemory-policy", "allkeys-lru"), ("maxmemory-policy", "volatile-ttl"), ("appendonly", "no")],
)
async def test_what_loses_tasks_is_told(server: RedisUnderTest, setting: str, value: str) -> None:
    assert await told(server.url) == []
    with server.client() as plain:
        plain.config_set(setting, value)
    [event] = await told(server.url)
    assert (event["event"], event["log_level"]) == ("redis.unsafe_setting", "warning")
    assert (event["setting"], event["value"]) == (setting, value)
    assert event["loses"]
    assert event["mend"] != value

    redis = connect(server.url, max_connections=1)
    [unsafe] = await unsafe_settings(redis)
    await redis.aclose()
    assert str(unsafe).startswith(f"Redis has {setting} {value}: ")


async def test_where_info_is_forbidden_nothing_stops(server: RedisUnderTest) -> None:
    with server.client() as plain:
        plain.execute_command("ACL", "SETUSER", "worker", "on", ">w", "~*", "+@all", "-@dangerous")
        url = f"redis://worker:w@127.0.0.1:{server.port}/0"
        [event] = await told(url)
        assert event["event"] == "redis.settings_not_read"
        plain.execute_command("ACL", "SETUSER", "worker", "+info")
        assert await told(url) == []


async def test_where_nobody_answers_nothing_stops(server: RedisUnderTest) -> None:
    with Redis.from_url(server.url) as plain:
        plain.shutdown(nosave=True)
    [event] = await told(server.url)
    assert event["event"] == "redis.settings_not_read"
