"""A thousand dispatchers are born and killed: no trace of them grows, and none takes tasks with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import State
from dispatcher.model import Outcome
from dispatcher.queue.exchange import Limits, Settlement, Submission
from dispatcher.queue.store import Store
from dispatcher.task import Task
from tests.chaos.ground import ProcessGround
from tests.chaos.truth import BASE, GROUP, QUEUES, STREAM, open_ids, stream_of
from tests.chaos.world import World
from tests.cli.program import until
from tests.support.redis_server import RedisUnderTest
from tests.support.waiting import wait_until

TIMEOUT = 60.0
#: Seconds: so short that most of a thousand are forgotten before the last is born.
LEASE = 0.05
BORN = 1_000
LIMITS = Limits(max_deliveries=10_000)
SUCCESS = Outcome(State.SUCCEEDED, exit_code=0)


class Crowd:
    """Instances, as the store sees them: they tick, take, and are not heard of again."""

    def __init__(self, server: RedisUnderTest) -> None:
        self.redis: Any = server.client()
        self.store = Store(server.url, STREAM)

    async def tick(self, instance: str) -> None:
        await self.store.tick(
            instance=instance, incarnation="1", info=json.dumps({"host": instance}), lease=LEASE,
            namespace="0123456789abcdef", source="redis-stream", daemon="", limits=LIMITS, queues=QUEUES,
        )  # fmt: skip

    async def take(self, instance: str, n: int) -> list[Any]:
        return await self.store.take(
            n, instance=instance, incarnation="1", lease=LEASE, queues=dict.fromkeys(QUEUES, 1), daemon=""
        )

    def consumers(self) -> set[str]:
        found = [self.redis.xinfo_consumers(stream_of(queue), GROUP) for queue in QUEUES]
        return {consumer["name"].decode() for queue in found for consumer in queue}

    def remembered(self) -> int:
        """The most that any key keeps of instances."""
        found: list[int] = [
            self.redis.zcard(f"{BASE}meta:seen"),
            *(self.redis.hlen(f"{BASE}meta:{name}") for name in ("instances", "incarnations", "suspects")),
        ]
        return max(found)


async def test_a_thousand_are_forgotten_and_their_tasks_are_not(redis_server: RedisUnderTest) -> None:
    crowd = Crowd(redis_server)
    try:
        await crowd.tick("first")
        most = 0
        for number in range(BORN):
            name = f"i{number}"
            await crowd.tick(name)
            await crowd.store.enqueue(Submission.of(Task(image="busybox", queue=QUEUES[number % 3])))
            await crowd.take(name, 1)
            most = max(most, len(crowd.consumers()) if number % 50 == 0 else 0)
        assert most < BORN

        async def all_forgotten() -> bool:
            await crowd.tick("last")
            return crowd.remembered() <= 1

        await wait_until(all_forgotten, TIMEOUT)
        assert crowd.consumers() <= {"last"}
        # Every one of them had a task, and took it to the grave: each comes back, once.
        ended = 0
        while open_ids(crowd.redis):
            await crowd.tick("last")
            for delivery in await crowd.take("last", 100):
                ended += (
                    await crowd.store.finish(
                        Settlement(delivery.task_id, delivery.owner, "final", SUCCESS, 0.0, "none")
                    )
                    == "ok"
                )
        assert ended == BORN == crowd.redis.xlen(f"{BASE}results")
    finally:
        await crowd.store.aclose()
        crowd.redis.close()


async def test_a_consumer_stays_while_entries_are_pending_on_it(redis_server: RedisUnderTest) -> None:
    """Ours leave nothing pending. An older version, or a stranger in the group, might."""
    crowd = Crowd(redis_server)
    try:
        await crowd.tick("stranger")
        entry = crowd.redis.xadd(STREAM, {"task": '{"image": "busybox"}'})
        assert crowd.redis.xreadgroup(GROUP, "stranger", {STREAM: ">"}, count=1)

        async def told_no_more() -> bool:
            await crowd.tick("last")
            return bool(crowd.redis.hkeys(f"{BASE}meta:instances") == [b"last"])

        async def forgotten() -> bool:
            await crowd.tick("last")
            return crowd.remembered() <= 1

        await wait_until(told_no_more, TIMEOUT)
        assert "stranger" in crowd.consumers()
        assert [d.source_id for d in await crowd.take("last", 10)] == [entry.decode()]
        await wait_until(forgotten, TIMEOUT)
        assert "stranger" not in crowd.consumers()
    finally:
        await crowd.store.aclose()
        crowd.redis.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_that_are_killed_one_after_the_other_leave_no_trace(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), LEASE_SECONDS="1", RECONCILE_GRACE="1") as world:
        heir = world.member("heir", QUEUES="low")
        for number in range(3):
            victim = world.member("victim")
            task_id = world.submit("sleep 1; exit 3", endings={"failed:exit:3"}, id=f"task-{number}")
            until(lambda: world.client.status(task_id).state is State.RUNNING, TIMEOUT)  # noqa: B023 - ends first
            victim.kill()
        world.dismiss(world.members["victim"])

        def consumers() -> set[str]:
            with world.server.client() as client:
                found: Any = [client.xinfo_consumers(stream_of(queue), GROUP) for queue in QUEUES]
            return {consumer["name"].decode() for queue in found for consumer in queue}

        until(lambda: consumers() <= {heir.instance}, TIMEOUT)
        findings = world.judged()
        assert not findings.broken(), findings
