"""Cancellations race with launches, ends, retries and each other: one end each, and no program survives."""

from __future__ import annotations

import os
import random
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dispatcher.client import Backoff
from tests.chaos.ground import DockerGround, Ground, ProcessGround
from tests.chaos.world import World
from tests.cli.program import until
from tests.support.engine import EngineUnderTest

SEED = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(10**6))
#: Who hands tasks in and cancels them, at the same time.
WORKERS = 24
#: Seconds after its submission in which a task is cancelled: a start takes about as long as most.
PATIENCE = (0.0, 0.02, 0.1, 0.4, 0.8)
ENDINGS = frozenset({"succeeded", "failed:exit:3"})


def hammer(world: World, rng: random.Random, name: str) -> None:
    """Hand one task in, and cancel it in some phase, by two who want that at the same time."""
    script = rng.choice(["sleep 600", "sleep 600", "exit 0", "sleep 0.2; exit 3", "exit 3"])
    world.submit(
        script,
        endings=ENDINGS,
        id=name,
        grace_period=0.1,
        max_attempts=2,
        backoff=Backoff(initial=0.1, max=0.2),
        **({"delay": 0.2} if rng.random() < 0.2 else {}),
    )
    threading.Event().wait(rng.choice(PATIENCE) * rng.uniform(0.5, 1.5))
    other = threading.Thread(target=world.cancel, args=(name,))
    if rng.random() < 0.3:
        other.start()
    world.cancel(name)
    if other.ident is not None:
        other.join()


def programs_of(prefix: str) -> list[str]:
    """The command lines of all programs that run for tasks of such names, as this host sees them."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"DISPATCHER_TASK_ID={prefix}".encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended meanwhile
    return found


def raced(home: Path, ground: Ground, count: int) -> None:
    prefix = f"race-{secrets.token_hex(4)}"
    dice = random.Random(SEED)
    with World(home, ground, RECONCILE_GRACE="1") as world:
        for name in ("a", "b"):
            world.member(name, wait=False)
        for member in world.members.values():
            member.wait_started()
        with ThreadPoolExecutor(WORKERS) as workers:
            races = [
                workers.submit(hammer, world, random.Random(dice.random()), f"{prefix}-{number}")
                for number in range(count)
            ]
            for race in races:
                race.result()
        # Nothing waits for its time: most have ended already, and what is cancelled soon has.
        assert not world.settled(30), f"seed {SEED}"
        until(lambda: not programs_of(prefix), 20, what=f"seed {SEED}: {programs_of(prefix)}")
        findings = world.judged()
        assert not findings.broken(), f"seed {SEED}: {findings}"
        states = {result.state for result in world.truth().results}
        assert "cancelled" in states


@pytest.mark.timeout(180)
def test_a_cancellation_in_any_phase_leaves_one_end_and_no_program(tmp_path: Path) -> None:
    raced(tmp_path, ProcessGround(tmp_path), 150)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_nor_a_container(tmp_path: Path, engine: EngineUnderTest) -> None:
    raced(tmp_path, DockerGround(engine), 60)
