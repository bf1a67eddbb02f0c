"""``demo``: the main job on a bare machine, checked by itself."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli.program import Program, until
from tests.support.engine import EngineUnderTest
from tests.support.registry import RegistryUnderTest

ENDS = {
    "succeeds": "succeeded",
    "fails": "failed: exit 3",
    "fails, then succeeds": "succeeded",
    "takes too long": "failed: timeout",
    "is cancelled": "cancelled",
    "has no such program": "failed: start_failed",
    "comes by plain XADD": "succeeded",
    "is no JSON": "failed: invalid",
}


@pytest.fixture
def bare(tmp_path: Path) -> Program:
    """A machine with neither Redis nor an engine; and with settings the demo has to do without."""
    environment = {"DOCKER_HOST": f"unix://{tmp_path}/no-engine", "QUEUES": "other:1", "NUM_CONSUMERS": "1"}
    return Program("redis://127.0.0.1:1/0", tmp_path, environment)


def test_every_task_ends_as_it_should_without_an_engine(bare: Program) -> None:
    done = bare.run("demo", "--json")
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["backend"] == "process"
    assert "Docker engine does not answer" in report["backend_reason"]
    assert {task["name"]: task["got"] for task in report["tasks"]} == ENDS
    assert {task["name"]: task["attempts"] for task in report["tasks"]}["fails, then succeeds"] == 2
    told = done.stderr.decode()
    assert "using child processes of this host" in told
    assert "takes too long: running" in told


def test_its_table_and_its_end_on_a_terminal(bare: Program) -> None:
    seen = bare.on_terminal("demo", NO_COLOR="1").decode()
    assert "LAST LINE OF OUTPUT" in seen
    assert "attempt 2" in seen
    assert "all 8 tasks ended as they should" in seen


def test_kept_up_it_can_be_used_until_it_is_stopped(bare: Program) -> None:
    with bare.started("demo", "--keep") as running:
        running.says("--redis-url")
        url = running.stderr.rpartition("--redis-url ")[2].split()[0]
        assert Program(url, bare.home).lines("submit", "--follow", "x", "--", "echo", "hi") == ["hi"]
        assert running.ends(signal.SIGINT) == 0
        assert not Path(url.removeprefix("unix://")).exists()


def test_stopped_halfway_it_leaves_nothing_behind(bare: Program) -> None:
    with bare.started("demo") as running:
        running.says("takes too long: running")
        assert running.ends(signal.SIGTERM) == 143
        assert "Traceback" not in running.stderr
    left = bare.home.glob("**/redis.sock")
    assert not list(left)


def containers(engine: EngineUnderTest) -> set[str]:
    """All there are on the engine, by id."""
    return {container["Id"] for container in engine.client.containers(all=True)}


@pytest.mark.timeout(120)
def test_an_engine_that_answers_is_used(bare: Program, engine: EngineUnderTest) -> None:
    # Other tests kill dispatchers, and so leave containers of theirs.
    before = containers(engine)
    done = bare.run("demo", "--json", "--image", engine.image, DOCKER_HOST=engine.base_url)
    report = json.loads(done.stdout)
    assert (report["ok"], report["backend"], report["pulls"]) == (True, "docker", None)
    assert "no pull to show" in done.stderr.decode()
    until(lambda: containers(engine) <= before, what="it left containers behind")


@pytest.mark.timeout(120)
def test_tasks_share_one_pull_of_a_cold_image(
    bare: Program, engine: EngineUnderTest, registry: RegistryUnderTest
) -> None:
    image = registry.push(engine, "demo-cold")
    done = bare.run("demo", "--json", "--image", image, DOCKER_HOST=engine.base_url)
    report = json.loads(done.stdout)
    assert (report["ok"], report["backend"], report["pulls"]) == (True, "docker", 1)
    assert sum(task["name"].startswith("shares a pull") for task in report["tasks"]) == 5
    assert f"1 pull of {image} for 12 tasks" in done.stderr.decode()


@pytest.mark.timeout(120)
def test_an_image_nobody_gives_is_no_reason_to_fail(bare: Program, engine: EngineUnderTest) -> None:
    image = "127.0.0.1:1/none/such:1"
    report = bare.json("demo", "--image", image, DOCKER_HOST=engine.base_url)
    assert (report["ok"], report["backend"]) == (True, "process")
    assert image in report["backend_reason"]
