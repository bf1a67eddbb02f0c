"""A task that brings down whoever takes it is given up after MAX_DELIVERIES; the others go on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dispatcher.client import State
from tests.chaos.ground import DockerGround, Ground, ProcessGround
from tests.chaos.world import LOOK, World
from tests.support.engine import EngineUnderTest

MAX_DELIVERIES = 5
NAMES = ("a", "b")
#: Seconds until it must have been given up: a start and a lease for each dispatcher it kills.
TIMEOUT = 90.0


def plant(world: World, point: str, script: str) -> tuple[str, int]:
    """Hand a task in that kills its dispatcher at ``point``, begin each anew that it kills, and let
    other tasks come and go meanwhile; its id, and how many it has killed."""
    bomb, killed = f"bomb-{point}", 0
    failpoint = f"{point}:kill@{bomb}"
    for name in NAMES:
        world.member(name, failpoint=failpoint)
    world.submit(script, endings={"failed:poison"}, id=bomb)
    other = world.submit("exit 0")
    deadline = time.monotonic() + TIMEOUT
    while not world.client.status(bomb).state.terminal:
        for member in world.members.values():
            if not member.alive:
                killed += 1
                member.start(failpoint=failpoint, wait=False)
        if world.client.status(other).state.terminal:
            other = world.submit("sleep 0.1")
        assert time.monotonic() < deadline, world.client.status(bomb)
        time.sleep(LOOK)
    return bomb, killed


def is_given_up(world: World, point: str, script: str) -> None:
    bomb, killed = plant(world, point, script)
    status = world.client.status(bomb)
    assert (status.state, status.reason, status.attempt) == (State.FAILED, "poison", 1)
    assert f"{MAX_DELIVERIES} times" in status.message
    # A death long after the taking does not count: on a slow machine a start may take that long.
    assert killed == MAX_DELIVERIES if point == "after_take" else killed <= MAX_DELIVERIES + 2
    assert status.takeovers >= killed >= MAX_DELIVERIES


def given_up_at(ground: Ground, home: Path, *points: str) -> None:
    with World(home, ground, MAX_DELIVERIES=str(MAX_DELIVERIES), RECONCILE_GRACE="1") as world:
        for point in points:
            is_given_up(world, point, "sleep 600")
        # What the last one left running is stopped and removed, though its task has ended.
        findings = world.judged()
        assert not findings.broken(), findings
        starts = world.truth().starts
        assert starts["bomb-running", 1] == 1
        assert starts["bomb-after_take", 1] == 0


@pytest.mark.timeout(240)
def test_a_task_that_kills_its_dispatchers_is_given_up_and_no_other(tmp_path: Path) -> None:
    given_up_at(ProcessGround(tmp_path), tmp_path, "after_take", "running")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_so_is_a_container(tmp_path: Path, engine: EngineUnderTest) -> None:
    given_up_at(DockerGround(engine), tmp_path, "running")
