"""Redis has no memory or no disk left: submissions are refused with the reason, and what runs goes on."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import redis

from dispatcher.client import DispatcherError, State
from tests.chaos.ground import ProcessGround
from tests.chaos.world import LEASE, World
from tests.cli.program import until
from tests.support.redis_server import server_program

TIMEOUT = 60.0


def gated(world: World) -> str:
    return f"until [ -e {world.home}/gate ]; do sleep 0.05; done; exit 4"


def running_and_waiting(world: World) -> tuple[list[str], list[str]]:
    """Tasks that run until the gate is opened, and others that wait behind them."""
    world.member("a", NUM_CONSUMERS="4")
    running = [world.submit(gated(world), endings={"failed:exit:4"}) for _ in range(4)]
    until(lambda: all(world.client.status(i).state is State.RUNNING for i in running), TIMEOUT)
    until(lambda: all(world.ground.starts("")[i, 1] for i in running), TIMEOUT)
    return running, [world.submit("exit 0") for _ in range(4)]


def refused(world: World, reason: str) -> None:
    """Nothing can be handed in, in either way, and whoever tries is told why."""
    with pytest.raises(DispatcherError, match=reason):
        world.submit("exit 0", id="refused")
    with pytest.raises(redis.ResponseError, match=reason):
        world.xadd("exit 0", id="refused-as-well")


@pytest.mark.timeout(120)
def test_without_memory_what_was_accepted_is_taken_and_ends(tmp_path: Path) -> None:
    with World(tmp_path, ProcessGround(tmp_path), RECONCILE_GRACE="1") as world:
        running, waiting = running_and_waiting(world)
        world.server.command("CONFIG", "SET", "maxmemory", "1")
        refused(world, "out of memory|maxmemory")
        (tmp_path / "gate").touch()
        until(lambda: all(world.client.status(i).state.terminal for i in [*running, *waiting]), TIMEOUT)
        refused(world, "out of memory|maxmemory")
        world.server.command("CONFIG", "SET", "maxmemory", "0")
        world.submit("exit 0", id="refused")
        findings = world.judged()
        assert not findings.broken(), findings


@pytest.fixture
def _bounded_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is told by an error, and not killed by a signal, when a file may not grow.

    For Redis a file at its limit (RLIMIT_FSIZE) is what a full disk is: a write of its append-only
    file that fails. It needs no file system of its own, and so no right to mount one.
    """
    wrapper = tmp_path / "redis-server"
    wrapper.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {server_program()} \"$@\"\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("TEST_REDIS_SERVER", str(wrapper))


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("_bounded_files")
def test_with_a_full_disk_programs_run_on_and_their_ends_are_recorded_later(tmp_path: Path) -> None:
    ground = ProcessGround(tmp_path)
    with World(tmp_path, ground, RECONCILE_GRACE="1") as world:
        # With `always` Redis ends itself when it can't write, and is as good as killed.
        world.server.command("CONFIG", "SET", "appendfsync", "everysec")
        running, waiting = running_and_waiting(world)
        pid = world.server.under_test.pid
        largest = max(path.stat().st_size for path in tmp_path.rglob("*.aof"))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        until(lambda: cannot_write(world), TIMEOUT)
        refused(world, "MISCONF")
        (tmp_path / "gate").touch()
        until(lambda: all(ground.ledger.lines("end")[i, 1] for i in running), TIMEOUT)
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 1.5 * LEASE, TIMEOUT)
        assert not any(ground.ledger.starts()[i, 1] for i in waiting)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        until(lambda: not cannot_write(world), TIMEOUT)
        world.submit("exit 0", id="refused")
        findings = world.judged()
        assert not findings.broken(), findings
        assert {world.client.status(i).takeovers for i in [*running, *waiting]} == {0}


def cannot_write(world: World) -> bool:
    with world.server.client() as client:
        return bool(client.info("persistence")["aof_last_write_status"] == "err")
