"""With QUEUE_SOURCE=redis-list an LPUSH is a task, and what is seen of the queues is right."""

from __future__ import annotations

import json
from typing import Any

from anyio.to_thread import run_sync

from dispatcher.client import Reason, State
from tests.cli.program import Program, redis_cli
from tests.support.system import ProcessSystem
from tests.support.waiting import wait_until

TIMEOUT = 30
STREAM = "dispatcher:tasks"
LOW = f"{{{STREAM}}}:low"


def shell(script: str, **fields: Any) -> str:
    return json.dumps({"image": "busybox", "command": ["/bin/sh", "-c", script], **fields})


async def test_a_plain_lpush_runs_and_is_seen(process_system: ProcessSystem) -> None:
    url = process_system.redis.url
    program = Program(url, process_system.directory)
    redis_cli(url, "LPUSH", STREAM, shell("echo from a list; exit 3"))  # before anybody is there
    assert {q["name"]: q["depth"] for q in program.json("queues")} == {"default": 1}
    async with process_system.running(queue_source="redis-list") as client:

        async def ended(count: int) -> bool:
            return len([t for t in await client.tasks() if t.state.terminal]) == count

        await wait_until(lambda: ended(1), TIMEOUT)
        [task] = await client.tasks()
        assert (task.state, task.reason, task.exit_code) == (State.FAILED, Reason.EXIT, 3)
        assert task.id.startswith("default.")
        assert [line async for line in client.logs(task.id)] == ["from a list"]

        await client.pause("low")
        redis_cli(url, "LPUSH", LOW, shell("exit 0", id="mine"))
        redis_cli(url, "-x", "LPUSH", LOW, stdin=b"\xff junk")
        ours = await client.submit(process_system.task("exit 0", queue="low"))
        shown = {q["name"]: q for q in await run_sync(program.json, "queues")}
        assert {name: q["depth"] for name, q in shown.items()} == {"default": 0, "high": 0, "low": 3}
        assert (shown["low"]["oldest_seconds"], shown["low"]["paused"]) == (None, True)
        assert {t["id"] for t in await run_sync(program.json, "list")} == {task.id, ours.id}
        done = await run_sync(lambda: program.run("cancel", "low.1-1", exit_code=3))
        assert b"no task" in done.stderr

        await client.resume("low")
        assert (await ours.wait(TIMEOUT)).state is State.SUCCEEDED
        assert (await client.wait("mine", timeout=TIMEOUT)).state is State.SUCCEEDED
        await wait_until(lambda: ended(4), TIMEOUT)
        [letter] = await client.dead()
        assert letter.task == b"\xff junk"
        header, *rows = await run_sync(program.lines, "queues")
        assert header.split()[:2] == ["QUEUE", "WAITING"]
        assert [row.split()[:3] for row in rows] == [[name, "0", "0"] for name in ("default", "high", "low")]
