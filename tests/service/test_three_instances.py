"""The main claim, as users run it: three processes, one queue, real containers."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.program import Program, redis_cli, until
from tests.support.engine import EngineUnderTest
from tests.support.redis_server import RedisUnderTest

TASKS = 200


@pytest.fixture
def program(redis_server: RedisUnderTest, tmp_path: Path, engine: EngineUnderTest) -> Program:
    """The program on a real engine."""
    more = {"BACKEND": "docker", "DOCKER_HOST": engine.base_url, "DEFAULT_NETWORK": engine.network}
    return Program(redis_server.url, tmp_path, more)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_instances_share_tasks_and_each_is_started_exactly_once(
    program: Program, redis_server: RedisUnderTest, engine: EngineUnderTest
) -> None:
    with (
        ExitStack() as stack,
        redis_server.client() as redis,
        engine.counting_starts("dispatcher-") as starts,
    ):
        instances = [
            stack.enter_context(program.serving("--num-consumers", "4", INSTANCE_ID=name)) for name in "abc"
        ]
        for number in range(TASKS):
            task = {"image": engine.image, "command": ["true"], "id": f"shared-{number}"}
            redis.xadd("dispatcher:tasks", {"task": json.dumps(task)})
        until(lambda: redis.xlen("{dispatcher:tasks}:results") >= TASKS, 240)
        results = [fields for _, fields in redis.xrange("{dispatcher:tasks}:results")]
        queues = program.json("queues")
        ended = [instance.stderr.count('"task.finished"') for instance in instances]
    assert sorted(r[b"id"].decode() for r in results) == sorted(f"shared-{n}" for n in range(TASKS))
    assert {r[b"state"] for r in results} == {b"succeeded"}
    ours = {name: count for name, count in starts.items() if "-shared-" in name}
    assert len(ours) == TASKS
    assert set(ours.values()) == {1}
    assert all(queue["depth"] == 0 and queue["in_flight"] == 0 for queue in queues)
    assert min(ended) > 0, "an instance had no share"


def test_it_feels_like_docker_run(program: Program, engine: EngineUnderTest) -> None:
    with program.serving():
        program.run("submit", engine.image, "--wait", "--", "sh", "-c", "exit 7", exit_code=7)
        followed = program.run("submit", engine.image, "--wait", "--follow", "--", "echo", "hello")
        assert followed.stdout == b"hello\n"
        task = json.dumps({"image": engine.image, "command": ["sh", "-c", "echo from redis-cli; exit 5"]})
        entry = redis_cli(program.url, "XADD", "dispatcher:tasks", "*", "task", task)
        status = program.json("wait", f"default.{entry}", exit_code=1)
        assert [s["exit_code"] for s in status] == [5]
        assert program.lines("logs", f"default.{entry}") == ["from redis-cli"]
