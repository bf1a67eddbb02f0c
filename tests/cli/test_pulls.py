"""A task that waits for its image, as commands show it."""

from __future__ import annotations

import json

import pytest

from tests.cli.program import Program, redis_cli

IMAGE = "registry.example/app:1"
PULL = {
    "image": IMAGE, "registry": "registry.example", "active": True, "ahead": False, "waiters": 1,
    "waiting": ["cold"], "bytes_done": 12_300_000, "bytes_total": 40_000_000, "layers_done": 3,
    "layers_total": 5, "tries": 1,
}  # fmt: skip
WORDS = f"pulling {IMAGE}: 12.3 of 40.0 MB, 3 of 5 layers"


@pytest.fixture
def pulling(program: Program) -> Program:
    """An instance has told of a pull that the task ``cold`` waits for."""

    def key(name: str) -> str:
        return f"{{dispatcher:tasks}}:{name}"

    info = json.dumps({"state": "running", "pulls": [PULL], "cooling": {"slow.example": 12.0}})
    program.submit("true", id="cold")
    fields = ["state", "pulling", "instance", "host-1", "image", IMAGE]
    redis_cli(program.url, "HSET", key("task:cold"), *fields)
    redis_cli(program.url, "HSET", key("meta:instances"), "host-1", info)
    return program


def test_status_and_list_say_how_far_the_pull_is(pulling: Program) -> None:
    lines = dict(line.split(maxsplit=1) for line in pulling.lines("status", "cold"))
    assert (lines["state"], lines["image"], lines["pull"]) == ("pulling", IMAGE, WORDS)
    shown = pulling.json("status", "cold")
    assert shown["image"] == IMAGE
    assert shown["pull"] == {
        "registry": "registry.example", "active": True, "position": 0, "bytes_done": 12_300_000,
        "bytes_total": 40_000_000, "layers_done": 3, "layers_total": 5, "cooling_seconds": None,
    }  # fmt: skip
    assert pulling.lines("list")[1].endswith(WORDS)


def test_instances_show_pulls_and_registries_that_are_left_alone(pulling: Program) -> None:
    (_, row) = pulling.lines("instances")
    assert f"{IMAGE} 12.3/40.0 MB (1 wait); slow.example is left alone for 12 s" in row
    (shown,) = pulling.json("instances")
    assert shown["info"]["pulls"] == [PULL]
