"""What is seen of the whole system; and what plain Redis clients hand in."""

from __future__ import annotations

import base64
import json

from tests.cli.program import Program, redis_cli, until

STREAM = "dispatcher:tasks"


def test_queues_are_shown_paused_and_resumed(served: Program) -> None:
    shown = served.json("queues")
    assert [queue["name"] for queue in shown] == ["default", "high", "low"]
    assert shown[0].keys() == {
        "name", "depth", "in_flight", "oldest_seconds", "finished_last_minute", "paused",
    }  # fmt: skip
    served.run("queues", "pause", "low")
    task_id = served.submit("true", queue="low")
    header, *rows = served.lines("queues")
    assert header.split()[0] == "QUEUE"
    assert [row.endswith("yes") for row in rows] == [False, False, True]
    with served.client() as client:
        assert client.status(task_id).state == "queued"
    served.run("queues", "resume", "low")
    assert served.ended(task_id).state == "succeeded"
    done = served.run("queues", "pause", "nope", exit_code=3)
    assert b"no instance serves queue 'nope'" in done.stderr


def test_instances(served: Program) -> None:
    (found,) = served.json("instances")
    assert found.keys() == {"id", "seen_seconds", "info"}
    assert found["info"]["backend"] == "process"
    header, row = served.lines("instances")
    assert header.startswith("INSTANCE")
    assert row.split()[:3] == [found["id"], "running", "process"]


def test_one_redis_command_is_enough_to_submit(served: Program) -> None:
    document = json.dumps({"image": "busybox", "command": ["echo", "from redis-cli"]})
    entry = redis_cli(served.url, "XADD", STREAM, "*", "task", document)
    task_id = f"default.{entry}"
    assert served.lines("wait", task_id) == [f"{task_id} succeeded - 0"]
    assert served.lines("logs", task_id) == ["from redis-cli"]
    assert served.ended(task_id).queue == "default"


def test_what_cannot_run_is_a_dead_letter_with_its_bytes(served: Program) -> None:
    documents = [b'{"image": ', b"\xff\xfe"]
    entries = [redis_cli(served.url, "-x", "XADD", STREAM, "*", "task", stdin=d) for d in documents]
    ids = [f"default.{entry}" for entry in entries]
    for task_id in ids:
        assert served.ended(task_id).reason == "invalid"
    letters = {letter["id"]: letter for letter in served.json("dead", "list")}
    assert letters[ids[0]]["task"] == '{"image": '
    assert letters[ids[0]]["reason"] == "invalid"
    assert letters[ids[1]]["task"] is None
    assert base64.b64decode(letters[ids[1]]["task_base64"]) == documents[1]
    assert served.lines("dead", "list", "--limit", "1")[0].split()[0] == "ID"


def test_tasks_nobody_has_taken_yet_are_seen(program: Program) -> None:
    entry = redis_cli(program.url, "XADD", STREAM, "*", "task", '{"image": "busybox"}')
    until(lambda: program.json("list")[0]["id"] == f"default.{entry}")
    assert program.json("status", f"default.{entry}")["state"] == "queued"
    assert program.json("instances") == []
    assert program.json("dead", "list") == []
