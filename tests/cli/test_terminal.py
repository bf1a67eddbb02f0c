"""What reaches a terminal: nothing that a task made up to act on it."""

from __future__ import annotations

import os
import re

import pytest

from dispatcher.client import Task
from tests.cli.program import Program
from tests.support.engine import EngineUnderTest
from tests.support.registry import RegistryUnderTest

CONTROL = b"\x1b]0;owned\x07\x1b[2J\xc2\x9b31m"
MARKUP = "[bold red]\x1b[31mnot red[/]"


@pytest.fixture(scope="session")
def hostile(served: Program) -> str:
    """A task whose output and message are made to act on a terminal."""
    with served.client() as client:
        script = r'printf "\033]0;owned\007\033[2J\302\23331m\n"'
        task_id = client.submit(Task(image="busybox", command=["sh", "-c", script])).id
        client.submit(Task(image="busybox", id="hostile-message", command=[f"/no/such/{MARKUP}"]))
        client.wait(task_id, timeout=20)
        assert client.wait("hostile-message", timeout=20).reason == "start_failed"
    return task_id


def test_output_is_unmodified_without_a_terminal_and_harmless_on_one(served: Program, hostile: str) -> None:
    assert served.run("logs", hostile).stdout == CONTROL + b"\n"
    assert served.on_terminal("logs", hostile) == rb"\x1b]0;owned\x07\x1b[2J\x9b31m" + b"\r\n"


@pytest.mark.parametrize("arguments", [["status", "hostile-message"], ["dead", "list"]])
def test_messages_are_text_and_nothing_more(served: Program, hostile: str, arguments: list[str]) -> None:
    seen = served.on_terminal(*arguments, NO_COLOR="1")
    assert b"\x1b" not in seen
    flat = b"".join(seen.split())
    assert b"[boldred]\\x1b[31mnotred[/]" in flat


def test_json_has_no_control_characters_either(served: Program, hostile: str) -> None:
    shown = served.run("logs", "--json", hostile).stdout
    assert not {*shown} & {0x1B, 0x07, 0x9B}
    assert "\x9b" in served.json("logs", hostile)["output"]


def test_colour_is_for_terminals_and_can_be_declined(served: Program, hostile: str) -> None:
    assert b"\x1b[" in served.on_terminal("list")
    assert b"\x1b" not in served.on_terminal("list", NO_COLOR="1")
    assert b"\x1b" not in served.run("list").stdout


def test_waiting_has_a_status_line_on_a_terminal(served: Program) -> None:
    seen = served.on_terminal("submit", "--wait", "busybox", "--", "sleep", "1")
    assert b": running" in seen
    assert b"\r\x1b[K" in seen


@pytest.mark.timeout(120)
def test_the_status_line_tells_how_far_a_pull_is(
    program: Program, engine: EngineUnderTest, registry: RegistryUnderTest
) -> None:
    image = registry.push(engine, "pulled-slowly", payload=os.urandom(40_000_000))
    settings = {"BACKEND": "docker", "DOCKER_HOST": engine.base_url, "DEFAULT_NETWORK": "none"}
    beside = Program(program.url, program.home, settings)
    with beside.serving():
        seen = beside.on_terminal("submit", "--wait", image, "--", "true")
    assert re.search(rb": pulling [^\r]*pulled-slowly:1", seen)


def test_errors_repeat_nothing_harmful(served: Program) -> None:
    done = served.run("status", "\x1b[31mred", exit_code=3)
    assert b"\x1b" not in done.stderr
