"""One task, from ``submit`` to its logs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from tests.cli.program import Program, until

STATUS_FIELDS = {
    "id", "state", "queue", "attempt", "reason", "message", "exit_code", "accepted_at", "started_at",
    "finished_at", "not_before", "instance", "container_id", "daemon", "traceparent", "cancel_requested",
    "takeovers", "retry_of", "image", "pull",
}  # fmt: skip


def test_submit_prints_the_id_alone_and_the_rest_follows(served: Program) -> None:
    script = ["sh", "-c", "echo out; echo err >&2"]
    (task_id,) = served.lines("submit", "-e", "A=b", "-l", "team=blue", "busybox", "--", *script)
    assert re.fullmatch(r"[0-9a-f]{32}", task_id)
    assert served.lines("wait", task_id) == [f"{task_id} succeeded - 0"]
    assert sorted(served.lines("logs", task_id)) == ["err", "out"]
    status = served.json("status", task_id)
    assert status.keys() == STATUS_FIELDS
    assert (status["state"], status["exit_code"], status["reason"]) == ("succeeded", 0, None)
    for name in ("accepted_at", "started_at", "finished_at"):
        assert status[name].endswith("Z")
        assert datetime.fromisoformat(status[name]).tzinfo is not None
    assert "succeeded" in served.run("status", task_id).stdout.decode()


def test_wait_mirrors_the_containers_exit_code(served: Program) -> None:
    done = served.run("submit", "--wait", "busybox", "--", "sh", "-c", "exit 7", exit_code=7)
    (task_id,) = done.stdout.decode().split()
    assert served.ended(task_id).exit_code == 7
    assert task_id in done.stderr.decode()


def test_follow_writes_the_output_alone_and_mirrors_as_well(served: Program) -> None:
    script = 'printf "\\001\\377first\\n"; echo "$GREETING" >&2; exit 3'
    arguments = ["submit", "--follow", "-e", "GREETING=hi", "busybox", "--", "sh", "-c", script]
    done = served.run(*arguments, exit_code=3)
    assert done.stdout == b"\x01\xfffirst\nhi\n"


def test_a_failure_that_is_ours_is_125(served: Program) -> None:
    done = served.run("submit", "--wait", "busybox", "--", "/no/such/program", exit_code=125)
    assert b"start_failed" in done.stderr


def test_a_cancelled_task_is_no_success(served: Program) -> None:
    arguments = ["submit", "--wait", "--id", "cancelled-while-waited-for", "busybox"]
    with served.started(*arguments, "--", "sh", "-c", "trap 'exit 0' TERM; sleep 60 & wait") as waiting:
        waiting.says("running")
        assert served.lines("cancel", "cancelled-while-waited-for") == ["cancelled-while-waited-for"]
        assert waiting.ends() != 0
    assert served.ended("cancelled-while-waited-for").state == "cancelled"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_waiting_and_not_the_task(
    served: Program, signum: signal.Signals, code: int
) -> None:
    task_id = f"outlives-its-waiter-{signum}"
    with served.started("submit", "--wait", "--id", task_id, "busybox", "--", "sleep", "60") as waiting:
        waiting.says("running")
        assert waiting.ends(signum) == code
        assert "Traceback" not in waiting.stderr
        assert f"dispatcher cancel {task_id}" in waiting.stderr
    with served.client() as client:
        assert client.status(task_id).state == "running"
        client.cancel(task_id)
    assert served.lines("wait", task_id, exit_code=1)[0].startswith(f"{task_id} cancelled")


def test_options_become_the_task(served: Program, tmp_path: Path) -> None:
    script = 'echo "$PWD $A $B ${MISSING-unset} $DISPATCHER_ATTEMPT"'
    options = ["-w", str(tmp_path), "--env", "A=x=y", "-e", "B", "-e", "MISSING", "--max-attempts", "2"]
    arguments = ["--timeout", "9.5", "--memory", "512m", "--cpus", "0.5", "--pull-policy", "never"]
    done = served.run(
        "submit", "--follow", *options, *arguments, "busybox", "--", "sh", "-c", script, B="here"
    )
    assert done.stdout.decode() == f"{tmp_path} x=y here unset 1\n"


def test_a_file_is_a_task_and_options_win(served: Program, tmp_path: Path) -> None:
    script = 'echo "$A$B"'
    document = {"image": "busybox", "command": ["sh", "-c", script], "env": {"A": "1", "B": "2"}}
    file = tmp_path / "task.json"
    file.write_text(json.dumps(document))
    assert served.run("submit", "--follow", "--file", str(file)).stdout == b"12\n"
    with_options = ["submit", "--follow", "--file", "-", "-e", "B=3"]
    assert served.run(*with_options, stdin=file.read_bytes()).stdout == b"13\n"
    done = served.run("submit", "--file", "-", stdin=b'{"image": "busybox", "comand": []}', exit_code=2)
    assert b"comand: unknown field" in done.stderr
    served.run("submit", "--file", "-", "-e", "A=1", stdin=b"{", exit_code=2)


def test_an_idempotency_key_gives_the_same_task(served: Program) -> None:
    key = ["submit", "--idempotency-key", "order-1"]
    assert served.lines(*key, "busybox") == served.lines(*key, "busybox")
    done = served.run("submit", "--idempotency-key", "order-1", "other", exit_code=2)
    assert b"other content" in done.stderr


def test_list_filters(served: Program) -> None:
    failed, held = served.submit("exit 1", queue="low"), served.submit("true", delay=600.0)
    served.ended(failed)
    found = served.json("list", "--state", "failed", "--queue", "low")
    assert [task["id"] for task in found] == [failed]
    assert held in [task["id"] for task in served.json("list", "--state", "scheduled")]
    assert len(served.json("list", "--limit", "1")) == 1
    header, *rows = served.lines("list", "--state", "failed", "--queue", "low")
    assert header.split() == ["ID", "STATE", "REASON", "QUEUE", "ATTEMPT", "EXIT", "ACCEPTED", "MESSAGE"]
    assert rows[0].split()[:6] == [failed, "failed", "exit", "low", "1", "1"]


def test_wait_for_several(served: Program) -> None:
    good, bad = served.submit("true"), served.submit("exit 4")
    assert sorted(served.lines("wait", good, bad, exit_code=1)) == sorted(
        [f"{good} succeeded - 0", f"{bad} failed exit 4"]
    )
    assert [task["id"] for task in served.json("wait", bad, good, exit_code=1)] == [bad, good]
    assert served.lines("wait", good, "unknown", exit_code=3) == [f"{good} succeeded - 0"]


def test_wait_gives_up_in_time(served: Program) -> None:
    task_id = served.submit("true", delay=600.0)
    done = served.run("wait", "--timeout", "0.1", task_id, exit_code=124)
    assert done.stdout == b""
    assert task_id in done.stderr.decode()
    assert served.lines("cancel", task_id) == [task_id]
    assert served.ended(task_id).state == "cancelled"


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "wait"])
def test_an_unknown_task_is_3(served: Program, command: str) -> None:
    done = served.run(command, "no-such-task", exit_code=3)
    assert done.stdout == b""
    assert done.stderr.decode().splitlines() == ["dispatcher: no task 'no-such-task'"]


def test_one_that_had_ended_is_not_cancelled(served: Program) -> None:
    task_id = served.submit("true")
    served.ended(task_id)
    done = served.run("cancel", task_id)
    assert done.stdout == b""
    assert b"had ended before: succeeded" in done.stderr


def test_logs_tail_and_json(served: Program) -> None:
    task_id = served.submit("for i in 1 2 3 4 5; do echo line $i; done")
    served.ended(task_id)
    assert served.lines("logs", task_id, "--tail", "2") == ["line 4", "line 5"]
    assert served.lines("logs", task_id, "-f", "-n", "1") == ["line 5"]
    assert served.lines("logs", task_id, "--tail", "0") == []
    shown = served.json("logs", task_id, "--tail", "1")
    assert shown == {"id": task_id, "attempt": 1, "total_bytes": 35, "dropped_bytes": 0, "output": "line 5\n"}


def test_logs_follow_a_running_task_to_its_end(served: Program, tmp_path: Path) -> None:
    go = tmp_path / "go"
    task_id = served.submit(f"echo one; echo two; while ! test -e {go}; do sleep 0.05; done; echo three")
    served.until_running(task_id)
    until(lambda: served.lines("logs", task_id) == ["one", "two"])
    with served.started("logs", "--follow", "--tail", "1", task_id) as following:
        assert following.process.stdout is not None
        assert following.process.stdout.readline() == b"two\n"
        go.touch()
        assert following.process.stdout.read() == b"three\n"
        assert following.ends() == 0


def test_whoever_reads_may_stop_reading(served: Program) -> None:
    task_id = served.submit("seq 1 8000")
    served.ended(task_id)
    for command in (["logs", task_id], ["schema"]):
        with served.started(*command) as writing:
            assert writing.process.stdout is not None
            writing.process.stdout.close()
            assert writing.ends() == 141
            assert writing.stderr == ""
    line = f"{subprocess.list2cmdline(served.command('logs', task_id))} | head -n 1"
    done = subprocess.run(["sh", "-c", line], env=served.environment(), capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"1\n", b"")


def test_following_says_what_of_the_output_is_not_there(served: Program) -> None:
    task_id = served.submit("seq 1 100000")
    served.ended(task_id)
    done = served.run("logs", "--follow", task_id)
    assert done.stdout.endswith(b"99999\n100000\n")
    assert f"{588_895 - len(done.stdout)} bytes before this were not kept" in done.stderr.decode()
