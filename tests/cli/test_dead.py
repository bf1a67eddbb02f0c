"""``dead list``, ``dead retry`` and ``dead drop``, as users call them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dispatcher.client import Task
from tests.cli.program import Program, redis_cli
from tests.support.redis_server import RedisUnderTest

STREAM = "dispatcher:tasks"


@pytest.fixture
def alone(redis_server: RedisUnderTest, tmp_path: Path) -> Iterator[Program]:
    """An instance that nobody else counts the dead letters of."""
    program = Program(redis_server.url, tmp_path)
    with program.serving():
        yield program


def died(program: Program, document: str) -> str:
    """A plain entry that is dead now."""
    task_id = f"default.{redis_cli(program.url, 'XADD', STREAM, '*', 'task', document)}"
    assert program.ended(task_id).state == "failed"
    return task_id


@pytest.mark.timeout(180)  # some twenty processes
def test_dead_letters_are_retried_and_dropped(alone: Program) -> None:
    with alone.client() as client:
        first = client.submit(Task(image="x", command=["true"], network="nowhere")).id
        client.wait(first, timeout=20)
    broken = died(alone, '{"image": ')
    assert [letter["id"] for letter in alone.json("dead", "list")] == [broken, first]

    (new,) = alone.lines("dead", "retry", first)
    assert alone.json("status", new)["retry_of"] == first
    assert f"retry of {first}" in " ".join(alone.run("status", new).stdout.decode().split())
    assert alone.lines("dead", "retry", first) == [new], "asked again"
    assert alone.ended(new).reason == "rejected", "it is what it was"

    done = alone.run("dead", "retry", broken, exit_code=2)
    assert b"Invalid JSON" in done.stderr
    assert b"`dispatcher dead list --json` has the original" in done.stderr
    done = alone.run("dead", "retry", "nobody", broken, new, "--json", exit_code=3)
    assert b"no dead letter 'nobody'" in done.stderr
    (made,) = json.loads(done.stdout)
    assert (made["dead"], alone.ended(made["id"]).state) == (new, "failed")

    done = alone.run("dead", "retry", "--all", exit_code=2)
    (again,) = done.stdout.decode().split()
    assert alone.ended(again).retry_of == made["id"]
    done = alone.run("dead", "drop", broken, "nobody", exit_code=3)
    assert done.stdout.decode().split() == [broken]
    assert len(alone.lines("dead", "drop", "--all")) == 1
    assert alone.json("dead", "list") == []
    assert alone.run("dead", "retry", "--all").stdout == b""


@pytest.mark.parametrize("verb", ["retry", "drop"])
def test_some_or_all_must_be_named(program: Program, verb: str) -> None:
    for arguments in ([], ["--all", "x"]):
        done = program.run("dead", verb, *arguments, exit_code=2)
        assert b"--all" in done.stderr
