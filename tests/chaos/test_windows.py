"""A dispatcher fails in each window of a task's journey: the task ends once, by another's care.

Killed, stopped beyond its lease, or blocked beyond it. What was begun is not begun again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dispatcher.failpoints import POINTS
from tests.chaos.ground import DockerGround, ProcessGround
from tests.chaos.member import Member
from tests.chaos.windows import SILENT, Trial, windows
from tests.chaos.world import LEASE, World
from tests.support.engine import EngineUnderTest

#: Where a stopped owner could start, or write, what is another's by now.
ZOMBIES = ("before_create", "after_create", "before_start", "running", "after_exit", "before_finish")
#: Seconds that a blocked dispatcher does nothing: others must have noticed meanwhile.
BLOCKED = 5 * LEASE


def died(victim: Member) -> bool:
    if victim.alive:
        return False
    assert victim.ended() == -signal.SIGKILL, victim.stderr[-2000:]
    return True


def killed(trial: Trial, struck: Callable[[Member], bool]) -> None:
    world = trial.world
    trial.begin()
    trial.watch(struck)
    trial.in_time()
    trial.first_attempts()
    for window in trial.windows:
        world.dismiss(window.victim)
    findings = world.judged()
    assert not findings.broken(), findings


@pytest.mark.timeout(180)
def test_whoever_is_killed_in_any_window_is_followed_by_another(tmp_path: Path) -> None:
    points = tuple(point for point in POINTS if point != "during_pull")
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        killed(Trial(world, windows(points), "kill"), died)


@pytest.mark.timeout(240)
def test_so_it_is_with_containers(tmp_path: Path, engine: EngineUnderTest) -> None:
    ground = DockerGround(engine)
    with World(tmp_path, ground, RECONCILE_GRACE="1") as world:
        absent = ground.absent_image()

        def struck(victim: Member) -> bool:
            dead = died(victim)
            if dead and victim.name == "during-pull":
                ground.provide(absent)
            return dead

        trial = Trial(world, windows(POINTS), "kill")
        for window in trial.windows:
            if window.point == "during_pull":
                window.fields["image"] = absent
        killed(trial, struck)


def zombies_in_each(world: World, action: str, points: tuple[str, ...]) -> Trial:
    trial = Trial(world, windows(points), action)
    trial.begin()
    return trial


def goes_on_in_vain(trial: Trial) -> None:
    trial.zombies_know()
    trial.first_attempts()
    findings = trial.world.judged()
    assert not findings.broken(), findings


@pytest.mark.timeout(180)
def test_whoever_is_stopped_beyond_its_lease_starts_and_writes_nothing_more(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        trial = zombies_in_each(world, "stop", ZOMBIES)
        trial.watch(lambda victim: victim.stopped)
        trial.in_time()
        for window in trial.windows:
            window.victim.resume()
        goes_on_in_vain(trial)


@pytest.mark.timeout(180)
def test_whoever_is_blocked_beyond_its_lease_starts_and_writes_nothing_more(tmp_path: Path) -> None:
    def silent(victim: Member) -> bool:
        seen = {instance.id: instance.seen_seconds for instance in world.client.instances()}
        return seen.get(victim.instance, 0.0) > SILENT

    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        trial = zombies_in_each(world, f"block={BLOCKED:g}", ("before_start", "running", "before_finish"))
        trial.watch(silent)
        for window in trial.windows:
            window.victim.away = False
        goes_on_in_vain(trial)
