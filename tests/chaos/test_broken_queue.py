"""Somebody deletes what lies in Redis, or Redis stops or dies: what heals, and what is lost."""

from __future__ import annotations

import random
import secrets
import time
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import State
from tests.chaos.ground import ProcessGround
from tests.chaos.producer import Producer
from tests.chaos.truth import BASE, GROUP, STREAM
from tests.chaos.world import LEASE, World
from tests.cli.program import until

TIMEOUT = 60.0
SEED = secrets.randbelow(10**6)


def gated(world: World) -> str:
    return f"until [ -e {world.home}/gate ]; do sleep 0.05; done; exit 4"


def open_gate(world: World) -> None:
    (world.home / "gate").touch()


def begun(world: World, *task_ids: str) -> None:
    until(lambda: all(world.client.status(i).state is State.RUNNING for i in task_ids), TIMEOUT)
    until(lambda: all(world.ground.starts("")[i, 1] for i in task_ids), TIMEOUT)


def pair(world: World, **environment: str) -> None:
    """Two dispatchers."""
    for name in ("a", "b"):
        world.member(name, wait=False, **environment)
    for member in world.members.values():
        member.wait_started()


@pytest.mark.timeout(120)
def test_after_flushall_programs_run_on_and_new_tasks_run(tmp_path: Path) -> None:
    ground = ProcessGround(tmp_path)
    with World(tmp_path, ground, RECONCILE_GRACE="1") as world:
        pair(world)
        lost = [world.submit(gated(world), endings={"failed:exit:4"}) for _ in range(4)]
        begun(world, *lost)
        waiting = world.submit("exit 0", delay=3600)
        world.server.command("FLUSHALL")
        # Whose tasks are gone is said, and their programs are left alone.
        for task_id in lost:
            until(
                lambda: any(f'"{task_id}"' in line for line in told(world, "lease.lost")),  # noqa: B023 - ends first
                TIMEOUT,
            )
            until(
                lambda: any(f'"{task_id}"' in line for line in told(world, "container.unknown")),  # noqa: B023 - ends first
                TIMEOUT,
            )
        new = [world.submit("exit 0") for _ in range(10)]
        until(lambda: all(world.client.status(i).state.terminal for i in new), TIMEOUT)
        assert ground.ledger.lines("end").keys().isdisjoint({(i, 1) for i in lost})
        open_gate(world)
        until(lambda: all(ground.ledger.lines("end")[i, 1] for i in lost), TIMEOUT)
        findings = world.judged(timeout=2)
        # Their programs ran to their end and nothing of them is left, but nobody can tell how they
        # ended; and what waited is gone. Nothing else is wrong.
        assert findings.broken() == {"lost": tuple(sorted([*lost, waiting]))}
        assert not world.deaths()


def told(world: World, event: str) -> list[str]:
    """The lines in which dispatchers have logged this event."""
    return [
        line
        for member in world.members.values()
        for line in member.stderr.splitlines()
        if f'"{event}"' in line
    ]


@pytest.mark.timeout(120)
def test_whatever_an_operator_deletes_of_the_stream_submitted_tasks_come_back(tmp_path: Path) -> None:
    """A plain entry lies in the stream alone: with the stream it is gone, and as nobody has read it,
    nobody knows of it. All else heals."""
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        member = world.member("a", NUM_CONSUMERS="1")
        busy = world.submit(gated(world), endings={"failed:exit:4"})
        begun(world, busy)
        slips: list[tuple[tuple[str, ...], bool]] = [
            (("DEL", STREAM), False),
            (("XTRIM", STREAM, "MAXLEN", "0"), False),
            (("XGROUP", "DESTROY", STREAM, GROUP), True),
            (("XGROUP", "DELCONSUMER", STREAM, GROUP, member.instance), True),
            (("SCRIPT", "FLUSH"), True),
        ]
        gone = []
        for words, plain_survives in slips:
            world.submit("exit 0")
            world.submit("exit 0", queue="low")
            plain = world.xadd("exit 0")
            if not plain_survives:
                gone.append(plain)
            world.server.command(*words)
            until(lambda: group_exists(world), TIMEOUT)
        member.says("tasks.were_nowhere")
        open_gate(world)
        until(lambda: world.settled(0) <= set(gone), TIMEOUT)
        findings = world.judged(timeout=0.5)
        assert findings.broken() == {"lost": tuple(sorted(gone))}


def group_exists(world: World) -> bool:
    with world.server.client() as client:
        groups: Any = client.xinfo_groups(STREAM) if client.exists(STREAM) else []
    return bool(groups)


@pytest.mark.timeout(120)
def test_while_redis_stands_still_beyond_the_lease_nothing_is_taken_over(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        pair(world, NUM_CONSUMERS="4")
        running = [world.submit(gated(world), endings={"failed:exit:4"}) for _ in range(8)]
        begun(world, *running)
        world.server.stop()
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 2 * LEASE, TIMEOUT)
        world.server.resume()
        until(lambda: calm_is_over(world), TIMEOUT)
        # One may be unlucky. It is adopted then, and runs on all the same.
        assert sum(world.client.status(task_id).takeovers for task_id in running) <= 1
        open_gate(world)
        findings = world.judged()
        assert not findings.broken(), findings


def calm_is_over(world: World) -> bool:
    """Whether what has lapsed is taken over again, and has been for some ticks."""
    with world.server.client() as client:
        calm_until: Any = client.hget(f"{BASE}meta:counters", "calm_until")
        last_tick: Any = client.hget(f"{BASE}meta:counters", "last_tick")
    return bool(calm_until) and int(last_tick) > int(calm_until) + 500


@pytest.mark.timeout(180)
def test_a_redis_killed_again_and_again_under_load_loses_nothing(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        pair(world)
        with Producer(world, random.Random(SEED), backlog=24):
            for _ in range(5):
                before = len(world.book.ended)
                until(lambda: len(world.book.ended) >= before + 8, TIMEOUT)  # noqa: B023 - ends first
                world.server.kill()
                world.server.start()
        findings = world.judged()
        assert not findings.broken(), f"seed {SEED}: {findings}"
