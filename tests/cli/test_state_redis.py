"""What a user is told while the Redis for output is away."""

from __future__ import annotations

from tests.cli.program import Program
from tests.support.redis_server import free_port


def test_only_the_output_is_missing_and_that_is_said(served: Program) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    done = served.run(
        "submit", "--follow", "any", "--", "sh", "-c", "echo hi; exit 7", STATE_REDIS_URL=away, exit_code=7
    )
    assert done.stdout == b""
    assert b"the Redis that keeps tasks' output (STATE_REDIS_URL) is away; the tasks go on" in done.stderr

    task_id = served.submit("echo hi")
    assert served.lines("wait", task_id, STATE_REDIS_URL=away) == [f"{task_id} succeeded - 0"]
    assert served.json("status", task_id, STATE_REDIS_URL=away)["exit_code"] == 0
    for more in ([], ["--follow"], ["--json"]):
        done = served.run("logs", task_id, *more, STATE_REDIS_URL=away, exit_code=4)
        assert done.stdout == b""
        assert b"STATE_REDIS_URL" in done.stderr
    done = served.run("logs", "nobody", STATE_REDIS_URL=away, exit_code=3)
    assert b"no task 'nobody'" in done.stderr
