"""The connection between one dispatcher and Redis is bad: nothing is lost, done twice, or done in haste.

The dispatcher on the bad connection serves the queue ``default``; another, on a good one, serves
others only, so that it takes no task but such as the first one has lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dispatcher.client import Backoff, Client, State
from tests.chaos.ground import ProcessGround
from tests.chaos.proxy import Proxy, Way
from tests.chaos.world import LEASE, World
from tests.cli.program import until

TIMEOUT = 60.0
#: Scripts and blocking reads, and connections, a second that an instance without work may ask
#: for while its connection is bad. In peace it is some fifteen, with so short a lease.
HASTE = 60


@contextmanager
def bad_connection(home: Path) -> Iterator[tuple[World, Proxy]]:
    with (
        World(home, ProcessGround(home), RECONCILE_GRACE="1") as world,
        Proxy(world.server.under_test.port) as proxy,
    ):
        world.member("bad", wait=False, QUEUES="default", REDIS_URL=proxy.url)
        world.member("good", wait=False, QUEUES="high,low")
        for member in world.members.values():
            member.wait_started()
        yield world, proxy
        findings = world.judged()
        assert not findings.broken(), findings


def status_of(world: World, task_id: str) -> State:
    return world.client.status(task_id).state


def ended(world: World, *task_ids: str) -> None:
    until(lambda: all(status_of(world, i).terminal for i in task_ids), TIMEOUT)


@pytest.mark.timeout(120)
def test_a_reply_that_is_lost_loses_and_repeats_nothing(tmp_path: Path) -> None:
    with bad_connection(tmp_path) as (world, proxy):
        ids = []

        def while_losing(*words: bytes, reply: bytes = b"", script: str = "exit 0", **fields: Any) -> None:
            lost = proxy.lose(*words, reply=reply)
            ids.append(world.submit(script, **fields))
            assert lost.wait(TIMEOUT), words

        while_losing(reply=b"in-take", id="in-take")
        while_losing(b"in-daemon", b"starting", b"daemon", id="in-daemon")
        while_losing(b"in-start", b"starting", b"container", id="in-start")
        while_losing(b"in-note", b"running", id="in-note")
        while_losing(b"in-finish", b"succeeded", id="in-finish")
        while_losing(
            b"in-retry", b"failed", script='[ "$DISPATCHER_ATTEMPT" -gt 1 ]', id="in-retry",
            max_attempts=2, backoff=Backoff(initial=0.1, max=0.1),
        )  # fmt: skip
        while_losing(b"in-stop", b"cause", id="in-stop", script="sleep 600",
                     timeout=0.2, grace_period=0.2, endings={"failed:timeout"})  # fmt: skip
        lost = proxy.lose(b"in-place")
        ids.append(world.xadd("exit 0", id="in-place"))
        assert lost.wait(TIMEOUT)
        with Client(proxy.url) as client:
            order = world.order("exit 0", id="in-enqueue")
            lost = proxy.lose(b"in-enqueue")
            assert client.submit(order.task).id == "in-enqueue"
            assert lost.is_set()
            world.book.accept("in-enqueue", order)
            running = world.submit("sleep 600", grace_period=0.1, id="in-cancel")
            until(lambda: world.client.status(running).state is State.RUNNING, TIMEOUT)
            world.book.cancel(running)
            lost = proxy.lose(b"in-cancel", reply=b"requested")
            client.cancel(running)
            assert lost.is_set()
        plain = ids.pop()
        ended(world, *ids, running, "in-enqueue")
        until(lambda: plain in {status.id for status in world.client.tasks(state=State.SUCCEEDED)}, TIMEOUT)


@pytest.mark.timeout(120)
def test_cuts_lose_and_repeat_nothing(tmp_path: Path) -> None:
    with bad_connection(tmp_path) as (world, proxy):
        ids = [world.submit("sleep 0.2") for _ in range(20)] + [world.xadd("exit 0") for _ in range(10)]
        for _ in range(12):
            seen = proxy.connections
            proxy.cut()
            until(lambda: proxy.connections > seen, TIMEOUT)  # noqa: B023 - ends first
        ended(world, *ids[:20])


@pytest.mark.timeout(120)
def test_what_arrives_after_the_lease_changes_nothing_any_more(tmp_path: Path) -> None:
    """``down``: what one asked for was done, and it does not know. ``up``: what it asked for while
    its lease still held reaches Redis when it does no more."""
    with bad_connection(tmp_path) as (world, proxy):
        good = world.members["good"].instance
        ways: tuple[Way, ...] = ("down", "up")
        for way in ways:
            ids = [
                world.submit(f"sleep {seconds}; exit 3", endings={"failed:exit:3"})
                for seconds in (LEASE / 2, LEASE, 1.5 * LEASE)
            ]
            until(lambda: all(status_of(world, i) is State.RUNNING for i in ids[1:]), TIMEOUT)  # noqa: B023 - ends first
            proxy.hold(way)
            # Those that have not ended yet are adopted and ended by the other.
            until(lambda: world.client.status(ids[-1]).instance == good, TIMEOUT)  # noqa: B023 - ends first
            ended(world, *ids)
            before = [world.client.status(i) for i in ids]
            proxy.let_go()
            late = world.submit("exit 0")
            ended(world, late)
            assert [world.client.status(i) for i in ids] == before


def asked(world: World) -> int:
    """Scripts and blocking reads that anybody has sent."""
    with world.server.client() as client:
        stats: Any = client.info("commandstats")
    return sum(
        stats[name]["calls"] + stats[name].get("rejected_calls", 0)
        for name in ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_xread")
        if name in stats
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_nobody_hastens_while_the_connection_is_bad(tmp_path: Path) -> None:
    with bad_connection(tmp_path) as (world, proxy):
        world.dismiss(world.members["good"])
        gate = world.home / "gate"
        running = world.submit(f"until [ -e {gate} ]; do sleep 0.05; done")
        until(lambda: status_of(world, running) is State.RUNNING, TIMEOUT)

        def haste(seconds: float) -> tuple[float, float]:
            """Commands and connections a second, for as long as somebody bears the trouble."""
            commands, connections, began = asked(world), proxy.connections, time.monotonic()
            until(lambda: time.monotonic() - began > seconds, TIMEOUT)
            lasted = time.monotonic() - began
            return (asked(world) - commands) / lasted, (proxy.connections - connections) / lasted

        seen = {}
        proxy.refuse()
        seen["refused"] = haste(2)
        proxy.accept()
        proxy.hold("down")
        seen["held"] = haste(6)
        proxy.let_go()
        proxy.latency, proxy.drip = 0.1, 64
        seen["dripping"] = haste(2)
        slow = world.submit("exit 0")
        ended(world, slow)
        proxy.latency, proxy.drip = 0.0, 0
        gate.touch()
        assert all(rate < HASTE for rates in seen.values() for rate in rates), seen
