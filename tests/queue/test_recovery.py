"""An instance's presence: its name is its own, and its namespace outlives what empties the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from dispatcher.errors import ConfigurationError, Evicted
from dispatcher.queue import recovery as recovery_module
from dispatcher.queue.exchange import Limits
from dispatcher.queue.recovery import Recovery
from tests.queue.conftest import WEIGHTS, QueueUnderTest
from tests.support.waiting import wait_until

NAME = "host-1"
SHORT = 0.8


class Instance:
    """One that ticks, and what it is told."""

    def __init__(self, queue: QueueUnderTest, incarnation: str = "mine", lease: float = SHORT) -> None:
        self.evicted: list[Evicted] = []
        self.looked = 0
        self.recovery = Recovery(
            queue.store,
            instance=NAME,
            incarnation=incarnation,
            lease_seconds=lease,
            limits=Limits(),
            source=queue.source,
            queues=WEIGHTS,
            daemon=lambda: "",
            info=lambda: "{}",
            on_promoted=self._look,
            on_evicted=self.evicted.append,
        )

    def _look(self) -> None:
        self.looked += 1


@asynccontextmanager
async def ticking(instance: Instance) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(instance.recovery.run, name="ticks")
        try:
            yield
        finally:
            group.cancel_scope.cancel()


def incarnation(queue: QueueUnderTest) -> str:
    found: bytes = queue.redis.hget(queue.key("meta:incarnations"), NAME) or b""
    return found.decode()


def namespace(queue: QueueUnderTest) -> str:
    found: bytes = queue.redis.hget(queue.key("meta:counters"), "namespace") or b""
    return found.decode()


async def test_joining_tells_the_namespace_and_leaving_gives_the_name_back(queue: QueueUnderTest) -> None:
    instance = Instance(queue)
    assert (await instance.recovery.join()).namespace == namespace(queue) != ""
    assert instance.recovery.healthy
    assert incarnation(queue) == "mine"
    await instance.recovery.leave()
    assert incarnation(queue) == ""


async def test_a_namesake_that_was_killed_is_waited_for(queue: QueueUnderTest) -> None:
    await queue.tick(NAME, incarnation="killed", lease=SHORT)
    last_seen = queue.members("meta:seen")[NAME]
    with anyio.fail_after(10):
        tick = await Instance(queue).recovery.join()
    assert not tick.rival
    assert tick.now_ms >= last_seen + SHORT * 1000
    assert incarnation(queue) == "mine"


async def test_a_namesake_that_lives_on_keeps_the_name(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "TICK_SECONDS", 0.1)
    other = Instance(queue, "other")
    await other.recovery.join()
    async with ticking(other):
        with anyio.fail_after(10), pytest.raises(ConfigurationError, match=f"INSTANCE_ID.*'{NAME}'"):
            await Instance(queue).recovery.join()
    assert incarnation(queue) == "other"
    assert other.evicted == []


async def test_who_lost_its_name_must_not_go_on(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "TICK_SECONDS", 0.05)
    instance = Instance(queue)
    await instance.recovery.join()
    queue.ask("ZADD", queue.key("meta:seen"), 1, NAME)  # it stood still for longer than a lease
    assert not (await queue.tick(NAME, incarnation="other")).rival
    async with ticking(instance):
        await wait_until(lambda: instance.evicted)
    assert NAME in str(instance.evicted[0])
    await instance.recovery.leave()
    assert incarnation(queue) == "other", "whose name it is now stays on the list"


async def test_a_queue_emptied_under_it_gets_its_namespace_again(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "TICK_SECONDS", 0.05)
    instance = Instance(queue)
    before = (await instance.recovery.join()).namespace
    async with ticking(instance):
        queue.redis.flushall()
        await wait_until(lambda: namespace(queue))
        await wait_until(lambda: incarnation(queue) == "mine")
    assert namespace(queue) == before
    assert instance.evicted == []
    assert await queue.submit(queue="low"), "groups, queues and limits are there again"


async def test_a_queue_begun_anew_by_others_is_not_gone_on_with(
    queue: QueueUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_module, "TICK_SECONDS", 0.05)
    instance = Instance(queue)
    await instance.recovery.join()
    queue.redis.hset(queue.key("meta:counters"), "namespace", "others")
    async with ticking(instance):
        await wait_until(lambda: instance.evicted)
    assert "begun anew" in str(instance.evicted[0])
    assert namespace(queue) == "others"


async def test_what_falls_due_is_looked_at_once(queue: QueueUnderTest) -> None:
    instance = Instance(queue, lease=60)
    await instance.recovery.join()
    await queue.submit(delay=0.1)
    async with ticking(instance):
        await wait_until(lambda: instance.looked)
    assert len(await queue.take()) == 1
