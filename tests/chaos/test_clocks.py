"""A clock jumps by an hour, on Redis or on one dispatcher: nothing is taken over, nothing is lost.

The clock is that of libfaketime, loaded into one process, and only the one that tells the time
of day: what measures durations goes on, as it does when an operator sets a clock.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import State
from tests.chaos.ground import ProcessGround
from tests.chaos.truth import BASE
from tests.chaos.world import LEASE, World
from tests.cli.program import until
from tests.support.redis_server import server_program

TIMEOUT = 60.0
HOUR = 3600


class Clock:
    """The time of day of whatever process is told of it; ``jump`` sets it while that runs."""

    def __init__(self, home: Path) -> None:
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        if not libraries:
            pytest.skip("no libfaketime on this machine (Debian: libfaketime)")
        self._file = home / "clock"
        self.environment = {
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # its name in older versions
        }
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """It is so far ahead of the real one now."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def clock_of_redis(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    wrapper = tmp_path / "redis-server"
    told = " ".join(f"{name}='{value}'" for name, value in clock.environment.items())
    wrapper.write_text(f'#!/bin/sh\nexec env {told} {server_program()} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("TEST_REDIS_SERVER", str(wrapper))
    return clock


def gated(world: World) -> str:
    return f"until [ -e {world.home}/gate ]; do sleep 0.05; done; exit 4"


def begun(world: World, count: int, **fields: Any) -> list[str]:
    running = [world.submit(gated(world), endings={"failed:exit:4"}, **fields) for _ in range(count)]
    until(lambda: all(world.client.status(i).state is State.RUNNING for i in running), TIMEOUT)
    until(lambda: all(world.ground.starts("")[i, 1] for i in running), TIMEOUT)
    return running


def redis_time(world: World) -> float:
    with world.server.client() as client:
        seconds, micros = client.time()
    return float(seconds) + float(micros) / 1e6


def calm_and_over(world: World) -> bool:
    """Whether what has lapsed would be taken over by now, and ticks go on."""
    with world.server.client() as client:
        calm: Any = client.hget(f"{BASE}meta:counters", "calm_until")
        last: Any = client.hget(f"{BASE}meta:counters", "last_tick")
    now = redis_time(world) * 1000
    return abs(now - int(last)) < 1000 * LEASE and bool(calm) and int(calm) + 500 < int(last)


@pytest.mark.timeout(120)
def test_when_the_clock_of_redis_jumps_nothing_is_taken_over(clock_of_redis: Clock, tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1", LOST_AFTER="600") as world:
        for name in ("a", "b"):
            world.member(name, wait=False)
        for member in world.members.values():
            member.wait_started()
        running = begun(world, 8)
        before = redis_time(world)
        for seconds in (HOUR, -HOUR):
            clock_of_redis.jump(seconds)
            assert abs(redis_time(world) - before - seconds) < HOUR / 2
            until(lambda: calm_and_over(world), TIMEOUT)
            quick = world.submit("exit 0")
            later = world.submit("exit 0", delay=0.5)
            until(lambda: all(world.client.status(i).state.terminal for i in (quick, later)), TIMEOUT)  # noqa: B023 - ends first
            assert sum(world.client.status(i).takeovers for i in running) == 0
        (tmp_path / "gate").touch()
        findings = world.judged()
        assert not findings.broken(), findings


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_when_the_clock_of_a_dispatcher_jumps_nothing_is_taken_over(clock: Clock, tmp_path: Path) -> None:
    # A lease that no busy machine lets lapse, but an hour would.
    with World(
        tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1", NUM_CONSUMERS="20", LEASE_SECONDS="15"
    ) as world:
        world.member("right", wait=False)
        world.member("wrong", wait=False, QUEUES="wrong", **clock.environment)
        for member in world.members.values():
            member.wait_started()
        running = [*begun(world, 4), *begun(world, 4, queue="wrong")]
        for seconds in (HOUR, -HOUR):
            clock.jump(seconds)
            some = [
                world.submit("sleep 0.2; exit 3", endings={"failed:exit:3"}, queue=queue)
                for queue in ("default", "wrong", "wrong")
            ]
            some.append(world.submit("exit 3", endings={"failed:exit:3"}, queue="wrong", delay=0.5))
            until(lambda: all(world.client.status(i).state.terminal for i in some), TIMEOUT)  # noqa: B023 - ends first
            statuses = [world.client.status(i) for i in [*running, *some]]
            assert {(status.attempt, status.takeovers) for status in statuses} == {(1, 0)}
        (tmp_path / "gate").touch()
        findings = world.judged()
        assert not findings.broken(), findings


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "hours",
    [
        pytest.param(1, id="ahead"),
        pytest.param(-1, id="behind", marks=pytest.mark.slow),
    ],
)
def test_whose_clock_is_wrong_adopts_what_runs_and_does_not_end_it(
    clock: Clock, tmp_path: Path, hours: int
) -> None:
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        dying = world.member("dying")
        [running] = begun(world, 1)
        clock.jump(hours * HOUR)
        world.member("wrong", wait=False, **clock.environment).wait_started()
        dying.kill()
        until(lambda: world.client.status(running).instance == "wrong.1", TIMEOUT)
        until(lambda: "task.adopted" in world.members["wrong"].stderr, TIMEOUT)
        world.dismiss(dying)
        world.client.wait(world.submit("sleep 1"), timeout=TIMEOUT)
        (tmp_path / "gate").touch()
        findings = world.judged()
        assert not findings.broken(), findings
