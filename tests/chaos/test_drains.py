"""Dispatchers leave by SIGTERM, and come again: what runs goes on, nothing is taken over or repeated."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispatcher.client import State
from tests.chaos.ground import ProcessGround
from tests.chaos.member import Member
from tests.chaos.world import LOOK, World
from tests.cli.program import until

TIMEOUT = 60.0
#: Seconds of a lease here: a machine that is busy must not let one lapse by itself.
LEASE = 4.0
#: Seconds of a task that outlasts a lease, and what an instance waits for such a one.
LONGER = LEASE + 1
PATIENCE = 60.0
#: Exit code after several signals.
SIGNALLED = 128 + signal.SIGTERM


class Gate:
    """Scripts that wait until it is opened, and then end with 4; with 3 if they are told to end."""

    def __init__(self, world: World) -> None:
        self._path = world.home / "gate"
        self.script = f"trap 'exit 3' TERM; until [ -e {self._path} ]; do sleep 0.05; done; exit 4"

    def open(self) -> None:
        self._path.touch()


def running(world: World, *task_ids: str) -> None:
    """Wait until the programs of these have begun, and their dispatchers know it."""
    until(lambda: all(world.client.status(i).state is State.RUNNING for i in task_ids), TIMEOUT)
    until(lambda: all(world.ground.starts("")[i, 1] for i in task_ids), TIMEOUT)


@pytest.mark.timeout(180)
def test_what_runs_when_its_dispatcher_leaves_goes_on_in_every_mode_but_stop(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), LEASE_SECONDS=f"{LEASE:g}", RECONCILE_GRACE="1") as world:
        gate = Gate(world)
        modes = {
            # mode, DRAIN_TIMEOUT, how many signals
            "waits": ("wait", PATIENCE, 1),
            "waits-too-long": ("wait", LONGER, 1),
            "waits-no-longer": ("wait", PATIENCE, 2),
            "detaches": ("detach", PATIENCE, 1),
            "stops": ("stop", 0.0, 1),
        }
        members = {
            name: world.member(name, wait=False, QUEUES=name, DRAIN_MODE=mode, DRAIN_TIMEOUT=f"{timeout:g}")
            for name, (mode, timeout, _) in modes.items()
        }
        tasks = {}
        for name, member in members.items():
            member.wait_started()
            script, ending = gate.script, "failed:exit:4"
            if name == "waits":
                script, ending = f"sleep {LONGER}; exit 5", "failed:exit:5"
            tasks[name] = world.submit(script, queue=name, endings={ending})
        running(world, *tasks.values())
        for name, member in members.items():
            member.terminate()
            if modes[name][2] > 1:
                member.says("instance.signalled")
                member.terminate()
        for name, member in members.items():
            assert member.ended() == (SIGNALLED if modes[name][2] > 1 else 0), member.stderr[-2000:]
        # Nobody is left, and all of them but one run as if nothing had been.
        for name, task_id in tasks.items():
            status = world.client.status(task_id)
            expected = {"waits": (State.FAILED, 1), "stops": (State.QUEUED, 2)}
            assert (status.state, status.attempt) == expected.get(name, (State.RUNNING, 1)), name
        for member in members.values():
            world.dismiss(member)
        world.member("next", QUEUES=",".join(modes))
        gate.open()
        findings = world.judged()
        assert not findings.broken(), findings
        assert {name: world.client.status(task_id).takeovers for name, task_id in tasks.items()} == (
            dict.fromkeys(tasks, 0)
        )
        attempts = {name: world.client.status(task_id).attempt for name, task_id in tasks.items()}
        assert attempts == {**dict.fromkeys(tasks, 1), "stops": 2}


@pytest.mark.timeout(120)
def test_a_third_signal_ends_an_instance_that_cannot_say_goodbye(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), DRAIN_TIMEOUT=f"{PATIENCE:g}") as world:
        gate = Gate(world)
        member = world.member("a")
        task_id = world.submit(gate.script, endings={"failed:exit:4"})
        running(world, task_id)
        world.server.kill()
        for count in (1, 2, 3):
            member.terminate()
            until(lambda: signals_heard(member) == count or not member.alive, TIMEOUT)  # noqa: B023 - ends first
        assert member.ended() == SIGNALLED
        world.server.start()
        gate.open()
        findings = world.judged()
        assert not findings.broken(), findings
        assert world.client.status(task_id).attempt == 1


def signals_heard(member: Member) -> int:
    return member.stderr.count("instance.signalled")


@contextmanager
def load(world: World, *, backlog: int) -> Iterator[list[str]]:
    """Keep ``backlog`` tasks open: short ones, and each tenth outlasts what a drain waits for."""
    ids: list[str] = []
    enough = threading.Event()

    def produce() -> None:
        while not enough.wait(LOOK):
            still = {status.id for status in world.client.tasks(limit=1_000) if not status.state.terminal}
            for _ in range(backlog - len(still)):
                long = len(ids) % 10 == 0
                ids.append(world.submit("sleep 2; exit 0" if long else "sleep 0.2; exit 0"))

    thread = threading.Thread(target=produce, name="load")
    thread.start()
    try:
        yield ids
    finally:
        enough.set()
        thread.join()


@pytest.mark.timeout(180)
def test_a_rolling_restart_fails_repeats_and_takes_over_nothing(tmp_path: Path) -> None:
    with World(
        tmp_path, ProcessGround(tmp_path), LEASE_SECONDS="15", DRAIN_TIMEOUT="1", RECONCILE_GRACE="1"
    ) as world:
        members = [world.member(name, wait=False) for name in ("a", "b", "c")]
        for member in members:
            member.wait_started()
        with load(world, backlog=16) as ids:
            for member in members:
                until(lambda: len(world.held(member.instance)) > 1, TIMEOUT)  # noqa: B023 - ends first
                member.terminate()
                assert member.ended() == 0, member.stderr[-2000:]
                member.start()
        findings = world.judged()
        assert not findings.broken(), findings
        assert len(ids) > 16
        assert {(s.attempt, s.takeovers) for s in map(world.client.status, ids)} == {(1, 0)}
